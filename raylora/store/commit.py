"""All-or-nothing folders: written under another name, listed in a checksummed manifest, then renamed.

On a local disk the rename publishes the folder; on an object store, which has no rename, the manifest is
written last and publishes it. Either way a folder without a manifest that verifies does not exist.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping

from raylora.errors import StoreError
from raylora.store.storage import Storage

MANIFEST = "MANIFEST.json"


def commit(storage: Storage, folder: str, files: Mapping[str, bytes]) -> None:
    """Publish a folder with these files; a folder of that name is replaced."""
    listing = {name: {"size_bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in files.items()}
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
    try:
        listing = json.loads(storage.read(f"{folder}/{MANIFEST}"))["files"]
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise StoreError(f"{storage.path(folder)}: has no readable manifest, so it was never committed") from error
    files = {}
    for name, expected in listing.items():
        try:
            content = storage.read(f"{folder}/{name}")
        except FileNotFoundError:
            raise StoreError(f"{storage.path(folder)}/{name}: is missing") from None
        if len(content) != expected["size_bytes"] or hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise StoreError(f"{storage.path(folder)}/{name}: does not match its checksum")
        files[name] = content
    return files


def is_committed(storage: Storage, folder: str) -> bool:
    """Return whether a folder verifies, file by file."""
    try:
        load(storage, folder)
    except StoreError:
        return False
    return True


def sweep(storage: Storage, parent: str) -> list[str]:
    """Delete what an interrupted commit left behind and return the names."""
    leftovers = [name for name in storage.list(parent) if ".tmp-" in name]
    for name in leftovers:
        storage.delete(f"{parent}/{name}".lstrip("/"))
    return leftovers
