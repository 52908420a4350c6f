"""Runs on a real Ray cluster: equal to a run without it, and not stopped by lost workers or signals."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from run_helpers import assert_bit_equal, members

from raylora.client import attach, launch, resume, run_local
from raylora.errors import Interrupted, PlacementError, RunDirectoryError, TrainingError
from raylora.handle import RunHandle
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore

pytestmark = pytest.mark.usefixtures("ray_cluster")
MakeSpec = Callable[..., RunSpec]


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def step_of(handle: RunHandle) -> int:
    return max((job.progress.done for job in handle.status().jobs.values() if job.progress is not None), default=0)


def worker_pids() -> list[int]:
    """Return the processes that train, found by what Ray calls them."""
    import psutil

    titles = {p.pid: " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])}
    return [pid for pid, title in titles.items() if title.startswith("ray::raylora:") and "[member-" in title]


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return where the run lies that was trained on Ray to be copied, once it has been."""
    return {"kept": tmp_path_factory.mktemp("on-ray")}


@pytest.fixture
def run_on_ray(make_spec: MakeSpec, on_ray: dict[str, Path], tmp_path: Path) -> RunSpec:
    """Return the spec of a profiled run of three members that two workers trained, copied for this test."""
    spec = make_spec(ensemble__members=3, placement__workers=2, profile={})
    if not any(on_ray["kept"].iterdir()):
        launch(spec.model_copy(update={"storage_path": str(on_ray["kept"])})).wait()
    shutil.copytree(on_ray["kept"], tmp_path / "runs")
    return spec


def test_members_trained_on_ray_equal_members_trained_in_process(run_on_ray: RunSpec, tmp_path: Path) -> None:
    store = RunStore.for_spec(run_on_ray)
    on_ray = store.read_json("metrics.json")
    in_process = run_local(run_on_ray.model_copy(update={"storage_path": str(tmp_path / "local"), "profile": None}))
    assert_bit_equal(members(store.uri), members(str(tmp_path / "local" / "demo")))
    assert on_ray["ensemble"]["eval"] == in_process["ensemble"]["eval"]
    assert len(on_ray["members"]) == 3
    for name in ("report.html", "metrics.json", "spec.yaml", "events.jsonl"):
        assert Path(store.uri, name).stat().st_size > 0
    jobs = [name.removesuffix(".json") for name in store.storage.list("timing")]
    assert store.storage.list("profile") == sorted(f"{job}.{ending}" for job in jobs for ending in ("json.gz", "txt"))
    assert len(jobs) == 2 and not Path(tmp_path, "local", "demo", "profile").exists()
    assert store.storage.list("tensorboard") == ["ensemble", "member-000", "member-001", "member-002"]


@pytest.mark.slow
def test_what_is_made_of_member_0_is_the_same_on_ray(make_spec: MakeSpec, tmp_path: Path) -> None:
    baselines = {"swag": {"samples": 2, "every_steps": 1}, "laplace": {"structure": "kronecker", "samples": 2},
                 "temperature": True}
    spec = make_spec(baselines=baselines)
    handle = launch(spec)
    on_ray = handle.wait()
    in_process = run_local(spec.model_copy(update={"storage_path": str(tmp_path / "local")}))
    assert on_ray["baselines"] == in_process["baselines"] and set(on_ray["baselines"]) == {"single", *baselines}
    for name in ("swag", "laplace"):
        one, two = (
            safetensors.torch.load(store.load_result(f"predictions/{name}")["predictions.safetensors"])
            for store in (handle.store, RunStore(str(tmp_path / "local" / "demo")))
        )
        assert_bit_equal(one, two)


