"""What becomes of a run when its driver goes, and how another process finds it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raylora import control
from raylora.client import attach
from raylora.engine.run.roster import read_state
from raylora.errors import RunDirectoryError
from raylora.spec import RunSpec, dump_spec
from raylora.store.run_store import RunStore

pytestmark = pytest.mark.usefixtures("ray_cluster")

_DRIVER = """
import sys, time, raylora
if __name__ == "__main__":
    handle = raylora.launch(raylora.read_spec(sys.argv[1]), detach=sys.argv[2] == "detached")
    print(repr(handle), flush=True)
    while sys.argv[2] != "detached":
        done = [job.progress.done for job in handle.status().jobs.values() if job.progress is not None]
        if max(done, default=0) >= 5:
            break
        time.sleep(0.1)
    print("five steps", flush=True)
    sys.stdin.readline()
"""
_FINDER = """
import sys, raylora
for name in sys.argv[1:]:
    handle = raylora.attach(name)
    print(handle.uri, handle.status().phase.value, raylora.attach(handle).uri)
"""


def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], env={**kept, **environment}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_a_run_whose_driver_ends_without_waiting_commits_first_and_is_found_meanwhile(
    make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    spec = make_spec(name="left-alone", optimization__steps=5000, placement__workers=1)
    file = tmp_path / "spec.yaml"
    file.write_text(dump_spec(spec))
    driver = start(_DRIVER, str(file), "attached")
    store = RunStore.for_spec(spec)
    try:
        assert driver.stdout is not None
        said = [driver.stdout.readline(), driver.stdout.readline()]
        assert "left-alone" in said[0] and "0 of 2 members finished" in said[0]
        assert said[1] == "five steps\n"
        finder = start(_FINDER, "left-alone", store.uri)
        out, err = finder.communicate(timeout=120)
        assert out.splitlines() == [f"{store.uri} training {store.uri}"] * 2, err
    finally:
        _, err = driver.communicate("go\n", timeout=120)
    assert "nobody waits for it: it commits and stops now" in err and f"raylora resume {store.uri}" in err
    assert read_state(store).phase is control.Phase.INTERRUPTED
    steps = [store.checkpoint_steps(name)[-1] for name in ("member-000", "member-001")]
    assert 5000 > steps[0] == steps[1] >= 5


@pytest.mark.slow
def test_a_detached_run_goes_on_without_its_driver(
    make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    import ray

    spec = make_spec(name="detached", optimization__steps=60)
    file = tmp_path / "spec.yaml"
    file.write_text(dump_spec(spec))
    driver = start(_DRIVER, str(file), "detached", RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    out, err = driver.communicate("go\n", timeout=120)
    assert driver.returncode == 0 and "nobody waits" not in err, out + err
    assert not read_state(RunStore.for_spec(spec)).phase.terminal
    metrics: Any = attach(RunStore.for_spec(spec).uri).wait()
    assert metrics["run"]["phase"] == "succeeded"
    assert [job["steps"] for job in (RunStore.for_spec(spec).read_json("timing/job-00.json"),)] == [60]
    deadline = time.monotonic() + 30
    while True:  # its coordinator is put away
        try:
            attach(RunStore.for_spec(spec).uri)
        except RunDirectoryError:
            return
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_handle_tells_events_waits_for_a_while_and_cancels(
    make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    import asyncio

    from raylora.client import launch
    from raylora.errors import Interrupted

    handle = launch(make_spec(name="held", optimization__steps=5000, placement__workers=1))
    found = []
    for event in handle.events():
        found.append(event["event"])
        if event["event"] == "WorkerReady":
            break
    assert found[0] == "RunStarted"
    with pytest.raises(TimeoutError, match="it goes on"):
        handle.result(timeout_s=0.5)
    assert asyncio.run(handle.status_async()).phase is control.Phase.TRAINING
    assert asyncio.run(handle.cancel_async()), "it has committed and stopped"
    with pytest.raises(Interrupted):
        handle.result()
    assert [event["event"] for event in handle.events()][-1] == "JobInterrupted"
