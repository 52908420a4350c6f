"""A run in a Ray cluster, as a driver, a notebook or another process holds it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from raylora import control
from raylora.actors.calls import first_line
from raylora.actors.coordinator import coordinator_name
from raylora.connection import put_away
from raylora.display.notebook import run_html
from raylora.display.progress import ShownStatus
from raylora.engine.run.local_driver import conclude, signals_handled_by
from raylora.engine.run.roster import read_state
from raylora.engine.run.run_status import OnStatus, RunStatus
from raylora.errors import RayloraError, TrainingError
from raylora.records import RunMetrics
from raylora.report.publish import publish_report
from raylora.store.run_store import RunStore

_POLL_S = 0.5


@contextlib.contextmanager
def shown(on_status: OnStatus | None) -> Iterator[OnStatus]:
    """Give a run's progress to who asked for it, else show it."""
    if on_status is not None:
        yield on_status
        return
    with ShownStatus() as show:
        yield show


class RunHandle:
    """A run in a Ray cluster."""

    def __init__(
        self, coordinator: Any, store: RunStore, base: list[Any] | None = None, keeper: Any = None
    ) -> None:
        """Follow a run; given a reference to its base, drive it too, and again if its coordinator is restarted.

        Args:
            keeper: who owns the workers. It is held here: Ray ends an actor of whom nobody alive has a handle.
        """
        self.store = store
        self._coordinator, self._base, self._keeper = coordinator, base, keeper
        self._outcome = coordinator.run.remote(base) if base is not None else None
        self.on_end: Callable[[], object] = lambda: None
        """Called when the run has been followed to its end."""

    def __repr__(self) -> str:
        state = read_state(self.store)
        done, asked = len(set(state.required) & set(state.finished_units())), self.store.read_spec().ensemble.members
        return f"<raylora run {self.uri}: {state.phase.value}, {done} of {asked} members finished>"

    def _repr_html_(self) -> str:
        """Return how a notebook shows the run: its members, and how far each is."""
        return run_html(self.store)

    @property
    def uri(self) -> str:
        """Where the run directory is."""
        return self.store.uri

    def status(self) -> RunStatus:
        """Return phase, workers, progress per job and an estimate of the time left."""
        return ray.get(self._coordinator.status.remote())

    def has_ended(self) -> bool:
        """Return whether the run is over, or its coordinator lost; waits for nothing."""
        if self._outcome is not None:
            return bool(ray.wait([self._outcome], timeout=0)[0])
        return read_state(self.store).phase.terminal

    def events(self, follow: bool = True) -> Iterator[dict[str, Any]]:
        """Yield what the run's log records, from its beginning: ``{"event": "JobFinished", "at": ..., ...}``.

        Args:
            follow: go on until the run has ended; else end with what there is.
        """
        told = 0
        while True:
            ended = not follow or self.has_ended()  # asked first: what is written before the end is told, too
            found = self.store.read_events()
            yield from found[told:]
            told = len(found)
            if ended:
                return
            time.sleep(_POLL_S)

    def metrics(self) -> RunMetrics | None:
        """Return the run's metrics, or None as long as it has none."""
        return self.store.read_json("metrics.json")

    def result(self, timeout_s: float | None = None) -> RunMetrics:
        """Return the metrics of the run when it has ended, and show nothing meanwhile.

        Raises:
            TimeoutError: it has not ended in time; it goes on.
            Interrupted, TrainingError, UsageError: as :meth:`wait`.
        """
        if timeout_s is not None:
            deadline = time.monotonic() + timeout_s
            while not self.has_ended():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.uri}: has not ended within {timeout_s:g} s; it goes on")
                time.sleep(min(_POLL_S, timeout_s))
        return self.wait(lambda status: None)

    def cancel(self, timeout_s: float = 60.0) -> bool:
        """Let the run commit and stop, and return whether it has ended by then; ``raylora resume`` goes on with it."""
        self.interrupt(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while not self.has_ended() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return self.has_ended()

    # --- for event loops: each in a thread of its own ----------------------------------------------
    async def wait_async(self, on_status: OnStatus = lambda status: None) -> RunMetrics:
        """As :meth:`wait`, without blocking the event loop; by default nothing is shown."""
        return await asyncio.to_thread(self.wait, on_status)

    async def status_async(self) -> RunStatus:
        """As :meth:`status`."""
        return await asyncio.to_thread(self.status)

    async def result_async(self, timeout_s: float | None = None) -> RunMetrics:
        """As :meth:`result`."""
        return await asyncio.to_thread(self.result, timeout_s)

    async def cancel_async(self, timeout_s: float = 60.0) -> bool:
        """As :meth:`cancel`."""
        return await asyncio.to_thread(self.cancel, timeout_s)

    async def events_async(self, follow: bool = True) -> AsyncIterator[dict[str, Any]]:
        """As :meth:`events`."""
        found, end = self.events(follow), object()
        while (event := await asyncio.to_thread(next, found, end)) is not end:
            yield cast(dict[str, Any], event)

    def interrupt(self, signal_number: int = signal.SIGINT) -> None:
        """Ask the run to commit and stop after the current step."""
        self._coordinator.interrupt.remote(int(signal_number))

    def wait(self, on_status: OnStatus | None = None) -> RunMetrics:
        """Follow the run to its end, write the report and return the metrics.

        A SIGINT or SIGTERM meanwhile lets the workers commit before this returns. Without ``on_status`` progress is
        shown on stderr: a table on a terminal, a bar in a notebook, else lines.

        Raises:
            Interrupted: the run was stopped and can be resumed.
            TrainingError: it failed, or its coordinator was lost.
            UsageError: it could not start.
        """
        with shown(on_status) as show:
            metrics = self.join(show)
        publish_report(self.store)
        return metrics

    def join(self, on_status: OnStatus = lambda status: None) -> RunMetrics:
        """Follow the run to its end as :meth:`wait`, but write no report."""
        with signals_handled_by(self.interrupt):
            try:
                state = self._final_state(on_status)
            except RayloraError:
                if self._outcome is not None:  # it is over, and nobody has a use for who directed it
                    self._put_away()
                raise
            finally:
                self.on_end()
        if self._outcome is not None or ray.get(self._coordinator.is_detached.remote()):
            self._put_away()
        metrics = self.store.read_json("metrics.json")
        found: RunMetrics = metrics if metrics is not None else {}
        return conclude(state, found, self.uri)

    def _put_away(self) -> None:
        put_away(self._coordinator, coordinator_name(self.uri))

    def _final_state(self, on_status: OnStatus) -> control.State:
        while True:
            try:
                return self._followed(on_status)
            except ActorUnavailableError:  # its process died, and Ray starts another that goes on from the log
                time.sleep(_POLL_S)
                if self._outcome is not None:
                    self._outcome = self._coordinator.run.remote(self._base)
            except RayTaskError as error:
                if isinstance(error.cause, RayloraError):
                    raise error.cause from None
                raise
            except RayActorError as error:
                raise TrainingError(
                    f"the run's coordinator was lost: {first_line(error)}",
                    f"nothing committed is lost: raylora resume {self.uri}",
                ) from error

    def _followed(self, on_status: OnStatus) -> control.State:
        while self._outcome is None or not ray.wait([self._outcome], timeout=_POLL_S)[0]:
            status = self.status()
            on_status(status)
            if self._outcome is None:
                if status.phase.terminal:
                    return control.replay(control.from_record(r) for r in self.store.read_events())
                time.sleep(_POLL_S)
        state = ray.get(self._outcome)
        with contextlib.suppress(RayActorError):
            on_status(self.status())
        return state
