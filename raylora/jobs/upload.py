"""The working directory that goes with a job: what of it is sent, what stays, and whether it is small enough.

Ray leaves out what ``.gitignore`` and ``.rayignore`` name, in every folder, what the runtime environment excludes, and
``.git`` and virtual environments. Its own walk is asked here, so that what is said is what is sent.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raylora.errors import UsageError

LARGEST_BYTES = 100 * 2**20
"""Ray's job server takes no larger body."""
_NAMED = 6


@dataclass(frozen=True)
class Upload:
    """A folder as it is sent."""

    folder: Path
    files: dict[str, int]
    """Relative path -> bytes."""
    left_out: tuple[str, ...]
    """What stays: relative paths, a slash behind folders."""

    @property
    def size_bytes(self) -> int:
        """All files, before they are compressed."""
        return sum(self.files.values())

    def holds(self, relative: str) -> bool:
        """Return whether a file, or something in a folder, is sent."""
        return any(name == relative or name.startswith(f"{relative}/") for name in self.files)

    def summary(self) -> str:
        """Return in one line what is sent and what stays."""
        said = f"sending {len(self.files)} file(s), {self.size_bytes / 1e6:.1f} MB, of {self.folder}"
        if not self.left_out:
            return f"{said}; nothing is left out"
        more = f" and {len(self.left_out) - _NAMED} more" if len(self.left_out) > _NAMED else ""
        return f"{said}; left out (.rayignore, .gitignore, Ray's own rules): {', '.join(self.left_out[:_NAMED])}{more}"


def survey(folder: Path, excludes: Sequence[str] = ()) -> Upload:
    """Return what of a folder would be sent.

    Args:
        excludes: patterns of the runtime environment.

    Raises:
        UsageError: it is no folder, or more than the job server takes.
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes  # nothing public says what is sent

    if not folder.is_dir():
        raise UsageError(f"--working-dir: {folder} is no folder", "give the folder that the job is to start in")
    folder = folder.resolve()
    sent: set[Path] = set()
    with_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    quiet = logging.getLogger("raylora.upload")
    patterns = [*get_runtime_env_default_excludes(), *excludes]
    _dir_travel(folder, [_get_excludes(folder, patterns)], sent.add, with_gitignore, quiet)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(sent) if path.is_file()}
    used = {folder / name for name in files} | {above for name in files for above in (folder / name).parents}
    upload = Upload(folder, files, tuple(_left_out(folder, used, folder)))
    if upload.size_bytes > LARGEST_BYTES:
        largest = sorted(files, key=lambda name: files[name], reverse=True)[:3]
        named = ", ".join(f"{name} ({files[name] / 1e6:.0f} MB)" for name in largest)
        raise UsageError(
            f"{folder}: {upload.size_bytes / 1e6:.0f} MB would be sent, and a job takes {LARGEST_BYTES / 1e6:.0f}; "
            f"the largest are {named}", "name in .rayignore what the job does not need, or give another --working-dir",
        )
    return upload


def _left_out(folder: Path, used: set[Path], root: Path) -> list[str]:
    """Return what is not sent, the outermost folder of each; nothing below it is looked at.

    Args:
        used: the files that are sent and all folders above one: a rule such as ``runs/`` leaves out what is in a folder
            and not the folder.
    """
    found: list[str] = []
    for path in sorted(folder.iterdir()):
        name = path.relative_to(root).as_posix()
        if path not in used:
            found.append(f"{name}/" if path.is_dir() else name)
        elif path.is_dir():
            found += _left_out(path, used, root)
    return found
