"""A run's trackers beside its training: told in a thread of their own, which no training waits for or fails with."""

from __future__ import annotations

import hashlib
import logging
import queue
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextvars import copy_context
from pathlib import Path
from typing import Any

from raylora import registry
from raylora.engine.training.trainer import PackTrainer
from raylora.progress import Progress
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore
from raylora.tracking.base import TrackedRun, Tracker

logger = logging.getLogger(__name__)

_GRACE_S = 10.0
"""How long the end of a job waits for trackers that are behind."""
ENSEMBLE = "ensemble"


def check_trackers(spec: RunSpec) -> None:
    """Refuse trackers that cannot work here. Raises: SpecError."""
    for tracker in spec.tracking:
        registry.load("tracker", tracker.kind).check(tracker)


class Tracking:
    """All trackers of a spec. One that fails is warned of and told nothing more; the others go on."""

    def __init__(self, spec: RunSpec, store: RunStore) -> None:
        """Start the thread; in it the trackers are built, which may mean connecting to a server."""
        self.spec, self.store = spec, store
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._trackers: dict[str, Tracker] = {}
        self._copied: dict[str, tuple[int, int]] = {}
        needed = spec.tracking and not store.storage.is_local
        self._temporary = tempfile.TemporaryDirectory(prefix="raylora-tracking-") if needed else None
        self._folder = Path(self._temporary.name if self._temporary else store.storage.root)
        self._thread: threading.Thread | None = None
        if spec.tracking:  # in this one's context, so that its lines in the log name the run and the members
            self._thread = threading.Thread(target=copy_context().run, args=(self._work,), daemon=True)
            self._thread.start()

    def begin(self, subject: str, after_step: int) -> None:
        """Begin with a member or the ensemble, or go on after a step."""
        self._calls.put(lambda: self._tell("begin", subject, after_step))

    def log(self, subject: str, step: int, values: Mapping[str, float]) -> None:
        """Hand values on."""
        self._calls.put(lambda: self._tell("log", subject, step, values))

    def flush(self) -> None:
        """Have what was handed on kept, in the run directory too where that is elsewhere."""
        self._calls.put(lambda: self._tell("flush"))
        self._calls.put(self._publish)

    def close(self, complete: bool) -> None:
        """End, within some seconds whatever the trackers do."""
        if self._thread is None:
            return
        self._calls.put(lambda: self._tell("close", complete))
        self._calls.put(self._publish)
        self._calls.put(None)
        self._thread.join(_GRACE_S)
        if self._thread.is_alive():
            logger.warning("tracking is behind by more than %.0f s; what it has not shown by now is lost", _GRACE_S)
        elif self._temporary is not None:
            self._temporary.cleanup()

    # --- in the thread ------------------------------------------------------------------------------
    def _work(self) -> None:
        for spec in self.spec.tracking:
            with _Warning(f"tracking: {spec.kind} cannot be used"):
                self._trackers[spec.kind] = registry.load("tracker", spec.kind).build(spec, self._run())
        while (call := self._calls.get()) is not None:
            call()

    def _run(self) -> TrackedRun:
        first = (self.store.read_events() or [{}])[0].get("at", 0.0)  # no other run here began at that moment
        key = hashlib.sha256(f"{self.store.uri} {first}".encode()).hexdigest()[:12]
        return TrackedRun(self.spec.run_name(), key, self._folder, self.spec.model_dump(mode="json"))

    def _tell(self, method: str, *arguments: Any) -> None:
        for kind, tracker in list(self._trackers.items()):
            with _Warning(f"tracking: {kind} failed and is told nothing more") as caught:
                getattr(tracker, method)(*arguments)
            if caught.failed:
                del self._trackers[kind]

    def _publish(self) -> None:
        """Copy new and longer files to a run directory that is not on a local disk."""
        if self._temporary is None:
            return
        with _Warning("tracking: what was written here could not be copied to the run directory"):
            for path in sorted(p for p in self._folder.rglob("*") if p.is_file() and not p.is_symlink()):
                relative, found = path.relative_to(self._folder).as_posix(), path.stat()
                state = found.st_size, found.st_mtime_ns
                if self._copied.get(relative) != state:
                    self.store.storage.write(relative, path.read_bytes())
                    self._copied[relative] = state


class _Warning:
    """Turns an error into a line in the log: what is shown of a run must not end it."""

    def __init__(self, what: str) -> None:
        self.what, self.failed = what, False

    def __enter__(self) -> _Warning:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.failed = isinstance(error, Exception)
        if self.failed:
            logger.warning("%s: %s: %s", self.what, type(error).__name__, error)
        return self.failed


class TrackedPack:
    """Shows what the histories of a pack's members gain while it trains."""

    def __init__(self, tracking: Tracking, trainer: PackTrainer) -> None:
        """Take a trainer that has been taken back to where it goes on; what its members' histories hold was shown."""
        self.tracking, self.trainer = tracking, trainer
        self.shown = dict[str, int]()
        self.tokens, self.seconds = 0, 0.0
        for state in trainer.states:
            self._begin(state.plan.name, len(state.history), trainer.own_step(state))

    def _begin(self, name: str, shown: int = 0, step: int = 0) -> None:
        self.shown[name] = shown
        self.tracking.begin(name, step)

    def step(self, progress: Progress) -> None:
        """Show a step, if the members recorded it."""
        self.tokens += progress.tokens
        self.seconds += progress.seconds
        if self._show_new():
            self.tokens, self.seconds = 0, 0.0

    def commit(self) -> None:
        """Show what came since, such as an epoch's validation, and keep it: the members' state was committed."""
        self._show_new()
        self.tracking.flush()

    def _show_new(self) -> bool:
        found = False
        for state in self.trainer.states:
            name = state.plan.name
            if name not in self.shown:  # it has got the place of another
                self._begin(name)
            for record in state.history[self.shown[name]:]:
                found = True
                values = _named(record)
                if "loss" in record and self.seconds:
                    values["train/pack_tokens_per_s"] = self.tokens / self.seconds
                self.tracking.log(name, int(record["step"]), values)
            self.shown[name] = len(state.history)
        return found


def track_results(spec: RunSpec, store: RunStore, metrics: Mapping[str, Any]) -> None:
    """Show what the ensemble scores on each set."""
    tracking = Tracking(spec, store)
    tracking.begin(ENSEMBLE, 0)
    for name, scores in metrics["ensemble"]["eval"].items():
        tracking.log(ENSEMBLE, 0, {
            f"{name}/{key}": float(value) for key, value in scores.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        })
    for name, answers in (metrics.get("answers") or {"sets": {}})["sets"].items():
        scores = answers["ensemble"].get("metrics", {})
        if scores:
            tracking.log(ENSEMBLE, 0, {f"{name}/{key}": one["value"] for key, one in scores.items()})
    tracking.close(complete=True)


def _named(record: Mapping[str, float]) -> dict[str, float]:
    """Return a line of a history under the names that it is shown by."""
    before, after = "validation_", "validation/"
    return {
        after + key.removeprefix(before) if key.startswith(before) else f"train/{key}": value
        for key, value in record.items() if key != "step"
    }
