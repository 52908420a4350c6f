"""What one node has reaches the others once per node, whole or not at all, and is compared with what was recorded."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members, prepared_base, run, stop_at

from raylora.engine.model import model_files
from raylora.engine.model.base import load_base
from raylora.engine.model.checkpoint import export_name, load_tokenizer
from raylora.engine.model.model_files import on_this_node
from raylora.engine.run.plan_run import prepare
from raylora.engine.run.session import TrainingSession
from raylora.engine.training import inputs as training_inputs
from raylora.engine.training.distillation_loss import task_of
from raylora.errors import DataError, Interrupted, RunDirectoryError, StoreError
from raylora.store import checksums, commit, node_copy
from raylora.store.inputs import FILES, Input, Inputs, Publication, Publisher, input_of, publish
from raylora.store.run_store import RunStore
from raylora.store.storage import Storage

Make = Callable[..., Any]
_MB = 1 << 20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be another node: one with a cache of its own."""
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path / "node"))
    return tmp_path / "node"


def folder_of(path: Path, megabytes: int = 20) -> Path:
    path.mkdir()
    (path / "model.safetensors").write_bytes(os.urandom(_MB) * megabytes)
    (path / "config.json").write_text("{}")
    return path


def item_of(folder: Path) -> Input:
    return input_of("models/mini", folder, sorted(path.name for path in folder.iterdir()))


def equal(one: Path, two: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in two.iterdir()) and all(
        (one / name).read_bytes() == (two / name).read_bytes() for name in names
    )


_NODE = """
import sys
from raylora.store.inputs import FILES
from raylora.store.node_copy import node_copy
from raylora.store.run_store import RunStore
print("ready", flush=True)
sys.stdin.readline()
path = node_copy(RunStore(sys.argv[1]).storage, FILES, sys.argv[2], "mini", lambda text: print(text, flush=True))
print(path, flush=True)
"""


def process(there: RunStore, item: Input) -> subprocess.Popen[str]:
    found = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _NODE, there.uri, item.key], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    assert found.stdout is not None and found.stdout.readline() == "ready\n"
    return found


