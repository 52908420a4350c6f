"""Checksums of this machine's files: each is read once, and known again by what the system says of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from raylora.machine_cache import cache_folder

logger = logging.getLogger(__name__)

_PIECE = 8 << 20
_LENGTH = 64
_SETTLED_S = 2.0
"""A file that was changed just now may be changed again within the same tick of the clock: it is not remembered."""
Listing = dict[str, dict[str, Any]]
"""File -> size and SHA-256, as in a manifest."""


def listing_of(folder: Path, names: Iterable[str]) -> Listing:
    """Return size and SHA-256 of files in a folder. Raises: OSError."""
    return {
        name: {"size_bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names
    }


def difference(folder: Path, listing: Mapping[str, Mapping[str, Any]]) -> str:
    """Return in words what a folder lacks of a listing, or nothing if every file is there with that content.

    Sizes are looked at first: nothing is read of a folder in which one differs.
    """
    try:
        for name, entry in listing.items():
            if (folder / name).stat().st_size != entry["size_bytes"]:
                return f"{name} is another file"
        for name, entry in listing.items():
            if sha256_of(folder / name) != entry["sha256"]:
                return f"{name} is another file"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return ""


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256; of one that was read before on this machine, and not touched since, unread.

    That it was not touched is told by its change time, which no program can set.

    Raises:
        OSError: it cannot be read.
    """
    known = _place_of(path)
    with contextlib.suppress(OSError):
        if len(digest := known.read_text()) == _LENGTH:
            return digest
    summed = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            summed.update(piece)
    if known == _place_of(path) and time.time() - path.stat().st_ctime > _SETTLED_S:
        _remember(known, summed.hexdigest())
    return summed.hexdigest()


def _place_of(path: Path) -> Path:
    stat = path.stat()
    facts = [os.path.realpath(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return cache_folder() / "checksums" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _remember(known: Path, digest: str) -> None:
    unfinished = known.with_name(f".{known.name}.tmp-{uuid4().hex[:8]}")
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(digest)
        unfinished.replace(known)
    except OSError as error:  # it is read again next time
        logger.debug("a checksum is not remembered: %s", error)
