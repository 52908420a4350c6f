"""Whole runs in a bucket: equal to those on a local disk bit for bit, interrupted, killed, read and repaired there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import assert_bit_equal, members, run, stop_at
from typer.testing import CliRunner

from raylora.cli import app
from raylora.client import distill_run, publish_report, repair_run
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.engine.run.roster import read_state
from raylora.engine.run.verify import verify_run
from raylora.errors import Interrupted, LostRunError, StoreError
from raylora.serve.predictor import load_ensemble
from raylora.spec import DistillSpec, dump_spec
from raylora.store.run_store import RunStore
from raylora.store.storage import Storage

Make = Callable[..., Any]
TEXTS = ["A film to remember.", "Dull from start to end."]
SMALL = {
    "adapter__dropout": 0.1, "checkpointing": {"every_steps": 2, "num_to_keep": 2},
    "baselines": {"checkpoints": 1}, "tracking": [],
    "optimization": {"lr": 0.005, "steps": 6, "micro_batch": 8},
}


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def finished(bucket: str, make_spec: Make, trained: Callable[[Any], str]) -> str:
    """Return where a finished run lies in a bucket: one that was trained on a local disk, copied there file by file."""
    local = Path(trained(make_spec(**SMALL)))
    there = Storage(f"{bucket}/runs/demo")
    for path in local.rglob("*"):
        if path.is_file():
            there.write(path.relative_to(local).as_posix(), path.read_bytes())
    return there.uri


def download(storage: Storage, folder: Path) -> None:
    for path in storage.fs.find(storage.root):
        file = folder / path.removeprefix(f"{storage.root}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(storage.fs.cat_file(path))


def test_a_run_in_a_bucket_is_interrupted_and_resumed_to_members_equal_to_those_on_a_disk(
    bucket: str, make_spec: Make, trained: Callable[[Any], str], tmp_path: Path
) -> None:
    local = trained(make_spec(**SMALL))
    spec = make_spec(storage_path=f"{bucket}/runs", tracking=["tensorboard"])
    with pytest.raises(Interrupted, match=rf"raylora resume {bucket}/runs/demo"):
        run(spec, stop_at(3))
    store = RunStore.for_spec(spec)
    assert store.checkpoint_steps("member-000")[-1] == 3 and store.holder() is None
    metrics = run(store.spec_in_place())
    assert_bit_equal(members(local), members(store.uri))
    assert metrics["members"] == RunStore(local).read_json("metrics.json")["members"]
    assert len(store.storage.list("tensorboard")) == 3  # two members and the ensemble
    files = ["MANIFEST.json", "README.md", "adapter_config.json", "adapter_model.safetensors", "member.json"]
    assert store.storage.list("members/member-000") == files
    names = store.storage.list("events")
    assert names == ["000001-000001.jsonl", "000002-000001.jsonl"] and not store.storage.exists("events.jsonl")
    assert [event["epoch"] for event in store.read_events()] == sorted(event["epoch"] for event in store.read_events())
    assert not [part for part in verify_run(store.uri) if part.problem]
    assert Path(os.curdir, "s3:").exists() is False  # nothing took the URI for a folder
    download(store.storage, tmp_path / "moved")
    assert not [part for part in verify_run(str(tmp_path / "moved")) if part.problem]
    assert read_state(RunStore(str(tmp_path / "moved"))).phase.value == "succeeded"
    one = load_ensemble(local).predict(TEXTS)
    assert [r.record() for r in load_ensemble(store.uri).predict(TEXTS)] == [r.record() for r in one]


KILLED = """
import os, signal, sys
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.spec import parse_spec

def on_status(status):
    for job in status.jobs.values():
        if job.progress is not None and job.progress.done >= 5:
            os.kill(os.getpid(), signal.SIGKILL)

run_in_process(prepare(parse_spec(open(sys.argv[1]).read(), where="spec")), on_status)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_in_the_middle_loses_nothing_but_time(
    bucket: str, make_spec: Make, tmp_path: Path, trained: Callable[[Any], str]
) -> None:
    local = trained(make_spec(**SMALL))
    spec = make_spec(storage_path=f"{bucket}/runs")
    file = tmp_path / "spec.yaml"
    file.write_text(dump_spec(spec))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(file)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = RunStore.for_spec(spec)
    holder = store.holder()
    assert holder is not None and not holder.is_alive and store.checkpoint_steps("member-000") == [2, 4]
    said = call("status", store.uri)
    assert said.exit_code == 0 and "no sign of life" in " ".join(said.output.split())
    steps: list[int] = []
    run(spec, lambda progress: steps.append(progress.done))
    assert steps and steps[0] == 5
    assert_bit_equal(members(local), members(store.uri))


def test_a_run_that_is_taken_over_while_it_trains_stops_and_commits_nothing_more(
    bucket: str, make_spec: Make
) -> None:
    spec = make_spec(**SMALL, storage_path=f"{bucket}/runs")
    store = RunStore.for_spec(spec)
    taken: list[int | None] = []

    def on_step(progress: Any) -> None:
        if progress.done == 3 and not taken:
            store.lock()  # this process is never another to itself: it takes over what it holds
            taken.append(store.epoch)

    with pytest.raises(LostRunError, match="has taken this run over"):
        run(spec, on_step)
    assert taken == [2] and store.checkpoint_steps("member-000") == [2]
    assert [event["event"] for event in store.read_events()] == ["RunStarted", "WorkerReady"]
    store.unlock()


@pytest.mark.slow
def test_everything_that_reads_a_run_reads_one_in_a_bucket(finished: str, tmp_path: Path) -> None:
    predicted = call("predict", finished, "--text", TEXTS[0], "--json")
    assert predicted.exit_code == 0 and "probabilities" in predicted.stdout
    status = json.loads(call("status", finished, "--json").stdout)
    assert status["phase"] == "succeeded"
    publish_report(RunStore(finished))
    assert b"<html" in RunStore(finished).storage.read("report.html")
    for command in (["verify", finished], ["export", finished, "--out", str(tmp_path / "out")]):
        done = call(*command)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "out/member-000/adapter_model.safetensors").exists()
    again = call("resume", finished, "--local")
    assert again.exit_code == 0, again.output


@pytest.mark.slow
def test_a_lost_member_in_a_bucket_is_refused_and_repaired_bit_for_bit(finished: str) -> None:
    before, store = members(finished), RunStore(finished)
    content = store.storage.read("members/member-001/adapter_model.safetensors")
    store.storage.write("members/member-001/adapter_model.safetensors", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match="member-001 is damaged"):
        load_ensemble(finished)
    done = repair_run(finished, local=True)
    assert done.equal == {"members/member-001": True}
    assert_bit_equal(before, members(finished))
    assert not [part for part in verify_run(finished) if part.problem]


@pytest.mark.slow
def test_a_student_is_taught_in_a_bucket(finished: str) -> None:
    student = DistillSpec.model_validate({"student": {"base": RunStore(finished).read_spec().base.model_dump()}})
    record = distill_run(finished, student, local=True)
    assert record["contenders"] and not [part for part in verify_run(finished) if part.problem]


@pytest.mark.slow
def test_interrupts_and_kills_at_every_step_in_a_bucket_end_in_equal_members(
    bucket: str, make_spec: Make, trained: Callable[[Any], str]
) -> None:
    local = trained(make_spec(**SMALL))
    for step in range(1, 6):
        spec = make_spec(storage_path=f"{bucket}/stopped-at-{step}")
        with pytest.raises(Interrupted):
            run(spec, stop_at(step))
        run_in_process(prepare(spec))
        assert_bit_equal(members(local), members(spec))
