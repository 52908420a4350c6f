"""One writer per run directory: taking it is a race with one winner, and whoever lost it writes nothing more."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from raylora.errors import LostRunError, RunDirectoryError
from raylora.store import commit
from raylora.store.lock import Lock
from raylora.store.run_store import RunStore
from raylora.store.storage import Storage

FILES = {"a.bin": b"content"}


def record(**changes: Any) -> bytes:
    now = time.time()
    theirs = {"host": socket.gethostname(), "pid": os.getppid(), "started_at": now, "heartbeat": now}
    return json.dumps({**theirs, **changes}).encode()


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def names(storage: Storage) -> list[str]:
    return storage.list("lock")


# --- taking it -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["lock/000003.json", "run.lock"])
def test_a_living_holder_is_named_and_kept(storage: Storage, name: str) -> None:
    storage.write(name, record())
    before = storage.read(name)
    with pytest.raises(RunDirectoryError, match=f"process {os.getppid()} on {socket.gethostname()}"):
        RunStore(storage.uri).lock()
    RunStore(storage.uri).unlock()
    assert storage.read(name) == before and RunStore(storage.uri).holder() is not None


@pytest.mark.parametrize("name", ["lock/000003.json", "run.lock"])
@pytest.mark.parametrize("stale", ["dead", "silent host", "torn", "empty", "a list"])
def test_a_stale_lock_is_taken_over_under_a_new_number(storage: Storage, stale: str, name: str) -> None:
    content = {
        "dead": record(pid=dead_pid()), "silent host": record(host="elsewhere", heartbeat=time.time() - 3600),
        "torn": b"{", "empty": b"", "a list": b"[1]",
    }[stale]
    storage.write(name, content)
    store = RunStore(storage.uri)
    store.lock()
    assert store.epoch == (4 if name.startswith("lock") else 1)
    holder = RunStore(storage.uri).holder()
    assert holder is not None and (holder.pid, holder.is_alive) == (os.getpid(), True)
    if name.startswith("lock"):
        assert storage.read(name) == content  # what was taken over is not touched
    store.unlock()
    assert RunStore(storage.uri).holder() is None and store.epoch is None


def test_a_holder_on_another_host_that_beats_is_alive(storage: Storage) -> None:
    storage.write("lock/000001.json", record(host="elsewhere", pid=1))
    with pytest.raises(RunDirectoryError, match="process 1 on elsewhere"):
        RunStore(storage.uri).lock()


def test_every_taking_has_a_higher_number_and_giving_up_keeps_it(storage: Storage) -> None:
    seen = []
    for _ in range(3):
        store = RunStore(storage.uri)
        with store.held({"ray_address": "somewhere"}):
            seen.append(store.epoch)
            holder = RunStore(storage.uri).holder()
            assert holder is not None and holder.facts == {"ray_address": "somewhere"}
    assert seen == [1, 2, 3] and names(storage) == ["000001.json", "000002.json", "000003.json"]
    assert not RunStore(storage.uri).is_begun()  # a lock is no run, and no foreign file


def test_a_taking_whose_answer_was_lost_and_that_was_sent_again_succeeds(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Storage.create

    def twice(self: Storage, relative: str, content: bytes) -> bool:
        real(self, relative, content)
        return real(self, relative, content)

    monkeypatch.setattr(Storage, "create", twice)
    assert Lock(storage).take() == 1


def test_a_storage_without_conditional_writes_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}/root")
    Lock(storage).take()
    assert "writes over" not in caplog.text
    real = storage.fs.pipe_file
    monkeypatch.setattr(storage.fs, "pipe_file", lambda path, value, mode="overwrite": real(path, value))
    Lock(storage).take()  # it takes the condition and does not heed it, as old S3 servers do
    assert "no two processes begin or resume one run at the same moment" in caplog.text
    monkeypatch.setattr(storage.fs, "pipe_file", lambda path, value: real(path, value))
    assert Lock(storage).take() == 3  # it knows no condition: what is there is looked at first
    assert not storage.create("lock/000003.json", b"another") and storage.create("other", b"x")
    fsspec.filesystem("memory").store.clear()


RACE = """
import sys, time
from raylora.errors import RunDirectoryError
from raylora.store.run_store import RunStore
print("ready", flush=True)
for line in sys.stdin:
    store = RunStore(line.strip())
    try:
        store.lock()
        print(store.epoch, flush=True)
    except RunDirectoryError:
        print("refused", flush=True)
