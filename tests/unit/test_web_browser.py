"""The live page in a real browser: what it shows while a run goes on, and how it looks at the width of a phone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import MISSING, Browser, browser
from test_web import EVIL, begin, tell, write_status

from raylora import control
from raylora.store.run_store import RunStore
from raylora.web.runs import Runs
from raylora.web.server import PageServer

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
WIDTHS = (1200, 420)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Any]:
    """Return a folder with a run that goes on, the run, and a server of it."""
    store = begin(tmp_path)
    server = PageServer(Runs(str(tmp_path)), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield tmp_path, store, server
    server.shutdown()
    server.server_close()


def write_history(store: RunStore, steps: int) -> None:
    rows: list[dict[str, float]] = [{"step": step, "loss": 1 / step} for step in range(1, steps + 1)]
    rows += [{"step": steps, "validation_nll": 0.4, "validation_accuracy": 0.9}]
    store.commit_checkpoint("member-000", steps, {"state.json": json.dumps({"history": rows}).encode()})


def test_the_page_follows_a_run_without_being_loaded_again(page: Browser, folder: Any, tmp_path: Path) -> None:
    _, store, server = folder
    with store.held():
        write_history(store, 10)
        write_status(store, 12, 0.25)
        page.open(f"{server.url}runs/demo/")
        page.wait_for("document.querySelectorAll('#members tbody tr').length === 2")
        page.run("window.sameDocument = true")
        assert page.run("return document.querySelector('#members tbody').innerText").count("training 12/100") == 1
        assert "host-7" in page.run("return document.querySelector('#workers').innerText")
        assert "job-01" in page.run("return document.querySelector('#queue').innerText")
        drawn = "document.querySelector('#loss polyline').getAttribute('points').split(' ').length"
        assert page.run(f"return {drawn}") == 11
        assert page.run("return [...document.querySelectorAll('#metric option')].map(o => o.textContent)") == [
            "Accuracy", "NLL"]
        write_status(store, 13, 0.2)
        page.wait_for(f"{drawn} === 12")
        tell(store, control.JobFinished("job-00", 1))
        page.wait_for("document.querySelector('#members tbody').innerText.includes('finished')")
        page.wait_for("document.querySelector('#events').innerText.includes('job-00 finished')")
        assert page.run("return window.sameDocument") is True
        assert page.complaints() == []


def test_a_run_of_evil_words_is_shown_as_text(page: Browser, folder: Any) -> None:
    _, store, server = folder
    write_status(store, 1, 0.5, news=(EVIL,))
    tell(store, control.WorkerLost("worker-0", EVIL))
    page.open(f"{server.url}runs/demo/")
    page.wait_for("document.querySelector('#events').innerText.includes('<script>')")
    assert page.run("return document.querySelectorAll('main script').length") == 0
    assert page.complaints() == []


def test_a_finished_run_has_its_report_a_click_away(page: Browser, folder: Any) -> None:
    _, store, server = folder
    tell(store, control.JobFinished("job-00", 1), control.JobFinished("job-01", 1), control.Aggregated())
    store.write_json("metrics.json", {"ensemble": {"eval": {"test": {"accuracy": 0.875, "nll": 0.25}}}})
    store.storage.write("report.html", b"<!doctype html><link rel=icon href='data:,'><h1>the report</h1>")
    page.open(server.url)
    page.wait_for("document.querySelectorAll('#runs tbody tr').length === 1")
    page.run("document.querySelector('#runs tbody a').click()")
    page.wait_for("document.querySelector('#results').innerText.includes('87.5 %')")
    page.run("document.querySelector('#links a').click()")
    page.wait_for("document.body.innerText.includes('the report')")
    assert page.complaints() == []


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_page(page: Browser, folder: Any, tmp_path: Path, width: int) -> None:
    _, store, server = folder
    write_history(store, 30)
    write_status(store, 31, 0.25)
    tell(store, control.WorkerLost("worker-0", "a-reason-without-a-space-" * 12))
    page.resize(width, 900)
    for target, shown in (("", "#runs tbody tr"), ("runs/demo/", "#loss polyline")):
        page.open(server.url + target)
        page.wait_for(f"document.querySelector('{shown}') !== null")
        assert page.run("return document.documentElement.scrollWidth") <= width
        page.screenshot(tmp_path / f"page-{width}.png")
        assert (tmp_path / f"page-{width}.png").stat().st_size > 5000


def test_the_token_of_the_address_is_remembered_and_hidden(page: Browser, tmp_path: Path) -> None:
    begin(tmp_path)
    server = PageServer(Runs(str(tmp_path / "demo")), "0.0.0.0", 0)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        here = f"http://127.0.0.1:{server.server_address[1]}/"
        page.open(f"{here}?token={server.access.token}")
        page.wait_for("document.querySelectorAll('#members tbody tr').length === 2")
        assert page.run("return location.href") == f"{here}runs/demo/"
        assert page.run("return document.cookie") == ""
    finally:
        server.shutdown()
        server.server_close()
