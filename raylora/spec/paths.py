"""The local files and folders that a spec names: where they are now, wherever the spec was written or has been moved.

In a spec a path stands as its author wrote it, and is part of what the run is. Where it leads is no part of that: it is
looked up when a run is begun, recorded beside the spec, and looked up again when the run is opened elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from raylora.spec.base import Located
from raylora.spec.run import RunSpec


class Place(TypedDict):
    """Where a path led when a run was begun."""

    absolute: str
    relative: str | None
    """From the run directory, which may have been moved together with it; None if that is no local folder."""


def places_here(spec: RunSpec) -> dict[str, str]:
    """Return the spec's local paths as they are written -> where they are, seen from the current folder.

    What is known from an earlier call stays; what is not there is left out, for whoever reads it to say so.
    """
    here = {path: known.get(path) or os.path.abspath(Path(path).expanduser()) for known, path in _paths(spec)}
    known_paths = {path for known, path in _paths(spec) if path in known}
    return {path: place for path, place in here.items() if path in known_paths or os.path.exists(place)}


def local_paths(spec: RunSpec) -> list[str]:
    """Return the files and folders of this machine that a spec names, as they are written."""
    return sorted({path for _, path in _paths(spec) if "://" not in path})


def beside(spec: RunSpec, folder: Path) -> RunSpec:
    """Return the same spec that looks beside its own file for what is not to be found from the current folder."""
    there = {path: os.path.abspath(folder / Path(path).expanduser()) for _, path in _paths(spec)}
    bases = {spec.base.source} if (folder / spec.base.source).is_dir() else set()
    there |= {path: os.path.abspath(folder / path) for path in bases}
    return located(spec, {
        path: place for path, place in there.items() if not Path(path).expanduser().exists() and os.path.exists(place)
    })


def located(spec: RunSpec, places: Mapping[str, str]) -> RunSpec:
    """Return the same spec that looks for its paths in these places; its digest stays what it was."""
    there = spec.model_copy(deep=True)
    for part in _parts(there):
        part.look_in(places)
    return there


def recorded(places: Mapping[str, str], run: str | None) -> dict[str, Place]:
    """Return what is written down of places, for a run directory that may be moved; None for one that is not local."""
    return {
        path: {"absolute": place, "relative": os.path.relpath(place, run) if run is not None else None}
        for path, place in places.items()
    }


def found_again(record: Mapping[str, Place], run: str | None) -> dict[str, str]:
    """Return where recorded paths are now: where they were, else as far from the run as they were, if there at all."""
    return {path: _found(place, run) for path, place in record.items()}


def _found(place: Place, run: str | None) -> str:
    if os.path.exists(place["absolute"]) or run is None or place["relative"] is None:
        return place["absolute"]
    moved = os.path.normpath(os.path.join(run, place["relative"]))
    return moved if os.path.exists(moved) else place["absolute"]


def _paths(spec: RunSpec) -> Iterator[tuple[Mapping[str, str], str]]:
    return ((part.places, path) for part in _parts(spec) for path in part.local_paths())


def _parts(value: Any) -> Iterator[Located]:
    if isinstance(value, Located):
        yield value
    if hasattr(type(value), "model_fields"):
        for name in type(value).model_fields:
            yield from _parts(getattr(value, name))
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _parts(one)
