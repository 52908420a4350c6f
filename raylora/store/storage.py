"""Bytes at relative paths below one root, on a local disk or any fsspec file system; a write is atomic."""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from raylora.errors import RunDirectoryError, StoreError
from raylora.store.exchange import exchange
from raylora.store.remote import check_bucket, open_file_system, reaching

_BLOCK = 1 << 16
_PIECE = 8 << 20
"""Of a file that is too large to be held, so much is read at a time."""


class Storage:
    """A folder or bucket prefix that a run reads and writes; nothing outside it can be reached."""

    def __init__(self, uri: str) -> None:
        """Open a root: ``runs/demo``, ``/data/runs``, ``s3://bucket/runs``; it is made when first written to.

        Raises:
            UnreachableError: the package for this kind of storage is missing.
        """
        self.fs: Any
        self.fs, self.root = open_file_system(uri)
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
        """Refuse a local folder that cannot be written or made, and a bucket that is not there or cannot be listed.

        Nothing is written to find out.

        Raises:
            RunDirectoryError: the folder cannot be written.
            UnreachableError: the bucket cannot be used.
        """
        if not self.is_local:
            check_bucket(self.fs, self.root, self.uri)
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
        with reaching(self.uri):
            return bool(self.fs.exists(self.path(relative)))

    def read(self, relative: str) -> bytes:
        """Return a file's bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """
        with reaching(self.uri):
            return self.fs.cat_file(self.path(relative))

    def write(self, relative: str, content: bytes) -> None:
        """Write a whole file: readers see the old content or the new, never a part.

        Raises:
            StoreError: the disk is full or refuses; what was there before is untouched.
        """
        target = self.path(relative)
        try:
            if not self.is_local:  # object stores publish an object only when its upload is complete
                with reaching(self.uri):
                    self.fs.pipe_file(target, content)
                return
            os.makedirs(os.path.dirname(target), exist_ok=True)
            temporary = f"{target}.tmp-{uuid.uuid4().hex[:8]}"
            try:
                _write_synced(temporary, content)
                os.replace(temporary, target)
            finally:
                if os.path.exists(temporary):
                    os.unlink(temporary)
            sync_folder(os.path.dirname(target))
        except OSError as error:
            raise _explain(error, target, len(content)) from error

    def copy_in(self, relative: str, source: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
        """Write a file of this machine, of any size, and return the SHA-256 of what was written.

        Unlike :meth:`write` it does not publish: a manifest that is written later does.

        Args:
            on_bytes: told of every piece how long it was.

        Raises:
            StoreError: the disk is full or refuses.
        """
        target = self.path(relative)
        try:
            if self.is_local:
                os.makedirs(os.path.dirname(target), exist_ok=True)
            with reaching(self.uri), source.open("rb") as stream, self.fs.open(target, "wb") as out:
                digest = _copy(stream, out, on_bytes)
                if self.is_local:
                    out.flush()
                    os.fsync(out.fileno())
            return digest
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _explain(error, target, source.stat().st_size) from error

    def copy_out(self, relative: str, target: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
        """Write a file of any size to this machine, as far as the disk, and return its SHA-256.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: it cannot be written here.
        """
        # Pieces are asked for one after the other, and none twice.
        options = {} if self.is_local else {"block_size": _PIECE, "cache_type": "readahead"}
        with reaching(self.uri), self.fs.open(self.path(relative), "rb", **options) as stream, target.open("xb") as out:
            digest = _copy(stream, out, on_bytes)
            out.flush()
            os.fsync(out.fileno())
        return digest

    def append(self, relative: str, line: bytes) -> None:
        """Add a line to a file of a local disk, durably; what a crash left of an unfinished last line is dropped first.

        It costs the same however long the file is. An object store has no such operation: see ``store/events.py``.
        """
        target = self.path(relative)
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
        """Write a file only if there is none; return whether it was this call that made it.

        Of any number of processes that create one file, one is told that it did. On object stores this is a conditional
        write, which the store decides.

        Raises:
            StoreError: the disk is full or refuses.
        """
        target = self.path(relative)
        try:
            if not self.is_local:
                return self._create_object(target, content)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            temporary = f"{target}.tmp-{uuid.uuid4().hex[:8]}"
            try:
                _write_synced(temporary, content)
                os.link(temporary, target)  # appears whole, and fails if there is one
            finally:
                if os.path.exists(temporary):
                    os.unlink(temporary)
            sync_folder(os.path.dirname(target))
            return True
        except FileExistsError:
            return False
        except OSError as error:
            raise _explain(error, target, len(content)) from error

    def _create_object(self, target: str, content: bytes) -> bool:
        with reaching(self.uri):
            try:
                self.fs.pipe_file(target, content, mode="create")
            except FileExistsError:
                return False
            except (TypeError, ValueError, NotImplementedError):
                # A file system that cannot say "only if there is none". Two that look at the same moment may both
                # write; the later one's content stays, and each reads back whose it is.
                if self.fs.exists(target):
                    return False
                self.fs.pipe_file(target, content)
                return bool(self.fs.cat_file(target) == content)
            return True

    def list(self, relative: str = "") -> list[str]:
        """Return the names directly inside a folder, sorted; none if it is not there."""
        folder = self.path(relative)
        with reaching(self.uri):
            try:
                found = [str(path).rstrip("/") for path in self.fs.ls(folder, detail=False)]
            except (FileNotFoundError, NotADirectoryError):
                return []
        # An object of the folder's own name is a marker that some tools leave, or the file itself.
        return sorted(posixpath.basename(path) for path in found if path != folder)

    def delete(self, relative: str) -> None:
        """Remove a file or a folder with all it holds; nothing happens if it is not there."""
        target = self.path(relative)
        with reaching(self.uri):
            if target != self.root and self.fs.exists(target):
                self.fs.rm(target, recursive=True)

    def publish(self, source: str, target: str) -> bool:
        """Give a folder of a local disk its final name in one step; what had that name before has the source's then.

        Returns:
            False, and nothing has changed, where folders that are there cannot change places.
        """
        there = self.path(target)
        try:
            os.rename(self.path(source), there)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _explain(error, there, 0) from error
            if not exchange(self.path(source), there):
                return False
        sync_folder(os.path.dirname(there))
        return True


def _copy(stream: IO[bytes], out: IO[bytes], on_bytes: Callable[[int], None]) -> str:
    """Copy piece by piece and return the SHA-256."""
    digest = hashlib.sha256()
    while piece := stream.read(_PIECE):
        digest.update(piece)
        out.write(piece)
        on_bytes(len(piece))
    return digest.hexdigest()


def _write_synced(path: str, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _drop_torn_line(file: IO[bytes]) -> None:
    """Cut off what follows the last line end, reading no more than that."""
    end = position = file.seek(0, os.SEEK_END)
    while position:
        start = max(0, position - (1 if position == end else _BLOCK))  # nearly always the last byte is a line end
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            if start + found + 1 < end:
                file.truncate(start + found + 1)
            return
        position = start
    if end:
        file.truncate(0)


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
    return StoreError(f"cannot write {target}: {error.strerror or error}", "check the storage_path and its permissions")
