"""The durable record of one run: the run directory is the truth, actors are disposable."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from raylora.errors import RunDirectoryError, StoreError
from raylora.spec import RunSpec, diff_specs, dump_spec, parse_spec
from raylora.spec.paths import found_again, located, places_here, recorded
from raylora.store import commit
from raylora.store.storage import Storage

_LOCK = "run.lock"
_PATHS = "paths.json"
_FIELDS = {"host", "pid", "heartbeat", "started_at"}
STALE_S = 60.0
"""A holder on another machine whose heartbeat is older is dead."""
_BEAT_S = 10.0
_FOLDERS = ("members", "baselines", "predictions", "snapshots", "timing", "targets", "export", "blocks", "shards")


@dataclass(frozen=True)
class Checkpoint:
    """One committed state of one member."""

    step: int
    files: dict[str, bytes]


@dataclass(frozen=True)
class Holder:
    """The process that holds a run directory."""

    host: str
    pid: int
    heartbeat: float
    is_alive: bool
    facts: Mapping[str, Any]
    """What it wrote about itself, such as the address of the Ray cluster that it is in."""


class RunStore:
    """Reads and writes a run directory; every method leaves it loadable."""

    def __init__(self, uri: str) -> None:
        self.storage = Storage(uri)

    @classmethod
    def for_spec(cls, spec: RunSpec) -> RunStore:
        """Return the store of a spec's run directory, ``storage_path/name``."""
        separator = "" if spec.storage_path.endswith("/") else "/"
        return cls(f"{spec.storage_path}{separator}{spec.run_name()}")

    @property
    def uri(self) -> str:
        """Where the run directory is."""
        return self.storage.uri

    # --- the spec -----------------------------------------------------------------------------------
    def is_begun(self) -> bool:
        """Return whether there is a run.

        Raises:
            RunDirectoryError: the directory holds something that is not a run.
        """
        if not self.storage.exists("spec.yaml"):
            others = [n for n in self.storage.list() if n != _LOCK]
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
        """Add one event to the durable log."""
        self.storage.append("events.jsonl", json.dumps(event, sort_keys=True).encode() + b"\n")

    def read_events(self) -> list[dict[str, Any]]:
        """Return the events in order; a last line torn by a crash is left out."""
        if not self.storage.exists("events.jsonl"):
            return []
        lines = self.storage.read("events.jsonl").split(b"\n")[:-1]  # what follows the last line end is torn
        events = []
        for number, line in enumerate(lines, 1):
            try:
                events.append(json.loads(line))
            except ValueError:
                raise StoreError(f"{self.uri}/events.jsonl:{number}: is not an event") from None
        return events

    # --- checkpoints --------------------------------------------------------------------------------
    def commit_checkpoint(self, unit: str, step: int, files: Mapping[str, bytes]) -> None:
        """Commit a member's state after a step."""
        commit.commit(self.storage, f"checkpoints/{unit}/step-{step:06d}", files)

    def prune_checkpoints(self, unit: str, step: int, num_to_keep: int) -> None:
        """Delete what is newer than the current step, from a run that went on and was taken back, and the oldest."""
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
        self.storage.delete(f"checkpoints/{unit}")

    def _steps(self, unit: str) -> list[str]:
        names = self.storage.list(f"checkpoints/{unit}")
        return [n for n in names if n.startswith("step-") and ".tmp-" not in n]

    # --- results ------------------------------------------------------------------------------------
    def commit_result(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Publish a finished part of the run, such as ``members/member-000``."""
        commit.commit(self.storage, folder, files)

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

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        self.storage.write(name, json.dumps(content, indent=1, allow_nan=False).encode())

    def read_json(self, name: str) -> Any:
        """Return a JSON file's content, or None if there is none. Raises: StoreError for what is not JSON."""
        if not self.storage.exists(name):
            return None
        try:
            return json.loads(self.storage.read(name))
        except ValueError:
            raise StoreError(f"{self.uri}/{name}: is damaged: it is not JSON", f"raylora verify {self.uri}") from None

    # --- one writer ---------------------------------------------------------------------------------
    def lock(self, facts: Mapping[str, Any] | None = None) -> None:
        """Claim the directory for this process and sweep what a killed one left half written.

        Args:
            facts: written beside the holder's name, for whoever looks for it.

        Raises:
            RunDirectoryError: another living process holds it; the message names it.
        """
        self.check_unlocked()
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "process_started": psutil.Process().create_time(),
                "started_at": time.time(), "heartbeat": time.time(), "facts": dict(facts or {})}
        content = json.dumps(mine).encode()
        if not self.storage.create(_LOCK, content):
            self.check_unlocked()  # another process may have been faster by a moment
            self.storage.write(_LOCK, content)  # what is left of a holder that died
        for parent in ("", *_FOLDERS, *(f"checkpoints/{unit}" for unit in self.storage.list("checkpoints"))):
            commit.sweep(self.storage, parent)

    def check_unlocked(self) -> None:
        """Raise RunDirectoryError if another living process holds the directory; the message names it."""
        holder = self._read_lock()
        if _alive(holder):
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["started_at"]))
            raise RunDirectoryError(
                f"{self.uri}: is in use by process {holder['pid']} on {holder['host']}, started {started}",
                "wait for it, or stop it",
            )

    def holder(self) -> Holder | None:
        """Return who holds the directory, or held it when it died; None if nobody does."""
        found = self._read_lock()
        if not set(found) >= _FIELDS:
            return None
        return Holder(found["host"], found["pid"], found["heartbeat"], _is_there(found), found.get("facts", {}))

    def _read_lock(self) -> dict[str, Any]:
        try:
            return self.read_json(_LOCK) or {}
        except StoreError:
            return {}

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
                self.beat()

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
        holder = self.read_json(_LOCK) or {}
        if holder.get("pid") == os.getpid() and holder.get("host") == socket.gethostname():
            self.storage.write(_LOCK, json.dumps({**holder, "heartbeat": time.time()}).encode())

    def unlock(self) -> None:
        """Give the directory up, if it is this process's."""
        holder = self.read_json(_LOCK) or {}
        if holder.get("pid") == os.getpid() and holder.get("host") == socket.gethostname():
            self.storage.delete(_LOCK)


def _alive(holder: Mapping[str, Any]) -> bool:
    """Return whether another process is alive and holds a directory."""
    if not set(holder) >= _FIELDS:
        return False
    mine = holder["host"] == socket.gethostname() and holder["pid"] == os.getpid()
    return not mine and _is_there(holder)


def _is_there(holder: Mapping[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return bool(time.time() - holder["heartbeat"] < STALE_S)
    try:
        started = psutil.Process(int(holder["pid"])).create_time()
    except psutil.NoSuchProcess:
        return False
    # A process id is used again after a while; another start time is another process.
    return bool(abs(started - holder.get("process_started", started)) < 1.0)
