"""What a machine keeps for all its processes, made by one of them while the others wait."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

KEPT_S = 30 * 24 * 3600.0
"""What nobody has used for so long is deleted when something else is made."""


def cache_folder() -> Path:
    """Return ``$RAYLORA_CACHE``, or ``~/.cache/raylora``."""
    return Path(os.environ.get("RAYLORA_CACHE") or Path.home() / ".cache" / "raylora")


def made_once(target: Path, lock: Path, make: Callable[[Path], None]) -> bool:
    """Make a file or folder unless it is there, and return whether it was this call that did.

    Of any number of processes one makes it, under another name, and the others wait; only what is finished ever bears
    the final name, whenever its maker is killed.

    Raises:
        OSError: it cannot be written; and whatever ``make`` raises.
    """
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if target.exists():  # another process made it while this one waited
            return False
        for leftover in target.parent.glob(f".{target.name}.tmp-*"):  # of one that was killed: the lock is ours
            remove(leftover)
        unfinished = target.with_name(f".{target.name}.tmp-{uuid4().hex}")
        try:
            make(unfinished)
            unfinished.replace(target)
        finally:
            remove(unfinished)
    return True


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def used(path: Path) -> None:
    """Note that something was used, so that it is kept."""
    os.utime(path)


def is_old(path: Path) -> bool:
    """Return whether something was not used for so long that it may go. Raises: OSError if it is gone."""
    return time.time() - path.stat().st_mtime > KEPT_S
