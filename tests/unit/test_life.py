"""A run that nobody works on says so, and since when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from run_helpers import run, stop_at
from typer.testing import CliRunner

from raylora import control
from raylora.cli import app
from raylora.client import attach, launch
from raylora.engine.run.life import clock, lifelessness
from raylora.engine.run.roster import read_state
from raylora.errors import Interrupted, RunDirectoryError, SpecError
from raylora.store.run_store import RunStore

Make = Callable[..., Any]


@pytest.fixture
def going_on(make_spec: Make) -> RunStore:
    """Return the store of a run that began training an hour ago."""
    spec = make_spec()
    store = RunStore.for_spec(spec)
    store.write_spec(spec)
    started = control.RunStarted({"job-00": ["member-000", "member-001"]}, ["worker-0"], ["member-000"], 1, 3)
    store.append_event({**control.to_record(started), "at": time.time() - 3600})
    return store


def hold(store: RunStore, pid: int, ago_s: float) -> None:
    there = psutil.pid_exists(pid)
    content = {"host": os.uname().nodename, "pid": pid, "started_at": 0.0, "heartbeat": time.time() - ago_s,
               "process_started": psutil.Process(pid).create_time() if there else 0.0}
    store.write_json("run.lock", content)


def test_a_run_whose_process_was_killed_says_since_when(going_on: RunStore) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    hold(going_on, dead.pid, 300)
    since = clock(time.time() - 300)
    done = CliRunner().invoke(app, ["status", going_on.uri])
    said = " ".join(done.output.split())
    assert done.exit_code == 0 and f"no sign of life since {since}; resume with: raylora resume" in said
    assert since in json.loads(CliRunner().invoke(app, ["status", going_on.uri, "--json"]).stdout)["lifeless"]


def test_a_run_that_nobody_holds_says_since_its_last_event(going_on: RunStore) -> None:
    assert f"since {clock(time.time() - 3600)}" in lifelessness(going_on, read_state(going_on))


def test_a_stopped_process_is_told_from_a_dead_one(going_on: RunStore) -> None:
    hold(going_on, os.getppid(), 120)
    assert f"though process {os.getppid()}" in lifelessness(going_on, read_state(going_on))
    hold(going_on, os.getppid(), 5)
    assert not lifelessness(going_on, read_state(going_on))


@pytest.mark.slow
def test_a_run_that_has_ended_needs_no_sign(make_spec: Make) -> None:
    spec = make_spec()
    with pytest.raises(Interrupted):
        run(spec, stop_at(2))
    store = RunStore.for_spec(spec)
    assert not lifelessness(store, read_state(store))
    run(spec)
    assert not lifelessness(store, read_state(store))


def test_days_ago_are_said_with_their_date() -> None:
    assert clock(0.0).startswith(("1970-01-01", "1969-12-31")) and len(clock(time.time())) == 5


def test_attaching_where_no_cluster_is_says_so(going_on: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    hold(going_on, os.getppid(), 5)
    content = going_on.read_json("run.lock")
    going_on.write_json("run.lock", {**content, "facts": {"ray_address": "127.0.0.1:1"}})
    monkeypatch.setenv("RAY_gcs_rpc_server_connect_timeout_s", "1")
    with pytest.raises(RunDirectoryError, match="no Ray cluster"):
        attach("no-such-run")


def test_a_run_cannot_be_detached_from_a_cluster_that_ends_with_it(
    make_spec: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    spec = make_spec()
    with pytest.raises(SpecError, match="detach: a cluster that this process starts ends with it"):
        launch(spec, detach=True)
    assert not RunStore.for_spec(spec).storage.list()