@pytest.fixture(params=["disk", "bucket"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    """Return where something is published: a folder, and an object store."""
    return RunStore(f"{request.getfixturevalue('bucket')}/in" if request.param == "bucket" else str(tmp_path / "in"))


def test_processes_of_a_node_fetch_once_and_a_killed_fetch_is_never_used(
    there: RunStore, tmp_path: Path, cache: Path
) -> None:
    item = item_of(folder_of(tmp_path / "mini"))
    publish(item, there)
    first = process(there, item)
    assert first.stdin is not None
    first.stdin.write("go\n")
    first.stdin.flush()
    halves = cache / "inputs" / item.key[:32]
    deadline = time.monotonic() + 20
    while not list(halves.glob(".mini.tmp-*/*")):
        assert time.monotonic() < deadline
    first.send_signal(signal.SIGKILL)
    first.communicate()
    was_killed = not (halves / "mini").exists()  # else it was too fast for us, and its copy is whole
    all_of_them = [process(there, item) for _ in range(2)]
    said = [one.communicate("go\n", timeout=60) for one in all_of_them]
    assert [one.returncode for one in all_of_them] == [0, 0], said
    lines = [line for out, _ in said for line in out.splitlines()]
    assert sum("fetched" in line for line in lines) == int(was_killed)
    assert [line for line in lines if "fetched" not in line] == [str(halves / "mini")] * 2
    assert equal(halves / "mini", tmp_path / "mini") and not list(halves.glob(".mini.tmp-*"))


def test_a_published_copy_that_is_damaged_is_refused_by_name(there: RunStore, tmp_path: Path, cache: Path) -> None:
    item = item_of(folder_of(tmp_path / "mini", 1))
    publish(item, there)
    content = there.storage.read(f"{FILES}/model.safetensors")
    there.storage.write(f"{FILES}/model.safetensors", content[:-1] + bytes([content[-1] ^ 1]))
    inputs = Inputs(there.uri.rpartition("/")[0], {"base": item})
    (there.storage.fs.mv if there.storage.is_local else there.storage.fs.copy)(
        there.storage.root, inputs.store_of(item).storage.root, recursive=True
    )
    with pytest.raises(StoreError, match="model.safetensors differs from its checksum") as caught:
        model_files._copy_of(inputs, item, lambda text: None)
    assert f"delete {inputs.store_of(item).uri} and resume" in str(caught.value)
    assert not list(cache.glob("inputs/*/mini")) and not list(cache.glob("inputs/*/.mini*"))


def test_a_published_copy_of_something_else_is_refused_and_nothing_is_written_outside_of_a_copy(
    tmp_path: Path, cache: Path
) -> None:
    item, other = item_of(folder_of(tmp_path / "mini", 1)), item_of(folder_of(tmp_path / "other", 1))
    inputs = Inputs(str(tmp_path / "in"), {"base": item})
    publish(other, inputs.store_of(item))
    with pytest.raises(StoreError, match="other files than those it is named for"):
        model_files._copy_of(inputs, item, lambda text: None)
    storage = Storage(str(tmp_path / "bad"))
    storage.write("deep/escaped", b"content")
    entries = {"../../escaped": commit.digest_of(b"content")}
    with pytest.raises(StoreError, match="lies outside of it"):
        commit.fetch(storage, "deep/a/b", entries, cache / "one/two")
    with pytest.raises(StoreError, match="is no folder's name"):
        node_copy.kept_copy("0" * 64, "../..")
    assert not list(cache.rglob("escaped")) and not list(cache.glob("inputs/*/mini"))


def test_what_the_network_damages_once_is_fetched_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, there = item_of(folder_of(tmp_path / "mini", 1)), RunStore(str(tmp_path / "in"))
    publish(item, there)
    tries: list[str] = []
    real = Storage.copy_out

    def unsteady(self: Storage, relative: str, target: Path, *rest: Any) -> str:
        tries.append(relative)
        digest = real(self, relative, target, *rest)
        return "torn" if len(tries) == 1 else digest

    monkeypatch.setattr(Storage, "copy_out", unsteady)
    copy = node_copy.node_copy(there.storage, FILES, item.key, "mini")
    assert len(tries) == 3 and equal(copy, tmp_path / "mini")


def test_a_node_with_too_little_room_says_so_before_it_fetches(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, there = item_of(folder_of(tmp_path / "mini", 1)), RunStore(str(tmp_path / "in"))
    publish(item, there)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2 * _MB, _MB, _MB))
    with pytest.raises(StoreError, match=r"0.00 GB are to be fetched .* are free in .*node") as caught:
        node_copy.node_copy(there.storage, FILES, item.key, "mini")
    assert "RAYLORA_CACHE" in caught.value.hint and not list(cache.glob("inputs/*/*mini*"))


def test_a_source_that_changes_before_it_is_published_is_refused_and_nothing_is_published(
    there: RunStore, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "mini", 1)
    item = item_of(folder)
    (folder / "model.safetensors").write_bytes(bytes(_MB))
    with pytest.raises(StoreError, match="mini/model.safetensors: has changed since the run was begun"):
        publish(item, there)
    (folder / "model.safetensors").unlink()
    with pytest.raises(StoreError, match="is gone since the run was begun"):
        publish(item, there)
    assert commit.listing_of(there.storage, FILES) is None


def test_the_publisher_answers_at_once_publishes_once_and_tries_again_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder = RunStore(str(tmp_path / "runs/demo")), folder_of(tmp_path / "mini", 1)
    item = item_of(folder)
    Inputs(str(tmp_path / "runs/_inputs"), {"base": item}).write(store)
    publisher = Publisher(store)
    (folder / "config.json").rename(folder / "away")

    def until_it_ends() -> Publication:
        while not (said := publisher.ask("base")).is_done and said.error is None:
            time.sleep(0.02)
        return said

    assert "is gone" in str(until_it_ends().error)
    (folder / "away").rename(folder / "config.json")
    assert until_it_ends() == Publication(item.size_bytes, item.size_bytes, is_done=True)
    shutil.rmtree(folder)  # from now on nobody reads it
    assert until_it_ends().is_done
    with pytest.raises(StoreError, match="names no teacher"):
        publisher.ask("teacher")


def test_a_checksum_is_known_again_until_the_file_is_touched(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_SETTLED_S", 0.0)
    file = tmp_path / "file"
    file.write_bytes(b"one")
    first = checksums.sha256_of(file)
    (known,) = (cache / "checksums").iterdir()
    known.write_text("f" * 64)
    assert checksums.sha256_of(file) == "f" * 64, "it was not read again"
    stat = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as tools do that copy times along
    assert checksums.sha256_of(file) not in (first, "f" * 64)
    known.write_text("torn")
    assert checksums.difference(tmp_path, {"file": {"size_bytes": 4, "sha256": ""}}) == "file is another file"
    assert checksums.difference(tmp_path, {"gone": {"size_bytes": 4, "sha256": ""}}) == "gone is missing"


# --- runs -----------------------------------------------------------------------------------------------
@pytest.fixture
def project(make_spec: Make, tiny_model: Callable[[str], str], tmp_path: Path) -> Any:
    """Return a spec whose model and data are in a folder that can be taken away."""
    shutil.copytree(tiny_model("bert"), tmp_path / "here/mini")
    rows = [{"text": f"film {n} is {'dull' if n % 2 else 'a joy'}", "label": n % 2} for n in range(120)]
    (tmp_path / "here/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda **changes: make_spec(
        base__source=str(tmp_path / "here/mini"), data__train={"files": str(tmp_path / "here/rows.jsonl")},
        checkpointing={"every_steps": 2}, **changes,
    )


def on_another_node(spec: Any, store: RunStore, here: Path) -> TrainingSession:
    """Load what a worker loads on a node on which the driver's folder is not."""
    publisher = Publisher(store)

    def ask(role: str) -> Publication:
        (here.parent / "away").rename(here)
        try:
            while not (said := publisher.ask(role)).is_done and said.error is None:
                time.sleep(0.02)
            return said
        finally:
            here.rename(here.parent / "away")

    here.rename(here.parent / "away")
    training_inputs._loaded.clear()  # as in another process
    try:
        session = TrainingSession(on_this_node(spec, store, ask), store, 1, 0)
        session.load()
        return session
    finally:
        (here.parent / "away").rename(here)


def test_a_worker_loads_model_and_rows_that_are_not_on_its_node(
    project: Make, tmp_path: Path, cache: Path, bucket: str
) -> None:
    spec = project(storage_path=f"{bucket}/runs")
    prepared = prepare(spec)
    prepared.begin()
    session = on_another_node(prepared.spec, prepared.store, tmp_path / "here")
    assert session.sets == prepared.sets and session.base.export_name == "mini"
    assert prepared.spec.digest() == session.spec.digest() == spec.digest()
    task = task_of(spec)
    whole = load_base(spec.base, spec.adapter, task, session.device)
    for (name, one), (_, two) in zip(
        session.base.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert one.equal(two), name
    kept = {path.parent.name for path in (cache / "inputs").rglob("*.*") if path.suffix in (".arrow", ".safetensors")}
    assert "mini" in kept and len(kept) == 2, "the model and the rows, once each"


def test_where_the_files_are_there_nothing_is_copied(project: Make, cache: Path, tmp_path: Path) -> None:
    prepared = prepare(project())
    prepared.begin()

    def ask(role: str) -> Publication:
        raise AssertionError("nothing is missing here")

    found = on_this_node(prepared.spec, prepared.store, ask)
    assert found.base.held() == tmp_path / "here/mini" and not list(cache.glob("inputs/*/mini"))
    os.utime(tmp_path / "here/mini/model.safetensors")  # another time, the same content
    assert on_this_node(prepared.spec, prepared.store, ask).base.held() == tmp_path / "here/mini"


@pytest.mark.slow
def test_a_run_is_resumed_from_what_was_published_and_equal_to_one_that_never_stopped(
    project: Make, tmp_path: Path, cache: Path
) -> None:
    spec = project()
    with pytest.raises(Interrupted):
        run(spec, stop_at(3))
    store = RunStore.for_spec(spec)
    inputs = Inputs.read(store)
    assert inputs is not None
    publish(inputs.by_role["base"], inputs.store_of(inputs.by_role["base"]))
    model = tmp_path / "here/mini"
    model.rename(tmp_path / "attic")
    run(store.spec_in_place())
    (tmp_path / "attic").rename(model)
    unbroken = spec.model_copy(update={"storage_path": str(tmp_path / "unbroken")})
    run(unbroken)
    assert_bit_equal(members(spec), members(unbroken))
    assert export_name(store.read_spec().base) == "mini"


def test_a_base_that_changed_since_the_start_is_refused_and_one_from_before_the_record_is_not(
    project: Make, tmp_path: Path
) -> None:
    spec = project()
    with pytest.raises(Interrupted):
        run(spec, stop_at(3))
    store, weights = RunStore.for_spec(spec), tmp_path / "here/mini/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunDirectoryError, match="has changed since the run was begun: model.safetensors") as caught:
        prepare(spec)
    assert "put it back as it was" in caught.value.hint
    weights.write_bytes(content)
    store.storage.delete("inputs.json")
    for note in store.storage.list("tokenized"):
        store.storage.delete(f"tokenized/{note}")
    assert prepare(spec).is_resume
    run(spec)
    unbroken = spec.model_copy(update={"storage_path": str(tmp_path / "unbroken")})
    run(unbroken)
    assert_bit_equal(members(spec), members(unbroken))


def test_rows_that_are_damaged_where_their_text_is_not_are_said_to_be_made_again(
    project: Make, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = prepare(project())
    prepared.begin()
    (rows,) = (tmp_path / "runs/tokenized").glob("*/000.arrow")
    rows.write_bytes(rows.read_bytes()[:-7])
    with caplog.at_level(logging.ERROR), pytest.raises(StoreError, match="are damaged or missing") as caught:
        on_another_node(prepared.spec, prepared.store, tmp_path / "here")
    assert "no such file" in str(caught.value) and "resume the run" in caught.value.hint
    assert isinstance(caught.value.__cause__, DataError)
    training_inputs._loaded.clear()
    prepare(project()).begin()
    assert RunStore(str(tmp_path / "runs/tokenized")).has_result(rows.parent.name)


def test_a_hub_model_that_is_whole_in_the_drivers_cache_is_an_input_and_one_that_is_not_is_left_to_the_hub(
    make_spec: Make, tiny_model: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, commit_name = tmp_path / "hub/models--people--mini", "0" * 40
    shutil.copytree(tiny_model("bert"), hub / "snapshots" / commit_name)
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text(commit_name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    spec = make_spec(base__source="people/mini")
    store = RunStore.for_spec(spec)
    model_files.record_models(spec, store)
    inputs = Inputs.read(store)
    assert inputs is not None and inputs.by_role["base"].name == commit_name
    found = on_this_node(spec, store, lambda role: pytest.fail("it is here"))
    assert found.base.held() == hub / "snapshots" / commit_name
    assert export_name(found.base) == "people/mini"
    assert load_tokenizer(found.base, task_of(spec)).vocab_size
    (hub / "snapshots" / commit_name / "model.safetensors").unlink()
    model_files.record_models(spec, store)
    again = Inputs.read(store)
    assert again is not None and not again.by_role


def test_a_prepared_base_in_a_bucket_is_fetched_once_and_mapped_whatever_it_is_computed_in(
    make_spec: Make, bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rtn = {"kind": "rtn", "bits": 4, "group_size": 32}
    fetched: list[str] = []
    real = Storage.copy_out

    def counted(self: Storage, relative: str, *rest: Any) -> str:
        fetched.append(relative)
        return real(self, relative, *rest)

    monkeypatch.setattr(Storage, "copy_out", counted)

    def loaded(dtype: str, storage: str) -> Any:
        spec = make_spec(base__quantization=rtn, base__dtype=dtype, storage_path=storage)
        task = task_of(spec)
        return load_base(spec.base, spec.adapter, task, torch.device("cpu"), prepared_base(spec, task))

    there, again, here = (
        loaded("bfloat16", f"{bucket}/runs"), loaded("float32", f"{bucket}/runs"),
        loaded("float32", str(tmp_path / "local")),
    )
    assert sorted(fetched) == sorted(
        f"blocks/block-{n:03d}/{name}" for n in range(2) for name in ("facts.json", "layers.safetensors")
    )
    assert there.dtype is torch.bfloat16
    for one, two in zip(again.model.state_dict().items(), here.model.state_dict().items(), strict=True):
        assert one[0] == two[0] and (one[1].equal(two[1]) or "classifier" in one[0]), one[0]
