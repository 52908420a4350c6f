"""Read everything that a run has committed and say of each part whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from raylora.engine.model.quantized_layers import SUMMARY, prepared_store
from raylora.engine.run.roster import read_roster
from raylora.errors import RayloraError
from raylora.store.run_store import RunStore
from raylora.store.seal import Seal, read_seal

_FOLDERS = ("members", "baselines", "predictions", "snapshots", "targets", "export")


@dataclass(frozen=True)
class Part:
    """Something that was committed, and what is the matter with it; nothing if it is whole."""

    place: str
    problem: str = ""


def verify_run(run: str) -> list[Part]:
    """Return every part of a run directory, of its prepared base and of the students inside it.

    Raises:
        RunDirectoryError: there is no run.
        SpecError: its spec cannot be read.
    """
    store = RunStore(run)
    store.read_spec()
    return list(_parts(store, ""))


def _parts(store: RunStore, within: str) -> Iterator[Part]:
    seal, problem = _seal_of(store)
    if problem:
        yield Part(f"{within}MANIFEST.json", problem)
    try:
        store.read_events()
        yield Part(f"{within}events.jsonl", "" if store.has_events() else "is missing")
    except RayloraError as error:
        yield Part(f"{within}events.jsonl", f"is damaged: {error.message}")
    for name in seal.single_files() if seal is not None else ():
        yield Part(within + name, seal.damage_of(store.storage, name) if seal is not None else "")
    for folder in sorted({*_committed(store), *(seal.folders() if seal is not None else ())}):
        damage = store.damage_of(folder) or (seal.damage_of(store.storage, folder) if seal is not None else "")
        yield Part(within + folder, damage)
    yield from _members(store, within)
    yield from _base(store, within)
    for name in store.storage.list():
        if store.storage.exists(f"{name}/spec.yaml"):
            yield from _parts(RunStore(f"{store.uri}/{name}"), f"{within}{name}/")


def _seal_of(store: RunStore) -> tuple[Seal | None, str]:
    try:
        return read_seal(store.storage), ""
    except ValueError:
        return None, "is damaged: it cannot be read"


def _committed(store: RunStore) -> Iterator[str]:
    """Yield the committed folders that are there now."""
    nested = [f"checkpoints/{unit}" for unit in store.storage.list("checkpoints")]
    nested += [f"targets/{key}/shards" for key in store.storage.list("targets")]
    for parent in (*(folder for folder in _FOLDERS if folder != "targets"), *nested):
        for name in store.storage.list(parent):
            if ".tmp-" not in name:
                yield f"{parent}/{name}"


def _members(store: RunStore, within: str) -> Iterator[Part]:
    """Yield the members that the run should have and that lie nowhere."""
    try:
        roster = read_roster(store)
    except RayloraError:  # its log is damaged, which is said already
        return
    there = set(store.storage.list("members"))
    for name, why in {**roster.lost, **roster.unfinished}.items():
        if name not in there:
            yield Part(f"{within}members/{name}", why)


def _base(store: RunStore, within: str) -> Iterator[Part]:
    """Yield the prepared base that the run stands on, if it has one."""
    try:
        base = prepared_store(store)
    except (RayloraError, json.JSONDecodeError) as error:
        yield Part(f"{within}base.json", f"is damaged: {error}")
        return
    if base is None:
        return
    where = f"_bases/{base.uri.rpartition('/')[2]}"
    if not base.storage.exists(SUMMARY):
        yield Part(where, "is missing, or was not prepared to the end")
    for parent in (SUMMARY, *(f"blocks/{name}" for name in base.storage.list("blocks"))):
        if base.storage.exists(parent) and ".tmp-" not in parent:
            yield Part(f"{where}/{parent}", base.damage_of(parent))
