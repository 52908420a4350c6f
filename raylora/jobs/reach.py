"""Which of a spec's paths a cluster can see, as far as that is known before anything is sent to it.

A relative path starts at the job's working directory, a copy of the folder that is sent: what is in it is there, and
nothing can be kept there, since the copy goes with the job. An absolute path is the cluster's own: whether it is there
only the cluster knows, and is asked.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from raylora.errors import SpecError
from raylora.jobs.upload import Upload
from raylora.spec import RunSpec
from raylora.spec.paths import local_paths

_SEND = "move it into the working directory, or put it where the cluster's head has it and give its absolute path there"


@dataclass(frozen=True)
class Needed:
    """Absolute paths that a cluster has to have."""

    read: tuple[str, ...]
    """Files and folders with data, or a base."""
    written: tuple[str, ...]
    """Folders in which runs are kept."""


def needed_on_cluster(spec: RunSpec, upload: Upload) -> Needed:
    """Return what has to be looked for on the cluster.

    Raises:
        SpecError: a path is only on this machine, or a run would be lost with the job's copy of the working directory.
    """
    read = []
    for path in local_paths(spec):
        if os.path.isabs(os.path.expanduser(path)):
            read.append(_absolute(path, "the spec"))
            continue
        relative = os.path.normpath(path)
        if relative.startswith(".."):
            raise SpecError(f"{path}: lies outside the working directory {upload.folder}, which is all that is sent",
                            _SEND)
        if not (upload.folder / relative).exists():
            raise SpecError(f"{path}: is not in the working directory {upload.folder}", _SEND)
        if not upload.holds(relative):
            raise SpecError(f"{path}: is left out of what is sent, by .rayignore or .gitignore", "let it through there")
    return Needed(tuple(read), _kept_in(spec))


def _kept_in(spec: RunSpec) -> tuple[str, ...]:
    storage = spec.storage_path
    if "://" in storage:
        return ()
    if not os.path.isabs(os.path.expanduser(storage)):
        raise SpecError(
            f"storage_path: {storage} would be in the job's copy of the working directory, which goes with the job",
            "give an absolute path that every node of the cluster has, or an object store: --set storage_path=s3://...",
        )
    return (_absolute(storage, "storage_path"),)


def _absolute(path: str, where: str) -> str:
    if path.startswith("~"):
        raise SpecError(f"{where}: {path} starts at the home of whoever runs it, which is another one on the cluster",
                        "write it out")
    return os.path.normpath(path)
