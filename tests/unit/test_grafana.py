"""The Grafana dashboard draws the series that are published, all of them and no others; names that people read."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from raylora import control
from raylora.actors import telemetry
from raylora.actors.names import actor_title, task_name
from raylora.actors.reporter import event_record
from raylora.actors.telemetry import (
    COORDINATOR_SERIES,
    MEMBER_PHASES,
    SERIES,
    Published,
    RunTelemetry,
    Telemetry,
    restarts,
)
from raylora.progress import Activity, Progress

BOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "raylora.json"


def board() -> dict[str, Any]:
    return json.loads(BOARD.read_text())


class Kept:
    """In place of published metrics: what was said, as the last value by name and member."""

    def __init__(self) -> None:
        self.said: dict[tuple[str, str | None], float] = {}

    def say(self, name: str, value: float, member: str | None = None) -> None:
        assert (member is not None) == ("member" in SERIES[name].tags)
        self.said[name, member] = value


def test_the_dashboard_draws_all_series_and_no_others() -> None:
    drawn = {name for panel in board()["panels"] for target in panel["targets"]
             for name in re.findall(r"ray_(raylora_\w+)", target["expr"])}
    assert drawn == set(SERIES)
    everywhere = set(re.findall(r"ray_(raylora_\w+)", BOARD.read_text()))
    assert everywhere == set(SERIES)


def test_the_dashboard_selects_by_the_tags_that_there_are() -> None:
    for panel in board()["panels"]:
        for target in panel["targets"]:
            for name, selected in re.findall(r"ray_(raylora_\w+)\{([^}]*)\}", target["expr"]):
                assert set(re.findall(r"(\w+)=~", selected)) == set(SERIES[name].tags), target["expr"]
            assert "rate(" in target["expr"] or "_total" not in target["expr"]
            legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            (kept,) = re.findall(r"by \(([^)]*)\)", target["expr"])
            assert legend == set(kept.split(", "))
    assert {variable["name"] for variable in board()["templating"]["list"]} == {"datasource", "run", "member"}


def test_the_dashboard_names_the_phases_of_members() -> None:
    (panel,) = (panel for panel in board()["panels"] if panel["title"] == "Member phase")
    options = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    assert {int(number): option["text"] for number, option in options.items()} == {
        number: state.value for state, number in MEMBER_PHASES.items()}


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [(x, y) for panel in panels for place in [panel["gridPos"]]
             for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


def test_the_tags_are_run_and_member_only() -> None:
    assert {tag for series in SERIES.values() for tag in series.tags} == {"run", "member"}
    assert all(name.startswith("raylora_") and name.islower() for name in SERIES)


def test_a_step_says_everything_that_a_worker_knows(monkeypatch: Any) -> None:
    kept = Kept()
    monkeypatch.setattr(telemetry, "Published", lambda run, names: kept)
    worker = Telemetry("demo")
    worker.loaded(1000)
    worker.record(Progress(
        Activity.TRAINING, 7, 10, 1, 0.5, {"member-000": 0.25}, tokens=40, grad_norms={"member-000": 2.0},
        validations={"member-000": {"nll": 0.5, "accuracy": 1.0}},
    ))
    with worker.span("step"):
        pass
    with worker.span("checkpoint"):
        pass
    known = {name for name, _ in kept.said}
    assert known == set(SERIES) - set(COORDINATOR_SERIES) - {"raylora_gpu_memory_bytes"}
    assert kept.said["raylora_step", "member-000"] == 7 and kept.said["raylora_tokens_total", None] == 40
    assert kept.said["raylora_grad_norm", "member-000"] == 2.0


def test_the_coordinator_says_queue_phases_and_restarts(monkeypatch: Any) -> None:
    kept = Kept()
    monkeypatch.setattr(telemetry, "Published", lambda run, names: kept)
    of_run = RunTelemetry("demo")
    started = control.RunStarted({"job-00": ["a"], "job-01": ["b"]}, ["worker-0"], ["a", "b"], 1, 3)
    state = control.replay([started, control.WorkerReady("worker-0")])
    of_run.record(state)
    assert kept.said["raylora_queue_length", None] == 1 and kept.said["raylora_restarts", None] == 0
    assert (kept.said["raylora_member_phase", "a"], kept.said["raylora_member_phase", "b"]) == (1, 0)
    state, _ = control.transition(state, control.WorkerLost("worker-0", "killed"))
    state, _ = control.transition(state, control.WorkerReady("worker-0"))
    of_run.record(state)
    assert kept.said["raylora_restarts", None] == restarts(state) == 1
    state, _ = control.transition(state, control.JobFinished("job-00", 2, {"a": "the loss is nan"}))
    of_run.record(state)
    assert kept.said["raylora_member_phase", "a"] == 3
    assert {name for name, _ in kept.said} == set(COORDINATOR_SERIES)


def test_an_event_is_logged_with_run_phase_and_members() -> None:
    started = control.RunStarted({f"job-{n:02d}": [f"member-{n:03d}"] for n in range(30)}, ["worker-0"], [], 1, 3)
    state = control.replay([started, control.WorkerReady("worker-0")])
    assert event_record("demo", started, state)["jobs"] == 30, "long lists are counted"
    record = event_record("demo", control.JobFinished("job-00", 1), state)
    assert (record["run"], record["phase"], record["members"]) == ("demo", "training", ["member-000"])
    json.dumps(record)


def test_gauges_are_said_again_and_those_of_other_members_are_not(monkeypatch: Any) -> None:
    monkeypatch.setattr(telemetry, "_AGAIN_S", 0.01)
    said: list[tuple[str, str | None]] = []
    published = Published("demo", ())
    published._publish = lambda name, value, member: said.append((name, member))  # for good: its thread goes on
    published.say("raylora_loss", 0.5, "member-000")
    published.say("raylora_base_bytes", 9.0)
    published.say("raylora_tokens_total", 9)
    until = time.monotonic() + 10
    while said.count(("raylora_loss", "member-000")) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    published.forget_members()
    time.sleep(0.1)  # a round that had begun may end
    said.clear()
    while said.count(("raylora_base_bytes", None)) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert set(said) == {("raylora_base_bytes", None)}, "a counter is never said again"


def test_names_that_people_read() -> None:
    assert actor_title("my-run", "my-run-1a2b3c4d-worker-3-12") == "raylora:my-run:worker-3"
    assert actor_title("worker-9", "worker-9-1a2b3c4d-worker-3-12-rank-1") == "raylora:worker-9:worker-3-rank-1"
    assert task_name("demo", "worker-3", ["member-006", "member-007"]) == (
        "raylora:demo:worker-3 [member-006, member-007]")
    assert task_name("demo", "worker-0", [f"m{n}" for n in range(9)]).endswith("m5, and 3 more]")
