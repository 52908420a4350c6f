"""All-or-nothing folders: a checksummed manifest names every file, and publishing it publishes the folder.

On a local disk the folder is written under another name and renamed; one that is there already changes places with it
in one step. On an object store, which has no rename, the manifest is written last. A folder that is replaced there gets
its new files under names of their own, then the manifest that names them, and only then loses the old ones: at every
moment the old content can be loaded, or the new. Either way a folder without a manifest that verifies does not exist.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raylora.errors import StoreError
from raylora.store.lock import Lock
from raylora.store.storage import Storage

MANIFEST = "MANIFEST.json"
_STORED = "stored_as"
_READS = 5
"""How often a folder that is replaced while it is read is read anew."""
OnBytes = Callable[[int], None]
"""Told of every piece of a large file how long it was."""
Entries = dict[str, dict[str, Any]]
"""File -> size and SHA-256, and under what name it lies if not under its own."""


def commit(storage: Storage, folder: str, files: Mapping[str, bytes], lock: Lock | None = None) -> None:
    """Publish a folder with these files; a folder of that name is replaced.

    Args:
        lock: whose holder this is written for; its epoch is recorded.

    Raises:
        LostRunError: that holder was replaced; nothing was published.
    """
    lock = lock or Lock(storage)
    lock.check()
    if not storage.is_local:
        _commit_in_place(storage, folder, files, lock)
        return
    staging = f"{folder}.tmp-{uuid.uuid4().hex[:8]}"
    for name, content in files.items():
        storage.write(f"{staging}/{name}", content)
    listing = {name: digest_of(content) for name, content in files.items()}
    storage.write(f"{staging}/{MANIFEST}", _manifest(listing, lock.epoch))
    lock.check()
    if not storage.publish(staging, folder):
        _commit_in_place(storage, folder, files, lock)
    storage.delete(staging)


def commit_files(
    storage: Storage, folder: str, sources: Mapping[str, Path], listing: Mapping[str, Mapping[str, Any]],
    on_bytes: OnBytes, lock: Lock,
) -> None:
    """Publish files of this machine, which are too large to be held, if they are what a listing says.

    A folder of that name is there only if it is damaged; it is deleted first.

    Args:
        listing: file -> size and SHA-256.
        on_bytes: told of every piece that is written how long it was.

    Raises:
        StoreError: a file is another one by now; nothing was published.
        FileNotFoundError: a file is gone; nothing was published.
    """
    lock.check()
    storage.delete(folder)
    staging = f"{folder}.tmp-{uuid.uuid4().hex[:8]}" if storage.is_local else folder
    try:
        for name, source in sources.items():
            if storage.copy_in(f"{staging}/{name}", source, on_bytes) != listing[name]["sha256"]:
                raise StoreError(f"{source}: has changed since the run was begun", "put it back as it was, and resume")
            lock.check()
        storage.write(f"{staging}/{MANIFEST}", _manifest({name: dict(listing[name]) for name in sources}, lock.epoch))
        if staging != folder:
            storage.publish(staging, folder)
    finally:
        if staging != folder:
            storage.delete(staging)


def manifest_of(storage: Storage, folder: str) -> bytes:
    """Return a committed folder's manifest. Raises: StoreError if nothing was committed."""
    try:
        return storage.read(f"{folder}/{MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{storage.path(folder)}: is missing") from None


def listing_of(storage: Storage, folder: str) -> Entries | None:
    """Return what a committed folder says that it holds, unread; None where nothing was committed.

    Raises:
        StoreError: its manifest is damaged.
    """
    try:
        return _entries_of(manifest_of(storage, folder)) if storage.exists(f"{folder}/{MANIFEST}") else None
    except ValueError:
        raise StoreError(f"{storage.path(folder)}: has no readable manifest: it is damaged") from None


def fetch(
    storage: Storage, folder: str, entries: Mapping[str, Mapping[str, Any]], target: Path,
    on_bytes: OnBytes = lambda count: None,
) -> None:
    """Write a committed folder's files into a new folder of this machine, piece by piece; each is compared.

    Raises:
        StoreError: a file is missing, truncated or changed.
        OSError: it cannot be written here.
    """
    target.mkdir(parents=True)
    for name, entry in entries.items():
        place = target / name
        if not place.resolve().is_relative_to(target.resolve()):
            raise StoreError(f"{storage.path(folder)}: is damaged: {name} lies outside of it")
        place.parent.mkdir(parents=True, exist_ok=True)
        for is_last in (False, True):  # what the network has damaged is whole the next time
            try:
                found = storage.copy_out(f"{folder}/{_stored(name, entry)}", place, on_bytes)
            except FileNotFoundError:
                raise StoreError(f"{storage.path(folder)}: is damaged: {name} is missing") from None
            if found == entry["sha256"]:
                break
            place.unlink()
            if is_last:
                raise StoreError(f"{storage.path(folder)}: is damaged: {name} differs from its checksum")


