"""What a run reads that its driver's node has and others may not: published once beside the runs, by content.

``inputs.json`` of a run directory says what its models consist of: file by file, with checksums. A node that has the
same files uses them. One that has not asks the coordinator, which publishes them from its own node, once, to
``<storage_path>/_inputs/<sha256>``; the node then fetches them, once for all its processes (``store/node_copy.py``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from raylora.errors import RayloraError, RunDirectoryError, StoreError
from raylora.store import commit
from raylora.store.checksums import Listing, difference, listing_of
from raylora.store.run_store import RunStore

logger = logging.getLogger(__name__)

FOLDER = "_inputs"
"""A run's name starts with a letter or digit, so no run is ever in the way."""
FILES = "files"
RECORD = "inputs.json"
_WAIT_S = 2.0
_TELL_S = 10.0


@dataclass(frozen=True)
class Input:
    """A folder that a run reads, as its driver has it."""

    source: str
    """What the spec calls it."""
    name: str
    """The folder's own name: what is fetched bears it, too."""
    place: str
    """Where it is on the driver's node."""
    files: Listing

    @property
    def key(self) -> str:
        """The SHA-256 of what it holds, wherever it lies."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """All its files together."""
        return sum(int(entry["size_bytes"]) for entry in self.files.values())

    def difference(self) -> str:
        """Return in words how what is in its place differs from it, or nothing."""
        return difference(Path(self.place), self.files)


def input_of(source: str, folder: Path, names: list[str]) -> Input:
    """Return what a folder of this machine holds; files that were read before are not read again. Raises: OSError."""
    return Input(source, folder.resolve().name, str(folder), listing_of(folder, names))


@dataclass(frozen=True)
class Inputs:
    """All inputs of a run, by what they are to it, such as ``base``."""

    folder: str
    """Where they are published, when a node asks for them."""
    by_role: Mapping[str, Input]

    def write(self, store: RunStore) -> None:
        """Record them in a run directory."""
        store.write_json(RECORD, asdict(self))

    @classmethod
    def read(cls, store: RunStore) -> Inputs | None:
        """Return what a run directory records, or None: it was begun before there were such records."""
        found = store.read_json(RECORD)
        if found is None:
            return None
        return cls(found["folder"], {role: Input(**item) for role, item in found["by_role"].items()})

    def store_of(self, item: Input) -> RunStore:
        """Return where an input is published, or will be."""
        return RunStore(f"{self.folder}/{item.key}")


@dataclass(frozen=True)
class Publication:
    """How far an input's publication is."""

    done_bytes: int
    total_bytes: int
    is_done: bool = False
    error: RayloraError | None = None


class Publisher:
    """Publishes a run's inputs, each when it is first asked for; it answers at once, and works in threads."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._inputs: Inputs | None = None
        self._lock = threading.Lock()
        self._known: dict[str, Publication] = {}

    def ask(self, role: str) -> Publication:
        """Return how far an input is; the first call begins it, and so does one after a failure.

        Raises:
            StoreError: the run has no such input.
        """
        self._inputs = inputs = self._inputs or Inputs.read(self._store)
        item = inputs.by_role.get(role) if inputs is not None else None
        if inputs is None or item is None:
            raise StoreError(f"{self._store.uri}: {RECORD} names no {role}", "resume the run: it is written anew")
        with self._lock:
            found = self._known.get(role)
            if found is None:
                self._known[role] = Publication(0, item.size_bytes)
                threading.Thread(target=self._publish, args=(role, item, inputs.store_of(item)), daemon=True).start()
            elif found.error is not None:
                del self._known[role]
            return found or self._known[role]

    def _publish(self, role: str, item: Input, there: RunStore) -> None:
        told = time.monotonic()

        def on_bytes(count: int) -> None:
            nonlocal told
            done = self._known[role].done_bytes + count
            self._known[role] = Publication(done, item.size_bytes)
            if time.monotonic() - told > _TELL_S:
                told = time.monotonic()
                logger.info("publishing %s: %.1f of %.1f MB", item.source, done / 1e6, item.size_bytes / 1e6)

        try:
            publish(item, there, on_bytes)
            self._known[role] = Publication(item.size_bytes, item.size_bytes, is_done=True)
        except Exception as error:  # whoever asks is told
            said = error if isinstance(error, RayloraError) else StoreError(f"{there.uri}: {error}")
            self._known[role] = Publication(0, item.size_bytes, error=said)


def publish(item: Input, there: RunStore, on_bytes: commit.OnBytes = lambda count: None) -> None:
    """Publish an input unless it is there; if another run is at it, wait for that one.

    Raises:
        StoreError: it has changed, or is gone, or cannot be written.
    """
    while not is_published(there):
        try:
            with there.held():
                if is_published(there):
                    return
                sources = {name: Path(item.place) / name for name in item.files}
                there.commit_files(FILES, sources, item.files, on_bytes)
                logger.info("published %s in %s", item.source, there.uri)
        except FileNotFoundError as error:
            raise StoreError(f"{error.filename or item.place}: is gone since the run was begun",
                             "put it back as it was, and resume") from error
        except RunDirectoryError:
            time.sleep(_WAIT_S)


def is_published(there: RunStore) -> bool:
    """Return whether an input is published whole; what it holds is compared when it is fetched."""
    try:
        return commit.listing_of(there.storage, FILES) is not None
    except StoreError:
        return False
