"""The run directory: all-or-nothing commits, damage that is noticed, one writer, any file system."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from raylora.errors import RunDirectoryError, StoreError
from raylora.store import commit
from raylora.store import storage as storage_module
from raylora.store.run_store import RunStore
from raylora.store.storage import Storage

OLD = {"a.bin": b"old " * 50, "b.json": b"{}"}
NEW = {"a.bin": b"new " * 60, "b.json": b'{"x": 1}'}


# --- bytes at paths --------------------------------------------------------------------------------------
def test_what_is_written_is_read_listed_replaced_and_deleted(storage: Storage) -> None:
    assert storage.list() == [] and not storage.exists("x")
    storage.write("folder/one", b"1")
    storage.write("folder/two", b"2")
    storage.write("folder/one", b"11")
    assert storage.read("folder/one") == b"11" and storage.list("folder") == ["one", "two"]
    assert storage.list() == ["folder"]
    storage.delete("folder/one")
    storage.delete("folder/one")
    assert storage.list("folder") == ["two"]
    with pytest.raises(FileNotFoundError):
        storage.read("folder/one")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "..", "a/../..", "x\0y"])
@pytest.mark.parametrize("method", ["read", "write", "delete", "list", "append", "create", "exists"])
def test_no_path_leaves_the_root(storage: Storage, path: str, method: str) -> None:
    arguments = (b"x",) if method in ("write", "append", "create") else ()
    with pytest.raises(StoreError, match="leaves the run directory"):
        getattr(storage, method)(path, *arguments)


def test_create_succeeds_once(storage: Storage) -> None:
    assert storage.create("lock", b"first") and not storage.create("lock", b"second")
    assert storage.read("lock") == b"first" and storage.list() == ["lock"]


def test_a_full_disk_says_so_and_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write("file", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"no space left for .*file: 7 bytes") as caught:
        storage.write("file", b"new one")
    assert "free some and resume" in str(caught.value)
    with pytest.raises(StoreError, match="no space left"):
        storage.append("log", b"line\n")
    monkeypatch.undo()
    assert storage.read("file") == b"old" and [n for n in storage.list() if "tmp" in n] == []


# --- all-or-nothing folders ------------------------------------------------------------------------------
def test_a_commit_is_read_back_whole(storage: Storage) -> None:
    commit.commit(storage, "step", OLD)
    assert commit.load(storage, "step") == OLD
    commit.commit(storage, "step", {"only": b"x"})
    assert commit.load(storage, "step") == {"only": b"x"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "missing", "manifest", "no manifest"])
def test_every_damage_is_noticed(storage: Storage, damage: str) -> None:
    commit.commit(storage, "step", OLD)
    content = storage.read("step/a.bin")
    if damage == "flip":
        storage.write("step/a.bin", bytes([content[0] ^ 1]) + content[1:])
    elif damage == "truncate":
        storage.write("step/a.bin", content[:-1])
    elif damage == "grow":
        storage.write("step/a.bin", content + b"x")
    elif damage == "missing":
        storage.delete("step/a.bin")
    elif damage == "manifest":
        storage.write("step/MANIFEST.json", storage.read("step/MANIFEST.json")[:-9])
    else:
        storage.delete("step/MANIFEST.json")
    assert not commit.is_committed(storage, "step")
    with pytest.raises(StoreError, match=r"a\.bin|manifest"):
        commit.load(storage, "step")


class Killed(BaseException):
    """Not an Exception: no handler may swallow it, as none could swallow a SIGKILL."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int, before: bool) -> dict[str, int]:
    """Make the n-th file operation the last one: nothing after it happens, no clean-up either."""
    count = {"calls": 0}

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count["calls"] += 1
            if count["calls"] > number or before and count["calls"] == number:
                raise Killed
            result = function(*arguments, **options)
            if count["calls"] == number:
                raise Killed
            return result

        return call

    for name in ("replace", "rename", "fsync", "makedirs", "unlink", "link"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    monkeypatch.setattr(storage_module, "exchange", wrap(storage_module.exchange))
    monkeypatch.setattr(shutil, "rmtree", wrap(shutil.rmtree))
    return count


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("replaced", ["nothing", "exchanged", "in place"])
def test_a_kill_at_any_file_operation_never_leaves_a_loadable_half(
    tmp_path: Path, before: bool, replaced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if replaced == "in place":
        monkeypatch.setattr(storage_module, "exchange", lambda one, other: False)
    finished = False
    for number in range(1, 90):
        store = RunStore(str(tmp_path / f"run-{number}-{before}"))
        store.commit_checkpoint("member-000", 100, OLD)
        if replaced != "nothing":
            store.commit_checkpoint("member-000", 200, {"a.bin": b"replaced"})
        with pytest.MonkeyPatch.context() as patch:
            count = kill_at(patch, number, before)
            try:
                store.commit_checkpoint("member-000", 200, NEW)
                store.prune_checkpoints("member-000", 200, 2)
                finished = True
            except Killed:
                assert count["calls"] >= number
        steps = store.checkpoint_steps("member-000")
        assert steps in ([100], [100, 200]) if replaced == "nothing" else steps == [100, 200]
        assert store.load_checkpoint("member-000", 100).files == OLD
        if 200 in steps:
            allowed = [NEW] if replaced == "nothing" else [NEW, {"a.bin": b"replaced"}]
            assert store.load_checkpoint("member-000", 200).files in allowed
        assert not [n for n in store.storage.list("checkpoints/member-000") if ".tmp-" in n]
        store.commit_checkpoint("member-000", 200, NEW)
        assert store.load_checkpoint("member-000", 200).files == NEW
        assert sorted(os.listdir(tmp_path / f"run-{number}-{before}/checkpoints/member-000/step-000200")) == [
            "MANIFEST.json", *sorted(NEW)
        ]
        if finished:
            break
    assert finished and number > 8


def kill_remote(patch: pytest.MonkeyPatch, fs: Any, number: int, before: bool) -> dict[str, int]:
    """Make the n-th operation on an fsspec file system the last one."""
    count = {"calls": 0}

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(fs, name)

        def call(*arguments: Any, **options: Any) -> Any:
            count["calls"] += 1
            if count["calls"] > number or before and count["calls"] == number:
                raise Killed
            result = real(*arguments, **options)
            if count["calls"] == number:
                raise Killed
            return result

        return call

    for name in ("pipe_file", "cat_file", "ls", "exists", "rm"):
        patch.setattr(fs, name, wrap(name))  # on the object: s3fs gives each its own
    return count


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("replaced", [True, False])
def test_a_kill_at_any_operation_on_an_object_store_never_leaves_a_loadable_half(before: bool, replaced: bool) -> None:
    memory, seen = fsspec.filesystem("memory"), []
    for number in range(1, 90):
        store = RunStore(f"memory://{uuid.uuid4().hex}/run")
        store.commit_checkpoint("m", 100, OLD)
        if replaced:
            store.commit_checkpoint("m", 200, {**OLD, "c.bin": b"gone"})
        finished = False
        with pytest.MonkeyPatch.context() as patch:
            kill_remote(patch, store.storage.fs, number, before)
            with contextlib.suppress(Killed):
                store.commit_checkpoint("m", 200, NEW)
                finished = True
        steps = store.checkpoint_steps("m")
        assert steps == [100, 200] if replaced else steps in ([100], [100, 200])
        assert store.load_checkpoint("m", 100).files == OLD
        if 200 in steps:
            found = store.load_checkpoint("m", 200).files
            assert found in ([NEW, {**OLD, "c.bin": b"gone"}] if replaced else [NEW])
            seen.append(found == NEW)
        store.commit_checkpoint("m", 200, NEW)
        assert store.load_checkpoint("m", 200).files == NEW
        assert store.storage.list("checkpoints/m/step-000200") == ["MANIFEST.json", *sorted(NEW)]
        if finished:
            break
    memory.store.clear()
    assert finished and number > 4 and seen == sorted(seen) and set(seen) == ({True, False} if replaced else {True})


# --- checkpoints -----------------------------------------------------------------------------------------
def test_old_checkpoints_are_pruned_and_so_are_those_of_an_abandoned_future(storage: Storage) -> None:
    store = RunStore(storage.uri)
    for step in (2, 4, 6, 8):
        store.commit_checkpoint("m", step, OLD)
        store.prune_checkpoints("m", step, 2)
    assert store.checkpoint_steps("m") == [6, 8]
    storage.write("checkpoints/m/step-000008/a.bin", b"damaged")
    assert store.checkpoint_steps("m") == [6]
    store.commit_checkpoint("m", 7, NEW)
    store.prune_checkpoints("m", 7, 1)
    assert store.checkpoint_steps("m") == [7] and storage.list("checkpoints/m") == ["step-000007"]


def test_steps_stay_in_order_beyond_a_million(storage: Storage) -> None:
    store = RunStore(storage.uri)
    for step in (999_999, 1_000_000):
        store.commit_checkpoint("m", step, OLD)
        store.prune_checkpoints("m", step, 1)
    assert store.checkpoint_steps("m") == [1_000_000]


# --- events ----------------------------------------------------------------------------------------------
def test_events_are_read_in_order_and_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    storage = store.storage
    assert store.read_events() == [] and not store.has_events()
    for number in range(3):
        store.append_event({"event": "WorkerReady", "worker": str(number)})
    whole = storage.read("events.jsonl")
    assert [e["worker"] for e in store.read_events()] == ["0", "1", "2"]
    for cut in range(1, len(whole) // 3):
        storage.write("events.jsonl", whole[:-cut])
        assert [e["worker"] for e in store.read_events()] == ["0", "1"]


def test_an_event_after_a_torn_line_is_not_glued_to_it(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    store.append_event({"n": 0})
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"n": 1, "ev')
    store.append_event({"n": 2})
    store.append_event({"n": 3})
    assert [e["n"] for e in store.read_events()] == [0, 2, 3]


def test_a_damaged_line_inside_the_log_is_refused_by_its_number(storage: Storage) -> None:
    storage.write("events.jsonl", b'{"n": 0}\nnonsense\n{"n": 2}\n')
    with pytest.raises(StoreError, match=r"events\.jsonl:2"):
        RunStore(storage.uri).read_events()


# --- spec ------------------------------------------------------------------------------------------------
def test_a_directory_belongs_to_one_spec(storage: Storage, make_spec: Callable[..., Any]) -> None:
    store, spec = RunStore(storage.uri), make_spec()
    assert store.check_spec(spec) is False
    store.write_spec(spec)
    assert store.check_spec(spec) is True and store.read_spec() == spec
    other = make_spec(optimization__lr=0.001, adapter__rank=2)
    with pytest.raises(RunDirectoryError) as caught:
        store.check_spec(other)
    assert "optimization.lr: 0.005 -> 0.001" in str(caught.value) and "adapter.rank: 4 -> 2" in str(caught.value)


def test_another_name_or_place_is_the_same_spec(tmp_path: Path, make_spec: Callable[..., Any]) -> None:
    store = RunStore(str(tmp_path))
    store.write_spec(make_spec())
    assert store.check_spec(make_spec(name="other", storage_path="/elsewhere")) is True


def test_a_folder_with_other_things_is_refused(storage: Storage, make_spec: Callable[..., Any]) -> None:
    storage.write("thesis.tex", b"x")
    with pytest.raises(RunDirectoryError, match=r"thesis\.tex"):
        RunStore(storage.uri).check_spec(make_spec())


def test_no_run_is_an_error_that_says_so(storage: Storage) -> None:
    with pytest.raises(RunDirectoryError, match="there is no run here"):
        RunStore(storage.uri).read_spec()


def test_json_keeps_numbers_and_refuses_what_json_has_not(storage: Storage) -> None:
    store = RunStore(storage.uri)
    store.write_json("metrics.json", {"nll": 0.25})
    assert store.read_json("metrics.json") == {"nll": 0.25} and store.read_json("none.json") is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json("metrics.json", {"nll": float("nan")})
    assert store.read_json("metrics.json") == {"nll": 0.25}
