"""The seal of a finished run: its members by name, and the checksum of everything that it committed.

A folder's own manifest tells a damaged file from a whole one. The seal tells a missing folder, or one that was put in
its place, from what the run wrote: it holds the checksum of every manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylora.store import commit
from raylora.store.storage import Storage

_NAME = "MANIFEST.json"
_FILES = ("spec.yaml", "paths.json", "data.json", "base.json", "metrics.json")
_FOLDERS = ("members", "baselines", "predictions", "snapshots")


@dataclass(frozen=True)
class Seal:
    """What a run consisted of when it ended."""

    members: tuple[str, ...]
    files: Mapping[str, Mapping[str, Any]]
    """Path in the run directory -> size and SHA-256."""

    def folders(self) -> list[str]:
        """Return the committed folders."""
        suffix = f"/{commit.MANIFEST}"
        return [path.removesuffix(suffix) for path in self.files if path.endswith(suffix)]

    def single_files(self) -> list[str]:
        """Return the files that belong to no folder."""
        return [path for path in self.files if "/" not in path]

    def damage_of(self, storage: Storage, path: str) -> str:
        """Return why a sealed file, or a sealed folder's manifest, is not what was sealed; nothing if it is."""
        manifest = f"{path}/{commit.MANIFEST}"
        if path not in self.files and manifest not in self.files:
            return ""
        file = path if path in self.files else manifest
        try:
            content = storage.read(file)
        except FileNotFoundError:
            return "is missing"
        if _digest(file, content) == self.files[file]:
            return ""
        return "is damaged: it differs from its checksum" if file == path else "is not what the run committed"


def seal(storage: Storage, members: Sequence[str]) -> None:
    """Write the seal of everything that a run has committed; an earlier one is replaced."""
    files = [name for name in _FILES if storage.exists(name)]
    for folder in _FOLDERS:
        names = (name for name in storage.list(folder) if ".tmp-" not in name)
        files += [f"{folder}/{name}/{commit.MANIFEST}" for name in names]
    listing = {name: _digest(name, storage.read(name)) for name in files if storage.exists(name)}
    content = json.dumps({"members": list(members), "files": listing}, indent=1, sort_keys=True)
    storage.write(_NAME, content.encode())


def _digest(path: str, content: bytes) -> dict[str, Any]:
    """Return a file's digest; of a manifest that of what it names, not of who committed it."""
    return commit.identity_of(content) if path.endswith(f"/{commit.MANIFEST}") else commit.digest_of(content)


def read_seal(storage: Storage) -> Seal | None:
    """Return a run's seal, or None if it has not ended yet. Raises: ValueError for one that cannot be read."""
    if not storage.exists(_NAME):
        return None
    try:
        found = json.loads(storage.read(_NAME))
        return Seal(tuple(found["members"]), dict(found["files"]))
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{_NAME} is no seal") from error
