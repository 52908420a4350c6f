"""The run directory on an S3 server: conditional writes, one holder, replaced folders, errors for people."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec.registry  # noqa: F401 - the tests take entries out of it
import pytest
from test_lock import dead_pid, race, record
from test_store import NEW, OLD, Killed, kill_remote
from typer.testing import CliRunner

from raylora.cli import app
from raylora.engine.run.plan_run import prepare
from raylora.errors import LostRunError, RunDirectoryError, StoreError, UnreachableError
from raylora.store.run_store import RunStore
from raylora.store.storage import Storage

Make = Callable[..., Any]


def test_bytes_are_written_read_listed_replaced_created_and_deleted(bucket: str) -> None:
    storage = Storage(f"{bucket}/root")
    assert storage.list() == [] and not storage.exists("x")
    storage.write("folder/one", b"1")
    assert storage.list("folder") == ["one"]
    Storage(f"{bucket}/root").write("folder/two", b"2")
    assert storage.list("folder") == ["one", "two"] and storage.list() == ["folder"]  # no listing is remembered
    storage.write("folder/one", b"11")
    assert storage.read("folder/one") == b"11"
    assert storage.create("lock", b"first") and not storage.create("lock", b"second")
    assert storage.read("lock") == b"first"
    storage.delete("folder")
    storage.delete("folder")
    assert storage.list() == ["lock"] and not storage.exists("folder")
    with pytest.raises(FileNotFoundError):
        storage.read("folder/one")


def test_a_run_at_the_top_of_a_bucket_and_markers_of_folders_are_no_trouble(bucket: str) -> None:
    storage = Storage(bucket)
    storage.fs.call_s3("put_object", Bucket=storage.root, Key="members/", Body=b"")
    storage.write("members/one", b"1")
    assert storage.list() == ["members"] and storage.list("members") == ["one"]


# --- one holder ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tries", [4, pytest.param(300, marks=pytest.mark.slow)])
def test_of_two_processes_that_race_for_a_directory_one_wins(bucket: str, tries: int) -> None:
    uris = [f"{bucket}/run-{number}" for number in range(tries)]
    dead = dead_pid()
    for uri in uris[tries // 2:]:  # half of them were held by a process that died
        Storage(uri).write("lock/000001.json", record(pid=dead))
    outcomes = race(uris)
    assert {tuple(sorted(each)) for each in outcomes[:tries // 2]} == {("1", "refused")}
    assert {tuple(sorted(each)) for each in outcomes[tries // 2:]} == {("2", "refused")}


def test_a_coordinator_that_was_taken_for_dead_commits_nothing_more(bucket: str) -> None:
    slow, uri = RunStore(f"{bucket}/run"), f"{bucket}/run"
    slow.lock()
    slow.append_event({"n": 0})
    slow.commit_checkpoint("m", 1, OLD)
    worker = RunStore(uri, slow.epoch)
    slow.storage.write("lock/000001.json", record(host="elsewhere", pid=7, heartbeat=time.time() - 3600))
    new = RunStore(uri)
    new.lock()
    assert [event["n"] for event in new.read_events()] == [0]
    for store in (slow, worker):
        for write in (lambda s: s.append_event({"n": -1}), lambda s: s.commit_checkpoint("m", 1, NEW),
                      lambda s: s.write_json("metrics.json", {}), lambda s: s.prune_checkpoints("m", 2, 1)):
            with pytest.raises(LostRunError, match="has taken this run over"):
                write(store)
    slow._log.append({"n": -2})  # it had looked just before the other came
    slow.beat()
    slow.unlock()
    new.append_event({"n": 1})
    assert [event["n"] for event in RunStore(uri).read_events()] == [0, 1]
    assert new.load_checkpoint("m", 1).files == OLD and new.storage.list("lock") == ["000001.json", "000002.json"]
    new.unlock()


# --- folders ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("before", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_kill_at_any_operation_of_a_replacement_leaves_the_old_or_the_new(bucket: str, before: bool) -> None:
    seen = []
    for number in range(1, 90):
        store, finished = RunStore(f"{bucket}/run-{number}"), False
        store.commit_result("members/member-000", {**OLD, "gone": b"x"})
        with pytest.MonkeyPatch.context() as patch:
            kill_remote(patch, store.storage.fs, number, before)
            with contextlib.suppress(Killed):
                store.commit_result("members/member-000", NEW)
                finished = True
        found = store.load_result("members/member-000")
        assert found in ({**OLD, "gone": b"x"}, NEW)
        seen.append(found == NEW)
        if finished:
            break
    assert finished and seen == sorted(seen) and set(seen) == {True, False}
    assert store.storage.list("members/member-000") == ["MANIFEST.json", *sorted(NEW)]


def test_a_reader_never_meets_a_folder_that_is_being_replaced(bucket: str) -> None:
    store = RunStore(f"{bucket}/run")
    store.commit_result("members/member-000", OLD)
    real, contents = Storage.read, [NEW, OLD, NEW]

    def read(self: Storage, relative: str) -> bytes:
        found = real(self, relative)
        if relative.endswith("MANIFEST.json") and contents:  # between a reader's manifest and its files
            with pytest.MonkeyPatch.context() as other:
                other.setattr(Storage, "read", real)
                store.commit_result("members/member-000", contents.pop(0))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "read", read)
        assert RunStore(store.uri).load_result("members/member-000") == NEW


def test_a_damaged_folder_is_made_whole_by_the_same_content(bucket: str) -> None:
    store = RunStore(f"{bucket}/run")
    store.commit_result("members/member-000", OLD)
    store.storage.write("members/member-000/a.bin", b"damaged")
    with pytest.raises(StoreError, match=r"a\.bin differs"):
        store.load_result("members/member-000")
    store.commit_result("members/member-000", OLD)
    assert store.load_result("members/member-000") == OLD


# --- errors for people -----------------------------------------------------------------------------------
def sentence(make_spec: Make, tmp_path: Path, storage_path: str) -> str:
    """Return what `raylora run` says, which exits with 2."""
    from raylora.spec import dump_spec

    file = tmp_path / "spec.yaml"
    file.write_text(dump_spec(make_spec(storage_path=storage_path)))
    done = CliRunner().invoke(app, ["run", str(file), "--local"])
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


def test_a_bucket_that_does_not_exist_is_named(bucket: str, make_spec: Make, tmp_path: Path) -> None:
    said = sentence(make_spec, tmp_path, f"{bucket}-else/runs")
    assert f"the bucket {bucket.removeprefix('s3://')}-else does not exist -> create it" in said
    prepare(make_spec(storage_path=f"{bucket}/any/where"), look=True)
    assert not Storage(bucket).list()  # looking writes nothing


def test_missing_credentials_are_said_in_one_sentence(
    bucket: str, make_spec: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        said = sentence(make_spec, tmp_path, f"{bucket}/runs")
        assert "there are no credentials for it on this machine -> set AWS_ACCESS_KEY_ID" in said
        status = CliRunner().invoke(app, ["status", f"{bucket}/runs/demo"])
        assert status.exit_code == 2 and "there are no credentials" in " ".join(status.output.split())
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(("kind", "package", "install"), [("s3", "s3fs", "raylora[s3]"), ("gs", "gcsfs", "gcsfs")])
def test_a_missing_package_is_named(
    kind: str, package: str, install: str, make_spec: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, kind, raising=False)  # what was imported before
    said = sentence(make_spec, tmp_path, f"{kind}://bucket/runs")
    assert f"a package for {kind}:// is not installed" in said and f"pip install {install}" in said


def test_a_storage_that_no_one_knows_is_named(make_spec: Make, tmp_path: Path) -> None:
    assert "no storage is called nfs4://" in sentence(make_spec, tmp_path, "nfs4://server/runs")


def test_who_waits_for_a_base_does_not_wait_for_a_bucket_that_refuses(
    bucket: str, make_spec: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raylora.engine.quantization import quantize_base
    from raylora.engine.quantization.prepared_base import store_of

    base = make_spec().base
    prepared = quantize_base.PreparedBase(store_of(base, f"{bucket}/_bases", {}), {}, None)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(prepared.store.storage.fs, "pipe_file", refuse)
    with pytest.raises(UnreachableError, match=r"access is refused \(Access Denied\)"):
        quantize_base.ensure_prepared(base, None, prepared, None)  # type: ignore[arg-type]


def test_no_run_in_a_bucket_is_an_error_that_says_so(bucket: str) -> None:
    with pytest.raises(RunDirectoryError, match="there is no run here"):
        RunStore(f"{bucket}/none").read_spec()
