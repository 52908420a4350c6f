"""Committed folders as this machine has them: fetched once by one of its processes, and compared; all read one copy."""

from __future__ import annotations

import errno
import logging
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raylora.errors import StoreError
from raylora.machine_cache import cache_folder, is_old, made_once, remove, used
from raylora.store import commit
from raylora.store.storage import Storage

logger = logging.getLogger(__name__)

FOLDER = "inputs"
_SPARE_BYTES = 64 << 20
"""So much of a disk is left free."""
_LARGE_BYTES = 10**9
"""That so much begins to be fetched is news; of the rest it is news when it is there."""
_TELL_S = 10.0
Say = Callable[[str], None]


def node_copy(
    storage: Storage, folder: str, key: str, name: str, say: Say = lambda text: None,
    expected: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Return this machine's copy of a committed folder, fetched first where there is none.

    Args:
        key: of its content; what has the same content is fetched once.
        name: of the copy.
        say: told in words of what was fetched, by the process that fetched it.
        expected: size and SHA-256 of its files, where others know them.

    Raises:
        StoreError: it was never committed, is damaged, or does not find room.
    """
    target = kept_copy(key, name)
    try:
        if made_once(
            target, target.parent.with_suffix(".lock"), lambda path: _fetch(storage, folder, path, say, expected)
        ):
            _sweep(target.parent.parent, target)
        used(target)
    except OSError as error:
        raise _explain(error, target) from error
    return target


def kept_copy(key: str, name: str) -> Path:
    """Return where this machine keeps the copy of a content, or would. Raises: StoreError for what is no name."""
    if name in ("", ".", "..") or "/" in name:
        raise StoreError(f"{name!r} is no folder's name", "the run's record of its inputs is damaged: resume the run")
    return cache_folder() / FOLDER / key[:32] / name


def _fetch(
    storage: Storage, folder: str, path: Path, say: Say, expected: Mapping[str, Mapping[str, Any]] | None
) -> None:
    entries = commit.listing_of(storage, folder)
    if entries is None:
        raise StoreError(f"{storage.path(folder)}: is missing")
    if expected is not None and {name: commit.digest_of_entry(one) for name, one in entries.items()} != expected:
        raise StoreError(f"{storage.path(folder)}: is damaged: it holds other files than those it is named for")
    size, free, started = sum(int(e["size_bytes"]) for e in entries.values()), _free_bytes(path), time.monotonic()
    if size + _SPARE_BYTES > free:
        raise StoreError(
            f"{socket.gethostname()}: {size / 1e9:.2f} GB are to be fetched from {storage.path(folder)}, and "
            f"{free / 1e9:.2f} GB are free in {cache_folder()}", _ROOM,
        )
    if size > _LARGE_BYTES:
        say(f"{socket.gethostname()} fetches {path.parent.name[:8]} ({size / 1e9:.1f} GB)")
    done, told = 0, started

    def on_bytes(count: int) -> None:
        nonlocal done, told
        done += count
        if time.monotonic() - told > _TELL_S:
            told = time.monotonic()
            logger.info("fetching %s: %.1f of %.1f MB", storage.path(folder), done / 1e6, size / 1e6)

    commit.fetch(storage, folder, entries, path, on_bytes)
    took = time.monotonic() - started
    say(f"{socket.gethostname()} fetched {path.parent.name[:8]} ({size / 1e6:.1f} MB) in {took:.1f} s")
    logger.info("fetched %s (%.1f MB) in %.1f s", storage.path(folder), size / 1e6, took)


_ROOM = "free some there, or let RAYLORA_CACHE name a folder on a larger disk of that node"


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path.parent).free


def _explain(error: OSError, target: Path) -> StoreError:
    if error.errno == errno.ENOSPC:
        return StoreError(f"{socket.gethostname()}: no space left in {cache_folder()} for {target.name}", _ROOM)
    return StoreError(
        f"{socket.gethostname()}: {target} cannot be written: {error.strerror or error}",
        "let RAYLORA_CACHE name a folder that this user may write on that node",
    )


def _sweep(folder: Path, but: Path) -> None:
    """Delete the copies that nobody has used for long."""
    for copy in folder.glob("*/*"):
        try:
            if copy != but and is_old(copy):
                remove(copy)
        except OSError:
            continue
