"""A profile of a run: a trace and a table of some steps of each job, and members that are none the worse for it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import assert_bit_equal, members, run, stop_at
from sweeps import sweep
from typer.testing import CliRunner

from raylora.cli import app
from raylora.engine.run import profiling
from raylora.errors import Interrupted
from raylora.spec import dump_spec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]


def optimizer_steps(trace: bytes) -> int:
    """Return how many optimizer steps of members a Chrome trace holds."""
    events = json.loads(gzip.decompress(trace))["traceEvents"]
    assert any(event.get("name", "").startswith("aten::") for event in events)
    return sum(event.get("name", "").startswith("Optimizer.step#") for event in events)


def test_a_profiled_run_has_a_trace_per_job_and_bit_equal_members(make_spec: Make, trained: Any) -> None:
    plain = make_spec(name="plain", placement__members_per_worker=1)
    trained(plain)
    spec = make_spec(name="profiled", profile={"skip": 2, "steps": 3})
    assert spec.digest() == plain.digest()
    run(spec)
    assert_bit_equal(members(plain), members(spec))
    storage = RunStore.for_spec(spec).storage
    assert storage.list("profile") == ["job-00.json.gz", "job-00.txt", "job-01.json.gz", "job-01.txt"]
    assert not RunStore.for_spec(plain).storage.exists("profile")
    assert optimizer_steps(storage.read("profile/job-01.json.gz")) == 3
    table = storage.read("profile/job-01.txt").decode()
    assert table.startswith("job-01: steps 3 to 5 ") and "aten::addmm" in table and "Self CPU" in table


@pytest.mark.parametrize(("steps", "recorded"), sweep([(1, 1), (2, 2), (4, 3)], [(1, 1)]))
def test_a_run_that_is_shorter_still_gives_a_trace(make_spec: Make, steps: int, recorded: int) -> None:
    spec = make_spec(optimization__steps=steps, ensemble__members=1, profile={})
    run(spec)
    assert optimizer_steps(RunStore.for_spec(spec).storage.read("profile/job-00.json.gz")) == recorded


def test_an_interrupted_job_writes_what_it_has(make_spec: Make) -> None:
    spec = make_spec(ensemble__members=1, profile={})
    with pytest.raises(Interrupted):
        run(spec, stop_at(3))
    assert optimizer_steps(RunStore.for_spec(spec).storage.read("profile/job-00.json.gz")) == 1


@pytest.mark.slow
def test_a_profile_that_cannot_be_written_stops_no_run(
    make_spec: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Busy(profiling.profile):
        def start(self) -> None:
            raise RuntimeError("the device is being profiled already")

    spec = make_spec(ensemble__members=1, profile={}, name="full")
    folder = Path(RunStore.for_spec(spec).uri)
    with pytest.raises(Interrupted):
        run(spec, stop_at(1))
    (folder / "profile").write_text("no folder can be made where a file is")
    assert run(spec)["run"]["phase"] == "succeeded"
    monkeypatch.setattr(profiling, "profile", Busy)
    assert run(make_spec(name="busy"))["run"]["phase"] == "succeeded"
    said = [record.getMessage() for record in caplog.records if record.name == profiling.__name__]
    assert ["there is no profile" in line for line in said] == [True, True] and "already" in said[1]


@pytest.mark.slow
def test_the_option_asks_for_a_profile_and_says_how_to_open_it(make_spec: Make, tmp_path: Path) -> None:
    spec = make_spec(ensemble__members=1, optimization__steps=2)
    path = tmp_path / "spec.yaml"
    path.write_text(dump_spec(spec))
    result = CliRunner().invoke(app, ["run", str(path), "--local", "--profile"])
    assert result.exit_code == 0, result.output
    assert RunStore.for_spec(spec).storage.list("profile") == ["job-00.json.gz", "job-00.txt"]
    assert "chrome://tracing" in result.output and "perfetto" in result.output