def test_a_killed_worker_costs_nothing_but_time(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(optimization__steps=100, checkpointing__every_steps=5, ensemble__members=2, placement__workers=1)
    unbroken = spec.model_copy(update={"storage_path": str(tmp_path / "unbroken")})
    run_local(unbroken)
    handle = launch(spec.model_copy(update={"storage_path": str(tmp_path / "broken")}))
    wait_until(lambda: step_of(handle) >= 12)
    (pid,) = worker_pids()
    os.kill(pid, signal.SIGKILL)
    handle.wait()
    assert_bit_equal(members(handle.uri), members(str(tmp_path / "unbroken" / "demo")))
    events = [record["event"] for record in handle.store.read_events()]
    assert "WorkerLost" in events
    timing = handle.store.read_json("timing/job-00.json")
    assert timing["resumed_at_step"] >= 5, "it began again from nothing instead of from a commit"


def test_an_interrupted_run_commits_and_resumes_bit_equal(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(optimization__steps=200, ensemble__members=2, placement__workers=1)
    run_local(spec.model_copy(update={"storage_path": str(tmp_path / "unbroken")}))
    handle = launch(spec.model_copy(update={"storage_path": str(tmp_path / "broken")}))

    def stop_soon() -> None:
        wait_until(lambda: step_of(handle) >= 5)
        attach("demo").interrupt(signal.SIGTERM)

    stopper = threading.Thread(target=stop_soon)
    stopper.start()
    with pytest.raises(Interrupted) as caught:
        handle.wait()
    stopper.join()
    assert caught.value.exit_code == 143
    assert f"raylora resume {handle.uri}" in str(caught.value)
    (step,) = {max(handle.store.checkpoint_steps(f"member-00{m}")) for m in range(2)}
    assert 5 <= step < 200
    resume(handle.uri).wait()
    assert_bit_equal(members(handle.uri), members(str(tmp_path / "unbroken" / "demo")))


def test_more_workers_than_the_cluster_has_are_refused_before_anything_starts(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec(placement__workers=7)
    with pytest.raises(PlacementError, match=r"7 worker\(s\) of 1 CPU\(s\).*the cluster has 2 CPU\(s\)") as caught:
        launch(spec)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "runs").exists()


def test_a_second_run_on_one_directory_is_refused_naming_the_holder(make_spec: MakeSpec) -> None:
    spec = make_spec(optimization__steps=2000)
    handle = launch(spec)
    wait_until(lambda: handle.store.holder() is not None)
    with pytest.raises(RunDirectoryError, match=r"in use by process \d+ on "):
        launch(spec)
    handle.interrupt()
    with pytest.raises(Interrupted):
        handle.wait()
    assert handle.store.holder() is None


def test_a_finished_run_is_not_trained_again(run_on_ray: RunSpec) -> None:
    uri = RunStore.for_spec(run_on_ray).uri
    before = {path: path.stat().st_mtime_ns for path in Path(uri, "members").rglob("*.safetensors")}
    resume(uri).wait()
    after = {path: path.stat().st_mtime_ns for path in Path(uri, "members").rglob("*.safetensors")}
    assert before == after and len(before) == 3


# --- a base that is prepared first -----------------------------------------------------------------------
PREPARED = {
    "base__quantization": {"kind": "optq", "bits": 3, "group_size": 16, "magr_iterations": 10},
    "base__compensation": {"kind": "cloq", "rank": 4},
    "base__calibration": {"source": "pypi:bbc-news", "samples": 8, "length": 32},
}


@pytest.mark.slow
def test_a_base_is_prepared_on_the_cluster_and_members_on_it_equal_those_in_process(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec(**PREPARED, name="on-ray", placement__workers=2)
    seen: set[str] = set()
    handle = launch(spec)
    metrics = handle.wait(lambda status: seen.add(status.phase.value))
    assert metrics["run"]["phase"] == "succeeded" and "preparing" in seen
    events = [event["event"] for event in handle.store.read_events()]
    assert events.index("BasePrepared") < events.index("WorkerReady")
    errors = [(layer["compensated"], layer["theory"]) for layer in metrics["preparation"]["layers"]]
    assert len(errors) == 12 and all(found == pytest.approx(least, rel=1e-4) for found, least in errors)
    run_local(make_spec(**PREPARED, name="in-process", placement__workers=2))  # finds the base
    assert_bit_equal(members(handle.uri), members(str(Path(handle.uri).parent / "in-process")))


@pytest.mark.slow
def test_a_preparation_that_fails_fails_the_run_with_its_reason(
    make_spec: MakeSpec, tiny_model: Callable[[str], str], tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model("bert"), folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match=r"layer\.1\.output\.dense"):
        launch(make_spec(**PREPARED, base__source=str(folder))).wait()