"""


def race(uris: list[str], processes: int = 2) -> list[list[str]]:
    """Return what each process says that tries to take each of these directories at the same time."""
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    outcomes = []
    try:
        for racer in racers:
            assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
        for number, uri in enumerate(uris):
            for racer in racers if number % 2 else reversed(racers):  # who is told first has a head start
                assert racer.stdin is not None
                racer.stdin.write(uri + "\n")
                racer.stdin.flush()
            outcomes.append([racer.stdout.readline().strip() for racer in racers if racer.stdout is not None])
    finally:
        for racer in racers:
            racer.communicate(timeout=30)
    return outcomes


def test_of_two_processes_that_race_for_a_directory_one_wins(tmp_path: Path) -> None:
    uris = [str(tmp_path / f"{number}") for number in range(150)]
    dead = dead_pid()
    for uri in uris[75:]:  # half of them were held by a process that died
        Storage(uri).write("lock/000001.json", record(pid=dead))
    outcomes = race(uris)
    assert {tuple(sorted(each)) for each in outcomes[:75]} == {("1", "refused")}
    assert {tuple(sorted(each)) for each in outcomes[75:]} == {("2", "refused")}


# --- heartbeats ------------------------------------------------------------------------------------------
def test_a_beat_renews_the_own_record_only(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(storage.uri)
    store.lock()
    before = json.loads(storage.read("lock/000001.json"))
    store.beat()
    after = json.loads(storage.read("lock/000001.json"))
    assert after.pop("heartbeat") >= before.pop("heartbeat") and before == after


def test_a_late_beat_does_not_bring_back_a_holder_that_was_replaced(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = RunStore(storage.uri)
    slow.lock()
    storage.write("lock/000002.json", record())
    slow.beat()
    monkeypatch.setattr(Lock, "is_lost", lambda self: False)  # it had looked just before the other came
    slow.beat()
    slow.unlock()
    holder = RunStore(storage.uri).holder()
    assert holder is not None and holder.pid == os.getppid()
    with pytest.raises(RunDirectoryError, match=f"process {os.getppid()}"):
        RunStore(storage.uri).lock()


def test_the_heart_goes_on_after_a_beat_that_failed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("raylora.store.run_store._BEAT_S", 0.01)
    beats, enough = [], threading.Event()

    def beat(self: Lock) -> None:
        beats.append(1)
        if len(beats) == 3:
            enough.set()
        if len(beats) == 1:
            raise OSError("the network is gone for a moment")

    monkeypatch.setattr(Lock, "beat", beat)
    with RunStore(storage.uri).held():
        assert enough.wait(5)
    assert "no heartbeat: the network is gone" in caplog.text


# --- fencing ---------------------------------------------------------------------------------------------
def replaced(storage: Storage) -> RunStore:
    """Return the store of a holder that was taken for dead while it did its work."""
    slow = RunStore(storage.uri)
    slow.lock()
    slow.commit_checkpoint("m", 1, FILES)
    slow.append_event({"event": "one"})
    storage.write("lock/000002.json", record())
    return slow


WRITES: dict[str, Callable[[RunStore], object]] = {
    "an event": lambda store: store.append_event({"event": "late"}),
    "a checkpoint": lambda store: store.commit_checkpoint("m", 2, FILES),
    "a replaced checkpoint": lambda store: store.commit_checkpoint("m", 1, {"a.bin": b"late"}),
    "a result": lambda store: store.commit_result("members/member-000", FILES),
    "pruning": lambda store: store.prune_checkpoints("m", 5, 1),
    "discarding": lambda store: store.discard_checkpoints("m"),
    "metrics": lambda store: store.write_json("metrics.json", {}),
    "the seal": lambda store: store.seal(["member-000"]),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("who", ["the coordinator", "its worker"])
def test_who_was_replaced_writes_nothing_more_and_is_told_by_whom(storage: Storage, write: str, who: str) -> None:
    slow = replaced(storage)
    store = slow if who == "the coordinator" else RunStore(storage.uri, slow.epoch)
    before = {path: storage.read(path) for path in everything(storage)}
    with pytest.raises(LostRunError, match=f"process {os.getppid()} on {socket.gethostname()} has taken this run over"):
        WRITES[write](store)
    assert {path: storage.read(path) for path in everything(storage)} == before


def test_a_worker_writes_for_the_holder_that_started_it(storage: Storage) -> None:
    coordinator = RunStore(storage.uri)
    coordinator.lock()
    RunStore(storage.uri, coordinator.epoch).commit_result("members/member-000", FILES)
    RunStore(storage.uri).commit_result("predictions/member-000", FILES)
    assert commit.epoch_of(storage, "members/member-000") == 1
    assert commit.epoch_of(storage, "predictions/member-000") is None
    assert commit.epoch_of(storage, "members/member-001") is None


def test_who_is_replaced_in_the_middle_of_a_commit_does_not_publish_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = RunStore(storage.uri)
    slow.lock()
    real = Storage.write

    def write(self: Storage, relative: str, content: bytes) -> None:
        real(self, relative, content)
        if relative.endswith("a.bin"):
            real(self, "lock/000002.json", record())

    monkeypatch.setattr(Storage, "write", write)
    with pytest.raises(LostRunError):
        slow.commit_result("members/member-000", FILES)
    assert not RunStore(storage.uri).has_result("members/member-000")


def test_the_same_content_is_known_again_whoever_committed_it(storage: Storage) -> None:
    found = []
    for _ in range(2):
        store = RunStore(storage.uri)
        store.lock()
        store.commit_result("members/member-000", FILES)
        found.append(storage.read("members/member-000/MANIFEST.json"))
        store.unlock()
    assert found[0] != found[1] and commit.identity_of(found[0]) == commit.identity_of(found[1])
    store.commit_result("members/member-000", FILES)
    plain = storage.read("members/member-000/MANIFEST.json")  # as manifests were before holders were numbered
    assert commit.identity_of(plain) == commit.digest_of(plain) == commit.identity_of(found[0])


def everything(storage: Storage) -> list[str]:
    found = (str(path).removeprefix(storage.root).lstrip("/") for path in storage.fs.find(storage.root))
    return [path for path in found if not path.startswith("lock/")]


def test_a_lock_sweeps_what_a_killed_run_left(storage: Storage) -> None:
    leftovers = ["members/member-000.tmp-1a/x", "snapshots/epoch-001.tmp-2b/x", "timing/job-00.json.tmp-3c",
                 "checkpoints/member-000/step-000002.tmp-4d/x", "metrics.json.tmp-5e"]
    for name in leftovers:
        storage.write(name, b"half")
    storage.write("members/member-001/x", b"whole")
    RunStore(storage.uri).lock()
    assert not [name for name in leftovers if storage.exists(name)]
    assert storage.read("members/member-001/x") == b"whole"
