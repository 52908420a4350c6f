"""Which runs are shown: one run and the students inside it, or all runs of a storage path."""

from __future__ import annotations

import re
import threading
from typing import Any

from raylora.errors import RayloraError, RunDirectoryError
from raylora.store.run_store import RunStore
from raylora.store.storage import Storage
from raylora.web.snapshot import RunReader

LOCAL_EVERY_S = 1.0
REMOTE_EVERY_S = 5.0
"""A bucket answers slower, and every look costs requests."""
_MOST_RUNS = 100
_NO_STUDENTS = frozenset((
    "members", "baselines", "predictions", "snapshots", "timing", "targets", "export", "blocks", "shards",
    "checkpoints", "plots", "tensorboard", "tokenized", "lock", "events", "distillation", "profile",
))
"""Folders of every run, in which nobody has to look: to a bucket each look is a request."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Runs:
    """The runs below one path. A run is asked for by a key: its name, or ``name:student`` for a student inside it."""

    def __init__(self, uri: str) -> None:
        """Look what is there.

        Raises:
            RunDirectoryError: neither a run nor runs.
        """
        storage = Storage(uri)
        self.every_s = LOCAL_EVERY_S if storage.is_local else REMOTE_EVERY_S
        self.is_one = storage.exists("spec.yaml")
        parent, _, name = storage.uri.rpartition("/")
        self.only = name if self.is_one else ""
        self.root = Storage(parent) if self.is_one else storage
        self._readers: dict[str, RunReader] = {}
        self._lock = threading.Lock()
        if not self.keys():
            raise RunDirectoryError(f"{storage.uri}: there is no run here", "give a run directory, or a folder of runs")

    def keys(self) -> list[str]:
        """Return the keys of all runs that are there now, students after the run that they are in."""
        names = [self.only] if self.is_one else [
            name for name in self.root.list() if _NAME.fullmatch(name) and self.root.exists(f"{name}/spec.yaml")
        ][:_MOST_RUNS]
        found = []
        for name in names:
            found += [name, *(f"{name}:{student}" for student in self._students(name))]
        return found

    def reader(self, key: str) -> RunReader:
        """Return what reads a run. Raises: KeyError where no run has this key, whatever it looks like."""
        with self._lock:
            if key not in self._readers:
                if key not in self.keys():
                    raise KeyError(key)
                uri = f"{self.root.uri}/{key.replace(':', '/')}"
                self._readers[key] = RunReader(RunStore(uri), self.every_s)
            return self._readers[key]

    def listing(self) -> list[dict[str, Any]]:
        """Return a line for each run."""
        return [self._line(key) for key in self.keys()]

    def _students(self, name: str) -> list[str]:
        return [
            inner for inner in self.root.list(name)
            if "." not in inner and inner not in _NO_STUDENTS and _NAME.fullmatch(inner)
            and self.root.exists(f"{name}/{inner}/spec.yaml")
        ]

    def _line(self, key: str) -> dict[str, Any]:
        try:
            record = self.reader(key).read()
        except (KeyError, RayloraError) as error:  # deleted while one looks on
            return {"key": key, "problem": str(error)}
        names = ("run", "phase", "is_over", "lifeless", "share_done", "eta_s", "started_at", "updated_at",
                 "member_count", "members_done", "problem")
        return {"key": key, **{name: record[name] for name in names if name in record}}
