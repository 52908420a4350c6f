"""Bytes at relative paths below one root, on a local disk or any fsspec file system; a write is atomic."""

from __future__ import annotations

import errno
import os
import posixpath
import uuid
from pathlib import Path
from typing import IO, Any

import fsspec

from raylora.errors import RunDirectoryError, StoreError


class Storage:
    """A folder or bucket prefix that a run reads and writes; nothing outside it can be reached."""

    def __init__(self, uri: str) -> None:
        """Open a root: ``runs/demo``, ``/data/runs``, ``s3://bucket/runs``; it is made when first written to."""
        self.fs: Any
        self.fs, self.root = fsspec.core.url_to_fs(uri)
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))
        self.uri = self.root if self.is_local else self.fs.unstrip_protocol(self.root)

    def path(self, relative: str) -> str:
        """Return the full path of a relative one.

        Raises:
            StoreError: the path leaves the root.
        """
        clean = posixpath.normpath(relative) if relative else "."
        if clean.startswith(("..", "/")) or "\0" in clean:
            raise StoreError(f"path {relative!r} leaves the run directory")
        return self.root if clean == "." else f"{self.root}/{clean}"

    def check_writable(self) -> None:
        """Refuse a local folder that cannot be written or made. Raises: RunDirectoryError."""
        if not self.is_local:
            return
        there = Path(self.root)
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            raise RunDirectoryError(f"storage_path: {there} is a file, not a folder", "choose another storage_path")
        if not os.access(there, os.W_OK | os.X_OK):
            raise RunDirectoryError(
                f"storage_path: {there} cannot be written by this user", "choose another, or change its permissions"
            )

    def exists(self, relative: str) -> bool:
        """Return whether a file or folder is there."""
        return bool(self.fs.exists(self.path(relative)))

    def read(self, relative: str) -> bytes:
        """Return a file's bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return self.fs.cat_file(self.path(relative))

    def write(self, relative: str, content: bytes) -> None:
        """Write a whole file: readers see the old content or the new, never a part.

        Raises:
            StoreError: the disk is full or refuses; what was there before is untouched.
        """
        target = self.path(relative)
        try:
            if not self.is_local:  # object stores publish an object only when its upload is complete
                self.fs.pipe_file(target, content)
                return
            os.makedirs(os.path.dirname(target), exist_ok=True)
            temporary = f"{target}.tmp-{uuid.uuid4().hex[:8]}"
            try:
                with open(temporary, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            finally:
                if os.path.exists(temporary):
                    os.unlink(temporary)
            sync_folder(os.path.dirname(target))
        except OSError as error:
            raise _explain(error, target, len(content)) from error

    def append(self, relative: str, line: bytes) -> None:
        """Add a line durably; what a crash left of an unfinished last line is dropped first."""
        target = self.path(relative)
        if not self.is_local:
            before = self.read(relative) if self.exists(relative) else b""
            self.fs.pipe_file(target, before + line)
            return
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "ab+") as file:
                _drop_torn_line(file)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _explain(error, target, len(line)) from error

    def create(self, relative: str, content: bytes) -> bool:
        """Write a file only if there is none; return whether it was this call that made it."""
        target = self.path(relative)
        if not self.is_local:
            if self.fs.exists(target):
                return False
            self.fs.pipe_file(target, content)
            return True
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = f"{target}.tmp-{uuid.uuid4().hex[:8]}"
        try:
            with open(temporary, "xb") as file:
                file.write(content)
            os.link(temporary, target)  # appears whole, and fails if there is one
            return True
        except FileExistsError:
            return False
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)

    def list(self, relative: str = "") -> list[str]:
        """Return the names directly inside a folder, sorted; none if it is not there."""
        folder = self.path(relative)
        if not self.fs.exists(folder):
            return []
        return sorted(posixpath.basename(str(p).rstrip("/")) for p in self.fs.ls(folder, detail=False))

    def delete(self, relative: str) -> None:
        """Remove a file or a folder with all it holds; nothing happens if it is not there."""
        target = self.path(relative)
        if target != self.root and self.fs.exists(target):
            self.fs.rm(target, recursive=True)

    def rename(self, source: str, target: str) -> None:
        """Move a folder; atomic on a local disk."""
        if self.is_local:
            os.rename(self.path(source), self.path(target))
            sync_folder(os.path.dirname(self.path(target)))
        else:
            self.fs.mv(self.path(source), self.path(target), recursive=True)


def _drop_torn_line(file: IO[bytes]) -> None:
    file.seek(0)
    content = file.read()
    if content and not content.endswith(b"\n"):
        file.truncate(content.rfind(b"\n") + 1)


def sync_folder(path: str) -> None:
    """Make a rename or a new file in a local folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, target: str, size_bytes: int) -> StoreError:
    if error.errno == errno.ENOSPC:
        return StoreError(f"no space left for {target}: {size_bytes} bytes were to be written", "free some and resume")
    return StoreError(f"cannot write {target}: {error.strerror}", "check the storage_path and its permissions")
