"""All-or-nothing folders: written under another name, listed in a checksummed manifest, then renamed.

On a local disk the rename publishes the folder; on an object store, which has no rename, the manifest is
written last and publishes it. Either way a folder without a manifest that verifies does not exist.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

from raylora.errors import StoreError
from raylora.store.storage import Storage

MANIFEST = "MANIFEST.json"


def commit(storage: Storage, folder: str, files: Mapping[str, bytes]) -> None:
    """Publish a folder with these files; a folder of that name is replaced."""
    listing = {name: digest_of(content) for name, content in files.items()}
    manifest = json.dumps({"files": listing}, indent=1, sort_keys=True).encode()
    staging = f"{folder}.tmp-{uuid.uuid4().hex[:8]}" if storage.is_local else folder
    if not storage.is_local:
        storage.delete(folder)
    for name, content in files.items():
        storage.write(f"{staging}/{name}", content)
    storage.write(f"{staging}/{MANIFEST}", manifest)
    if storage.is_local:
        storage.delete(folder)
        storage.rename(staging, folder)


def load(storage: Storage, folder: str) -> dict[str, bytes]:
    """Return the files of a committed folder.

    Raises:
        StoreError: it was never committed, or a file is missing, truncated or changed.
    """
    files, damage = _read(storage, folder)
    if damage:
        raise StoreError(f"{storage.path(folder)}: {damage}")
    return files


def damage_of(storage: Storage, folder: str) -> str:
    """Return in words why a folder does not verify, or nothing if it does."""
    return _read(storage, folder)[1]


def is_committed(storage: Storage, folder: str) -> bool:
    """Return whether a folder verifies, file by file."""
    return not damage_of(storage, folder)


def _read(storage: Storage, folder: str) -> tuple[dict[str, bytes], str]:
    """Return the files up to the first one that does not verify, and what is wrong with that."""
    files: dict[str, bytes] = {}
    if not storage.exists(folder):
        return files, "is missing"
    try:
        listing = json.loads(storage.read(f"{folder}/{MANIFEST}"))["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return files, "has no readable manifest, so it was never committed or is damaged"
    for name, expected in listing.items():
        try:
            content = storage.read(f"{folder}/{name}")
        except FileNotFoundError:
            return files, f"is damaged: {name} is missing"
        if digest_of(content) != expected:
            return files, f"is damaged: {name} differs from its checksum"
        files[name] = content
    return files, ""


def digest_of(content: bytes) -> dict[str, Any]:
    """Return by what a file is known again: its size and its SHA-256."""
    return {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def sweep(storage: Storage, parent: str) -> list[str]:
    """Delete what an interrupted commit left behind and return the names."""
    leftovers = [name for name in storage.list(parent) if ".tmp-" in name]
    for name in leftovers:
        storage.delete(f"{parent}/{name}".lstrip("/"))
    return leftovers
