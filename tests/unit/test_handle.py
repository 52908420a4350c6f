"""What a handle tells of a run from its directory alone; tests/ray has those that are going on."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from raylora.display.notebook import run_html
from raylora.handle import RunHandle
from raylora.store.run_store import RunStore


@pytest.fixture
def handle(make_spec: Callable[..., Any], trained: Callable[[Any], str]) -> RunHandle:
    return RunHandle(None, RunStore(trained(make_spec())))


def test_events_and_metrics_are_those_of_the_directory(handle: RunHandle) -> None:
    events = [event["event"] for event in handle.events()]
    assert events[0] == "RunStarted" and events[-1] == "Aggregated" and "JobFinished" in events
    assert handle.has_ended()
    metrics = handle.metrics()
    assert metrics is not None and metrics["run"]["phase"] == "succeeded"


def test_events_come_in_an_event_loop_too(handle: RunHandle) -> None:
    async def told() -> list[str]:
        return [event["event"] async for event in handle.events_async(follow=False)]

    assert asyncio.run(told()) == [event["event"] for event in handle.events(follow=False)]


def test_a_notebook_shows_members_with_bars_and_curves(handle: RunHandle) -> None:
    page = handle._repr_html_()
    assert "succeeded, 2 of 2 members finished" in page and page.count("<polyline") == 2
    points = [float(y) for y in re.findall(r"[\d.]+,([\d.]+)", page.partition("points=")[2])]
    assert all(0 <= y <= 24 for y in points)
    quoted = re.sub(r"(\w+)=(\d+)", r'\1="\2"', page).replace("<br>", "<br/>")
    ElementTree.fromstring(quoted)  # every tag is closed


def test_what_a_run_is_called_cannot_become_markup(
    make_spec: Callable[..., Any], trained: Callable[[Any], str], tmp_path: Path
) -> None:
    uri = Path(trained(make_spec(storage_path=str(tmp_path / "<script>alert(1)<"))))
    assert "<script>" not in run_html(RunStore(str(uri)))


def test_types_are_for_those_who_import_raylora() -> None:
    assert (files("raylora") / "py.typed").is_file()
