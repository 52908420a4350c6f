"""The files of a run's models: looked up where the driver runs, and had on every node before anything is loaded.

A model is a local folder, one that was made out of packages, or a hub's snapshot in this machine's cache. Nodes that do
not have the same files fetch them from the run's storage (``store/inputs.py``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock

from raylora.data.catalog import assets
from raylora.errors import RunDirectoryError, StoreError
from raylora.machine_cache import used
from raylora.spec import BaseSpec, RunSpec
from raylora.store.checksums import difference
from raylora.store.inputs import FILES, FOLDER, Input, Inputs, Publication, input_of, is_published
from raylora.store.node_copy import Say, kept_copy, node_copy
from raylora.store.run_store import RunStore

BASE, TEACHER = "base", "teacher"
Ask = Callable[[str], Publication]
"""Asks for an input, by its role, to be published, and says how far that is."""
_READ = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja")
"""What loading a model, its configuration and its tokenizer may read."""
_INDEX = "model.safetensors.index.json"
_POLL_S = 1.0


# --- where the driver runs ------------------------------------------------------------------------------
def record_models(spec: RunSpec, store: RunStore, run: RunStore | None = None) -> None:
    """Write down what the models of a work consist of on this machine.

    A hub's model that is not whole in this machine's cache is left out: every node gets it from the hub.

    Args:
        store: of the work; its record is what its workers go by.
        run: whose members it asks, if it is no run of its own.
    """
    bases, parent = {BASE: spec.base}, (run or store).uri.rpartition("/")[0]
    if run is None and spec.distill_from is not None and spec.distill_from.members is not None:
        bases[TEACHER] = RunStore(parent).read_spec().base
    found = {}
    for role, base in bases.items():
        folder = _folder_here(base)
        if folder is not None and list(folder.glob("*.safetensors")):
            found[role] = input_of(base.source, folder, _names(base, folder))
    Inputs(f"{parent}/{FOLDER}", found).write(store)


def check_unchanged(spec: RunSpec, store: RunStore) -> None:
    """Refuse a base that is not the one that a run was begun with; one begun before there were records is not asked.

    Raises:
        RunDirectoryError: naming the file.
    """
    inputs, folder = Inputs.read(store), _folder_here(spec.base)
    item = inputs.by_role.get(BASE) if inputs is not None else None
    if item is None or folder is None or item.source != spec.base.source:
        return
    why = difference(folder, item.files)
    if why:
        raise RunDirectoryError(
            f"base.source: {spec.base.source} has changed since the run was begun: {why} in {folder}",
            "put it back as it was, or start a new run under another name",
        )


def with_published(spec: RunSpec, store: RunStore) -> RunSpec:
    """Return a spec that reads its base's published files where the base itself is not on this machine any more."""
    folder, inputs = spec.base.folder, Inputs.read(store)
    item = inputs.by_role.get(BASE) if inputs is not None else None
    if inputs is None or item is None or folder is None or folder.is_dir() or not is_published(inputs.store_of(item)):
        return spec
    return _holding(spec, {BASE: _copy_of(inputs, item, lambda text: None)})


# --- on every node --------------------------------------------------------------------------------------
def on_this_node(spec: RunSpec, store: RunStore, ask: Ask, say: Say = lambda text: None) -> RunSpec:
    """Return a run's spec that reads models where this node has them, fetched from the run's storage if need be.

    Args:
        store: where the work's record lies.
        say: told of what was fetched, by the process that fetched it.

    Raises:
        StoreError: an input cannot be published or fetched; the message names the node and the cure.
    """
    inputs = Inputs.read(store)
    if inputs is None:  # begun by an older version
        return spec
    return _holding(spec, {role: _held(inputs, role, spec, ask, say) for role in inputs.by_role})


def _held(inputs: Inputs, role: str, spec: RunSpec, ask: Ask, say: Say) -> Path:
    item = inputs.by_role[role]
    copy = kept_copy(item.key, item.name)
    if copy.exists():
        used(copy)
        return copy
    for place in _candidates(item, spec.base.revision):
        if place.is_dir() and not _differs(place, item):
            return place
    _wait_until_published(inputs, role, ask)
    return _copy_of(inputs, item, say)


def _candidates(item: Input, revision: str | None) -> Iterator[Path]:
    """Yield where an input may be on this node: where the driver has it, and where the caches of this node have it."""
    yield Path(item.place)
    if item.source.startswith(assets.PREFIX):
        kept = assets.kept_model(item.source.removeprefix(assets.PREFIX))
        if kept is not None:
            yield kept
    elif "/snapshots/" in item.place:
        snapshot = _snapshot(item.source, item.name)
        if snapshot is not None:
            yield snapshot


def _differs(place: Path, item: Input) -> str:
    """Return in words how a folder differs from an input; it is read by one of this node's processes at a time."""
    lock = kept_copy(item.key, item.name).parent.with_suffix(".looked-at.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            return difference(place, item.files)
    except OSError:  # a cache that cannot be written: each reads for itself
        return difference(place, item.files)


def _wait_until_published(inputs: Inputs, role: str, ask: Ask) -> None:
    if is_published(inputs.store_of(inputs.by_role[role])):
        return
    while not (said := ask(role)).is_done:
        if said.error is not None:
            raise said.error
        time.sleep(_POLL_S)


def _copy_of(inputs: Inputs, item: Input, say: Say) -> Path:
    there = inputs.store_of(item)

    def told(text: str) -> None:
        say(f"{text}: {item.source}")

    try:
        return node_copy(there.storage, FILES, item.key, item.name, told, item.files)
    except StoreError as error:
        if error.hint:
            raise
        raise StoreError(
            f"{item.source}: what was published of it cannot be used: {error.message}",
            f"delete {there.uri} and resume the run: it is published again",
        ) from error


def _holding(spec: RunSpec, folders: Mapping[str, Path]) -> RunSpec:
    there = spec.model_copy(deep=True)
    there.base.hold(folders)
    return there


# --- folders --------------------------------------------------------------------------------------------
def _folder_here(base: BaseSpec) -> Path | None:
    """Return the folder of a base's files on this machine; None for a hub's that is not whole here."""
    held = base.held()
    if held is not None:
        return held
    if base.source.startswith(assets.PREFIX):
        return assets.model_folder(base.source)
    return base.folder if base.folder is not None else _snapshot(base.source, base.revision)


def _snapshot(source: str, revision: str | None) -> Path | None:
    """Return the folder of a hub model in this machine's cache if all its weights are there; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source, "config.json", revision=revision or "main")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    index = folder / _INDEX
    wanted = {"model.safetensors"}
    if index.exists():
        wanted = set(json.loads(index.read_text())["weight_map"].values())
    return folder if all((folder / name).exists() for name in wanted) else None


def _names(base: BaseSpec, folder: Path) -> list[str]:
    patterns = (*_READ, "*.py") if base.trust_remote_code else _READ
    return sorted({path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)})
