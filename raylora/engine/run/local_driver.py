"""Drive a run in this process: the same state machine and the same session as on a cluster, without Ray."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from raylora import control
from raylora.engine.model.machine import compute_device
from raylora.engine.quantization.quantize_base import ensure_prepared
from raylora.engine.run.run_status import OnStatus, StatusBoard
from raylora.engine.run.session import TrainingSession
from raylora.engine.run.work import Session, Work
from raylora.engine.training.distillation_loss import task_of
from raylora.errors import Interrupted, PlacementError, RayloraError, TrainingError, UsageError
from raylora.progress import BlockDone, Leaving, Progress

Metrics = TypeVar("Metrics", bound=Mapping[str, Any])


def run_in_process(
    prepared: Work, on_status: OnStatus = lambda status: None, leaving: Leaving | None = None,
) -> Mapping[str, Any]:
    """Train, evaluate and aggregate a prepared run (or make targets), job after job, and return its metrics.

    ``on_status`` is told after every event, step and batch of rows: whoever shows it decides how often.

    A training run's members can be ended by ``leaving``, which is asked whenever an epoch's end has been told.

    The packs and threads are the plan's: by the same plan the members are equal to Ray's, bit for bit.

    Raises:
        PlacementError: the plan takes several processes that work together.
        Interrupted: a signal came; everything is committed and the run can be resumed.
        TrainingError: the run failed.
    """
    store = prepared.store
    if prepared.plan.ranks > 1:
        raise PlacementError(
            "placement: shard and data_parallel take several processes that work together, and this run has one",
            "run it on Ray (without --local), or use placement.strategy replicate and data_parallel 1",
        )
    with store.held():
        prepared.begin()
        return _Driver(prepared, on_status, leaving).run()


class _Driver:
    """Folds events through the transition and carries the commands out, one at a time."""

    def __init__(self, prepared: Work, on_status: OnStatus, leaving: Leaving | None) -> None:
        self.prepared, self.store, self.on_status, self.leaving = prepared, prepared.store, on_status, leaving
        self.board = StatusBoard(prepared.spec.run_name())
        self.signal_number = 0
        self.session: Session | None = None
        self.metrics: Mapping[str, Any] = {}
        self.error: BaseException | None = None
        self.state = control.replay(control.from_record(r) for r in self.store.read_events())

    def run(self) -> Mapping[str, Any]:
        with signals_handled_by(self._interrupted):
            queue: list[control.Event] = [self.prepared.start_event(["worker-0"])]
            while queue:
                event = queue.pop(0)
                self.store.append_event({**control.to_record(event), "at": time.time()})
                self.state, commands = control.transition(self.state, event)
                self.on_status(self.board.status(self.state))
                for command in commands:
                    queue += self._carry_out(command)
        return conclude(self.state, self.metrics, self.store.uri, self.error)

    def _carry_out(self, command: control.Command) -> list[control.Event]:
        if isinstance(command, control.PrepareBase):
            return self._prepare_base()
        if isinstance(command, control.StartWorker):
            return [self._start_worker(command.worker)]
        if isinstance(command, control.RunJob):
            return self._run_job(command)
        if isinstance(command, control.Aggregate):
            assert self.session is not None
            try:
                self.metrics = self.session.aggregate(command.units, self.board.started_at)
            except RayloraError as error:
                self.error = error
                return [control.AggregationFailed(str(error))]
            return [control.Aggregated()]
        return []

    def _prepare_base(self) -> list[control.Event]:
        plan, base = self.prepared.plan, self.prepared.base
        assert base is not None
        torch.set_num_threads(plan.cpus_per_worker * plan.workers * plan.ranks)
        spec = self.prepared.spec
        task = task_of(spec)
        try:
            ensure_prepared(
                spec.base, task, base, compute_device(plan.gpus_per_worker),
                report=self._block_done, should_stop=lambda: self.signal_number,
            )
        except Interrupted:
            return [control.InterruptRequested(self.signal_number), control.PreparationInterrupted()]
        except RayloraError as error:
            self.error = error
            return [control.BaseFailed(str(error))]
        stop = [control.InterruptRequested(self.signal_number)] if self.signal_number else []
        return [*stop, control.BasePrepared()]

    def _start_worker(self, worker: str) -> control.Event:
        prepared, plan = self.prepared, self.prepared.plan
        self.session = prepared.assignment.make_session(
            prepared.spec, prepared.store, plan.cpus_per_worker, plan.gpus_per_worker
        )
        if self.leaving is not None:
            assert isinstance(self.session, TrainingSession), "only members that train can leave"
            self.session.leaving = self.leaving
        try:
            self.session.load()
        except RayloraError as error:
            self.error = error
            return control.WorkerLost(worker, str(error))
        return control.WorkerReady(worker)

    def _run_job(self, command: control.RunJob) -> list[control.Event]:
        assert self.session is not None
        try:
            failed = self.session.run_job(
                command.job, command.units, lambda progress: self._progress(command.job, progress),
                lambda: self.signal_number,
            )
        except Interrupted:
            stop = control.InterruptRequested(self.signal_number)
            return [stop, control.JobInterrupted(command.job, command.attempt)]
        except RayloraError as error:
            self.error = error
            return [control.JobFailed(command.job, command.attempt, str(error), fatal=True)]
        events: list[control.Event] = [control.JobFinished(command.job, command.attempt, failed)]
        return events if not self.signal_number else [control.InterruptRequested(self.signal_number), *events]

    def _block_done(self, done: BlockDone) -> None:
        self.board.preparation = done
        self.on_status(self.board.status(self.state))

    def _progress(self, job: str, progress: Progress) -> None:
        self.board.report(job, progress)
        self.on_status(self.board.status(self.state))

    def _interrupted(self, signal_number: int) -> None:
        self.signal_number = signal_number


def conclude(
    state: control.State, metrics: Metrics, uri: str, error: BaseException | None = None
) -> Metrics:
    """Return the metrics of a run that ended well, and raise what a run that did not ends with.

    Raises:
        Interrupted: it can be resumed.
        UsageError: it could not start because of its input.
        TrainingError: it failed.
    """
    if state.phase is control.Phase.INTERRUPTED:
        raise Interrupted(
            f"run stopped by signal {state.signal_number}; all members are committed",
            f"raylora resume {uri}", state.signal_number,
        )
    if state.phase is control.Phase.FAILED:
        if isinstance(error, UsageError):
            raise error
        raise TrainingError(f"run failed: {state.reason}", f"fix the cause, then: raylora resume {uri}") from error
    return metrics


@contextmanager
def signals_handled_by(handler: Callable[[int], None]) -> Iterator[None]:
    """Give SIGINT and SIGTERM to a handler for a while; in a thread other than the main one there are none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, frame: handler(n)) for number in caught}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
