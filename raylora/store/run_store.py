"""The durable record of one run: the run directory is the truth, actors are disposable."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylora.errors import RunDirectoryError, StoreError
from raylora.spec import RunSpec, diff_specs, dump_spec, parse_spec
from raylora.spec.paths import found_again, located, places_here, recorded
from raylora.store import commit
from raylora.store.events import EventLog
from raylora.store.lock import BEFORE_EPOCHS, LOCK, STALE_S, Holder, Lock
from raylora.store.node_copy import node_copy
from raylora.store.seal import seal
from raylora.store.storage import Storage

__all__ = ["STALE_S", "Checkpoint", "Holder", "RunStore"]

logger = logging.getLogger(__name__)

_PATHS = "paths.json"
_BEAT_S = 10.0
_FOLDERS = ("members", "baselines", "predictions", "snapshots", "timing", "targets", "export", "blocks", "shards")


@dataclass(frozen=True)
class Checkpoint:
    """One committed state of one member."""

    step: int
    files: dict[str, bytes]


class RunStore:
    """Reads and writes a run directory; every method leaves it loadable."""

    def __init__(self, uri: str, epoch: int | None = None) -> None:
        """Open a run directory to read it; to write to it for its holder, as a worker does, give the holder's epoch."""
        self.storage = Storage(uri)
        self._lock = Lock(self.storage, epoch)
        self._log = EventLog(self.storage)

    @classmethod
    def for_spec(cls, spec: RunSpec) -> RunStore:
        """Return the store of a spec's run directory, ``storage_path/name``."""
        separator = "" if spec.storage_path.endswith("/") else "/"
        return cls(f"{spec.storage_path}{separator}{spec.run_name()}")

    @property
    def uri(self) -> str:
        """Where the run directory is."""
        return self.storage.uri

    @property
    def epoch(self) -> int | None:
        """The number of the holder that is written for, or None if nobody's."""
        return self._lock.epoch

    def write_for(self, epoch: int | None) -> None:
        """Write for another holder of the directory from now on, as a worker does whose coordinator was replaced."""
        self._lock.epoch = epoch

    # --- the spec -----------------------------------------------------------------------------------
    def is_begun(self) -> bool:
        """Return whether there is a run.

        Raises:
            RunDirectoryError: the directory holds something that is not a run.
        """
        if not self.storage.exists("spec.yaml"):
            others = [n for n in self.storage.list() if n not in (LOCK, BEFORE_EPOCHS)]
            if others:
                raise RunDirectoryError(
                    f"{self.uri}: is not empty and holds no run (it has {', '.join(others[:3])})",
                    "choose another name or storage_path",
                )
            return False
        return True

    def check_spec(self, spec: RunSpec) -> bool:
        """Return whether just this run was begun before.

        Raises:
            RunDirectoryError: the directory holds another run, or something that is not a run.
        """
        if not self.is_begun():
            return False
        differences = diff_specs(self.read_spec(), spec)
        if differences:
            raise RunDirectoryError(
                f"{self.uri}: holds a run of another spec:\n  " + "\n  ".join(differences),
                "choose another name, or delete that run",
            )
        return True

    def write_spec(self, spec: RunSpec) -> None:
        """Record the spec that the run was begun with, and where its local files and folders are."""
        self._lock.check()
        self.storage.write("spec.yaml", dump_spec(spec).encode())
        places = places_here(spec)
        if places or self.storage.exists(_PATHS):
            self.write_json(_PATHS, recorded(places, self._folder))

    def read_spec(self) -> RunSpec:
        """Return the recorded spec; it looks for its files and folders where they are now, if they moved with the run.

        Raises:
            RunDirectoryError: there is no run here.
        """
        try:
            text = self.storage.read("spec.yaml").decode()
        except FileNotFoundError:
            raise RunDirectoryError(f"{self.uri}: there is no run here", "give a run directory") from None
        spec = parse_spec(text, where=f"{self.uri}/spec.yaml")
        return located(spec, found_again(self.read_json(_PATHS) or {}, self._folder))

    @property
    def _folder(self) -> str | None:
        return self.storage.root if self.storage.is_local else None

    def spec_in_place(self) -> RunSpec:
        """Return the recorded spec under the name and path where the run directory now is: it may have been moved.

        Raises:
            RunDirectoryError: there is no run here.
        """
        parent, _, name = self.uri.rpartition("/")
        return self.read_spec().model_copy(update={"storage_path": parent, "name": name})

    # --- the event log ------------------------------------------------------------------------------
    def append_event(self, event: Mapping[str, Any]) -> None:
        """Add one event to the durable log. Raises: LostRunError if another process has taken the run over."""
        self._lock.check()
        self._log.append(event)

    def read_events(self) -> list[dict[str, Any]]:
        """Return the events in order; a last line torn by a crash is left out. Raises: StoreError for what is none."""
        return self._log.read()

    def has_events(self) -> bool:
        """Return whether there is a log."""
        return self._log.exists()

    # --- checkpoints --------------------------------------------------------------------------------
    def commit_checkpoint(self, unit: str, step: int, files: Mapping[str, bytes]) -> None:
        """Commit a member's state after a step."""
        commit.commit(self.storage, f"checkpoints/{unit}/step-{step:06d}", files, self._lock)

    def prune_checkpoints(self, unit: str, step: int, num_to_keep: int) -> None:
        """Delete what is newer than the current step, from a run that went on and was taken back, and the oldest."""
        self._lock.check()
        names = self._steps(unit)
        current = [name for name in names if name <= f"step-{step:06d}"]
        for name in set(names) - set(current[-num_to_keep:]):
            self.storage.delete(f"checkpoints/{unit}/{name}")

    def checkpoint_steps(self, unit: str) -> list[int]:
        """Return the steps with a commit that verifies, oldest first; leftovers of a crash are swept."""
        commit.sweep(self.storage, f"checkpoints/{unit}")
        names = [n for n in self._steps(unit) if commit.is_committed(self.storage, f"checkpoints/{unit}/{n}")]
        return [int(n.removeprefix("step-")) for n in names]

    def load_checkpoint(self, unit: str, step: int) -> Checkpoint:
        """Return the state committed after a step.

        Raises:
            StoreError: it does not verify.
        """
        return Checkpoint(step, commit.load(self.storage, f"checkpoints/{unit}/step-{step:06d}"))

    def discard_checkpoints(self, unit: str) -> None:
        """Free the space of a unit that is finished; its result is committed and nothing is left to resume."""
        self._lock.check()
        self.storage.delete(f"checkpoints/{unit}")

    def _steps(self, unit: str) -> list[str]:
        names = self.storage.list(f"checkpoints/{unit}")
        return [n for n in names if n.startswith("step-") and ".tmp-" not in n]

    # --- results ------------------------------------------------------------------------------------
    def commit_result(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Publish a finished part of the run, such as ``members/member-000``."""
        commit.commit(self.storage, folder, files, self._lock)

    def has_result(self, folder: str) -> bool:
        """Return whether a finished part is there and verifies."""
        return commit.is_committed(self.storage, folder)

    def damage_of(self, folder: str) -> str:
        """Return in words what is wrong with a finished part, or nothing if it verifies."""
        return commit.damage_of(self.storage, folder)

    def load_result(self, folder: str) -> dict[str, bytes]:
        """Return a finished part's files.

        Raises:
            StoreError: it is not there or does not verify.
        """
        return commit.load(self.storage, folder)

    def commit_files(
        self, folder: str, sources: Mapping[str, Path], listing: Mapping[str, Mapping[str, Any]],
        on_bytes: commit.OnBytes = lambda count: None,
    ) -> None:
        """Publish files of this machine, of any size. Raises: StoreError if one is not what a listing says."""
        commit.commit_files(self.storage, folder, sources, listing, on_bytes, self._lock)

    def folder_here(self, folder: str) -> Path | None:
        """Return this machine's copy of a finished part, fetched once and compared; None of a part on a disk.

        Raises:
            StoreError: it is not there, or does not verify, or does not find room.
        """
        if self.storage.is_local:
            return None
        manifest = commit.manifest_of(self.storage, folder)
        key = str(commit.identity_of(manifest)["sha256"])
        return node_copy(self.storage, folder, key, folder.rpartition("/")[2])

    def load_shared(self, folder: str) -> dict[str, bytes]:
        """Return the files of a part that all workers read: of one in a bucket, from this machine's copy.

        Raises:
            StoreError: as :meth:`load_result`, :meth:`folder_here`.
        """
        there = self.folder_here(folder)
        if there is None:
            return self.load_result(folder)
        return {path.relative_to(there).as_posix(): path.read_bytes() for path in there.rglob("*") if path.is_file()}

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        self._lock.check()
        self.storage.write(name, json.dumps(content, indent=1, allow_nan=False).encode())

    def read_json(self, name: str) -> Any:
        """Return a JSON file's content, or None if there is none. Raises: StoreError for what is not JSON."""
        if not self.storage.exists(name):
            return None
        try:
            return json.loads(self.storage.read(name))
        except ValueError:
            raise StoreError(f"{self.uri}/{name}: is damaged: it is not JSON", f"raylora verify {self.uri}") from None

    def seal(self, members: Sequence[str]) -> None:
        """Write the seal of everything that the run has committed."""
        self._lock.check()
        seal(self.storage, members)

    # --- one writer ---------------------------------------------------------------------------------
    def lock(self, facts: Mapping[str, Any] | None = None) -> None:
        """Claim the directory for this process and sweep what a killed one left half written.

        Args:
            facts: written beside the holder's name, for whoever looks for it.

        Raises:
            RunDirectoryError: another living process holds it; the message names it.
        """
        self._log.write_as(self._lock.take(facts))
        for parent in ("", *_FOLDERS, *(f"checkpoints/{unit}" for unit in self.storage.list("checkpoints"))):
            commit.sweep(self.storage, parent)

    def check_unlocked(self) -> None:
        """Raise RunDirectoryError if another living process holds the directory; the message names it."""
        self._lock.check_free()

    def holder(self) -> Holder | None:
        """Return who holds the directory, or held it when it died; None if nobody does."""
        return self._lock.holder()

    @contextmanager
    def held(self, facts: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Hold the directory, with a heartbeat that holders on other machines are judged by.

        Raises:
            RunDirectoryError: another living process holds it; the message names it.
        """
        self.lock(facts)
        done = threading.Event()

        def beat() -> None:
            while not done.wait(_BEAT_S):
                try:
                    self.beat()
                except Exception as error:  # the next one may get through; whoever is silent for long is replaced
                    logger.warning("%s: no heartbeat: %s", self.uri, error)

        heart = threading.Thread(target=beat, daemon=True)
        heart.start()
        try:
            yield
        finally:
            done.set()
            heart.join()
            self.unlock()

    def beat(self) -> None:
        """Show that the holder is alive."""
        self._lock.beat()

    def unlock(self) -> None:
        """Give the directory up, if it is this process's."""
        self._lock.release()
        self._log.write_as(None)