def _commit_in_place(storage: Storage, folder: str, files: Mapping[str, bytes], lock: Lock) -> None:
    """Publish by the manifest alone: beside the files of a folder that is replaced, then under their own names."""
    there = {} if _read(storage, folder)[1] else _entries_of(storage.read(f"{folder}/{MANIFEST}"))
    taken = {_stored(name, entry) for name, entry in there.items()}
    beside: Entries = {}
    for name, content in files.items():
        digest = digest_of(content)
        if digest_of_entry(there.get(name, {})) == digest:
            beside[name] = there[name]
        elif name in taken:
            beside[name] = {**digest, _STORED: f"{name}.{digest['sha256'][:16]}"}
        else:
            beside[name] = digest
    _publish(storage, folder, files, there, beside, lock)
    if any(_STORED in entry for entry in beside.values()):  # so that others than raylora find them too
        settled = {name: digest_of_entry(entry) for name, entry in beside.items()}
        _publish(storage, folder, files, beside, settled, lock)


def _publish(
    storage: Storage, folder: str, files: Mapping[str, bytes], there: Entries, wanted: Entries, lock: Lock
) -> None:
    """Go from one manifest to another: new files, the manifest, and last the deletion of what it does not name."""
    for name, entry in wanted.items():
        if there.get(name) != entry:
            storage.write(f"{folder}/{_stored(name, entry)}", files[name])
    lock.check()
    storage.write(f"{folder}/{MANIFEST}", _manifest(wanted, lock.epoch))
    named = {_stored(name, entry).partition("/")[0] for name, entry in wanted.items()}
    for name in storage.list(folder):
        if name != MANIFEST and name not in named:
            storage.delete(f"{folder}/{name}")


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
    damage = ""
    before = None
    for _ in range(_READS):
        try:
            manifest = storage.read(f"{folder}/{MANIFEST}")
        except (FileNotFoundError, NotADirectoryError):
            missing = not storage.exists(folder)
            return {}, "is missing" if missing else "has no readable manifest, so it was never committed or is damaged"
        if manifest == before:
            break
        files, damage = _read_by(storage, folder, manifest)
        if not damage:
            return files, ""
        before = manifest  # damaged, or replaced meanwhile: then the manifest is another one now
    return files, damage


def _read_by(storage: Storage, folder: str, manifest: bytes) -> tuple[dict[str, bytes], str]:
    files: dict[str, bytes] = {}
    try:
        entries = _entries_of(manifest)
    except ValueError:
        return files, "has no readable manifest, so it was never committed or is damaged"
    for name, entry in entries.items():
        try:
            content = storage.read(f"{folder}/{_stored(name, entry)}")
        except FileNotFoundError:
            return files, f"is damaged: {name} is missing"
        if digest_of(content) != digest_of_entry(entry):
            return files, f"is damaged: {name} differs from its checksum"
        files[name] = content
    return files, ""


def _manifest(entries: Entries, epoch: int | None) -> bytes:
    content: dict[str, Any] = {"files": entries} if epoch is None else {"epoch": epoch, "files": entries}
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _entries_of(manifest: bytes) -> Entries:
    """Return what a manifest names. Raises: ValueError for bytes that no commit has written."""
    try:
        content = json.loads(manifest)
        entries: Entries = content["files"]
        if _manifest(entries, content.get("epoch")) != manifest:
            raise ValueError("not as it was written")
        return {name: dict(entry) for name, entry in entries.items()}
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError("no manifest") from error


def _stored(name: str, entry: Mapping[str, Any]) -> str:
    return str(entry.get(_STORED, name))


def digest_of_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return by what the file of a manifest's entry is known again."""
    return {key: value for key, value in entry.items() if key != _STORED}


def identity_of(manifest: bytes) -> dict[str, Any]:
    """Return by what a folder's content is known again: the same whoever committed it, and wherever its files lie."""
    try:
        entries = _entries_of(manifest)
    except ValueError:
        return digest_of(manifest)
    return digest_of(_manifest({name: digest_of_entry(entry) for name, entry in entries.items()}, None))


def epoch_of(storage: Storage, folder: str) -> int | None:
    """Return the epoch of the holder that committed a folder; None if nobody held the directory, or it is not there."""
    try:
        found: int | None = json.loads(storage.read(f"{folder}/{MANIFEST}")).get("epoch")
        return found
    except (FileNotFoundError, ValueError):
        return None


def digest_of(content: bytes) -> dict[str, Any]:
    """Return by what a file is known again: its size and its SHA-256."""
    return {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def sweep(storage: Storage, parent: str) -> list[str]:
    """Delete what an interrupted commit left behind and return the names."""
    leftovers = [name for name in storage.list(parent) if ".tmp-" in name]
    for name in leftovers:
        storage.delete(f"{parent}/{name}".lstrip("/"))
    return leftovers
