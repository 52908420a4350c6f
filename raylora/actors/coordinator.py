"""The coordinator actor: folds events through ``control.transition`` and carries the commands out.

It decides nothing and keeps nothing that the event log does not hold: if it dies, a new one replays the
log. Tensors never pass through it; workers read and write the store themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from raylora import control
from raylora.actors.calls import Call, GangProgress, WorkerHandle, first_line, taken_over
from raylora.actors.placing import Placing
from raylora.actors.preparer import Preparer
from raylora.actors.reporter import Reporter, dashboard_fact
from raylora.actors.sealed import Sealed
from raylora.actors.worker import this_node
from raylora.engine.run.run_status import RunStatus, StatusBoard
from raylora.engine.run.work import Assignment
from raylora.errors import Interrupted, PlacementError, RayloraError
from raylora.placement.plan import Plan
from raylora.progress import BlockDone, Progress
from raylora.spec import PlacementSpec, RunSpec
from raylora.store.inputs import Publication, Publisher
from raylora.store.probe import judge, look_for_probe, remove_probe
from raylora.store.run_store import RunStore

logger = logging.getLogger(__name__)

NAMESPACE = "raylora"
RAY_ADDRESS = "ray_address"
"""Under this name the holder of a run directory says in which cluster it is."""
_POLL_S = 0.2
_STATUS_S = 2.0
_STOP_S = 120.0
"""So long a worker whose coordinator died may take to end its step and commit."""
_RESTARTS = 3
"""How often a coordinator's process may die."""


def coordinator_name(uri: str) -> str:
    """Return the name under which a run's coordinator is found in the namespace.

    It ends in a hash of the directory: two people on one cluster may both have a run called ``quickstart``.
    """
    run_name = uri.rstrip("/").rpartition("/")[2]
    return f"coordinator-{run_name}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


@ray.remote(num_cpus=0, max_restarts=_RESTARTS, max_concurrency=8)  # type: ignore[call-overload]
class Coordinator:
    """One per run. :meth:`run` is called once; the other methods answer while it runs.

    If its process dies, Ray starts another, which reads the log and goes on: the driver calls :meth:`run` again;
    a detached one goes on by itself.
    """

    def __init__(
        self, run: str, store_uri: str, plan: Plan, placement: PlacementSpec, start: control.RunStarted,
        spec: Sealed[RunSpec], assignment: Sealed[Assignment], keeper: Any, detached: bool = False, nonce: str = "",
    ) -> None:
        """Begin nothing yet.

        Spec and assignment go to the workers: of jobs and units the coordinator sees the names and nothing else. The
        nonce is what the driver left in the run directory: here and at every worker it has to be found. The keeper owns
        the workers.
        """
        self.run_name, self.store, self.plan, self.base = run, RunStore(store_uri), plan, list[Any]()
        self.spec, self.assignment = spec, assignment
        self.start, self.detached, self.nonce = start, detached, nonce
        self._outcome: Future[control.State] | None = None
        self._running = threading.Lock()
        self.preparer: Any = None
        self.events: queue.Queue[control.Event] = queue.Queue()
        self.state = control.State()
        self.workers: dict[str, WorkerHandle] = {}
        self.pending: dict[Any, Call] = {}
        self.preparing: Any = None
        """The preparer's answer, while it is waited for."""
        self.gang_progress = GangProgress()
        self.board = StatusBoard(run)
        self.publisher = Publisher(self.store)
        self.reporter = Reporter(run)
        name = coordinator_name(store_uri).removeprefix("coordinator-")
        self.placing = Placing(plan, placement, NAMESPACE, keeper, name, run)
        self.kept: dict[str, WorkerHandle] = {}
        """Workers that an earlier process of this actor has left, ready for jobs."""
        self.board.nodes = self.placing.nodes
        if detached and ray.get_runtime_context().was_current_actor_reconstructed:
            threading.Thread(target=self._go_on, daemon=True).start()

    def __repr__(self) -> str:
        """Return what Ray's dashboard and log lines call it."""
        return f"raylora:{self.board.run}:coordinator"

    # --- the loop -----------------------------------------------------------------------------------
    def run(self, base: list[Any]) -> control.State:
        """Drive the run to a terminal phase, unless it is driven already, and return the final state.

        Args:
            base: a reference to the base that has to be prepared, whose calibration text goes to the preparer alone.

        Raises:
            RunDirectoryError: another process holds the run directory.
            PlacementError: the cluster did not provide the workers in time, or a node does not see the run directory.
        """
        self.base = base
        return self._driven()

    def _driven(self) -> control.State:
        with self._running:
            begun, self._outcome = self._outcome, self._outcome or Future()
        if begun is not None:
            return begun.result()
        try:
            state = self._drive()
        except BaseException as error:
            self._outcome.set_exception(error)
            raise
        self._outcome.set_result(state)
        return state

    def _drive(self) -> control.State:
        try:
            judge(self.store.uri, self.nonce, look_for_probe(self.store.uri, self.nonce, this_node()))
            with self.store.held({RAY_ADDRESS: ray.get_runtime_context().gcs_address, **dashboard_fact()}):
                try:
                    self._take_over()
                    records = self.store.read_events()
                    self.state = control.replay(control.from_record(record) for record in records)
                    self._fold(self._start_event(records))
                    self._loop()
                    return self.state
                finally:
                    self._stop_workers()
                    remove_probe(self.store.storage, self.nonce)
        finally:
            self._stop_workers()  # a directory that was not got has had none, but there is their keeper

    def _take_over(self) -> None:
        """Take the workers that an earlier process of this actor has left, once they have ended what it asked for.

        They commit for this epoch from now on, and none is at a job that another is given. Who does not get done, or
        has no base loaded, is ended, and started anew.
        """
        left = self.placing.attend(ray.get_runtime_context().current_actor)
        workers = {name: self.placing.placed(name, actors) for name, actors in left.items()}
        ready = taken_over(list(workers.values()), self.store.epoch, _STOP_S) if workers else set()
        for name, worker in workers.items():
            if name in ready and name in self.start.workers:
                self.kept[name] = worker
            else:
                self.placing.leave(name)
        if workers:
            logger.info("%d of %d workers are taken over with what they have loaded", len(self.kept), len(workers))

    def _start_event(self, records: list[dict[str, Any]]) -> control.RunStarted:
        """Return the event that begins the run; what an earlier process of this actor has prepared stays prepared."""
        if not self.start.prepare_base or not ray.get_runtime_context().was_current_actor_reconstructed:
            return self.start
        names = [record["event"] for record in records]
        since = names[len(names) - names[::-1].index("RunStarted") :] if "RunStarted" in names else []
        return replace(self.start, prepare_base="BasePrepared" not in since)

    def _go_on(self) -> None:
        """Drive the run again without being asked: whoever asked may be gone."""
        with contextlib.suppress(RayloraError):  # it is the outcome of the run for whoever asks
            self._driven()

    def _loop(self) -> None:
        said = 0.0
        while not self.state.phase.terminal or not self.events.empty():
            self._fold_events()
            self._collect()
            self.placing.look()
            if time.monotonic() - said > _STATUS_S:
                said = time.monotonic()
                self.store.write_json("status.json", self.status().record())
        self.store.write_json("status.json", self.status().record())

    def _fold_events(self) -> None:
        while not self.events.empty():
            event = self.events.get()
            if not self.state.phase.terminal:
                self._fold(event)

    def _fold(self, event: control.Event) -> None:
        self.store.append_event({**control.to_record(event), "at": time.time()})
        self.state, commands = control.transition(self.state, event)
        self.reporter.happened(event, self.state)
        for command in commands:
            self._carry_out(command)

    def _collect(self) -> None:
        """Turn finished calls into events."""
        waiting = [*self.pending, *([self.preparing] if self.preparing is not None else [])]
        if not waiting:
            time.sleep(_POLL_S)
            return
        done, _ = ray.wait(waiting, num_returns=1, timeout=_POLL_S)
        for reference in done:
            if reference is self.preparing or reference == self.preparing:
                self.preparing = None
                self.events.put(_outcome_of_preparation(reference))
                continue
            call = self.pending.pop(reference)
            event = call.take(reference)
            if call.error is not None and isinstance(call.error.cause, PlacementError):
                raise call.error.cause  # a node that does not see the run directory, which another start does not cure
            if isinstance(event, control.WorkerLost):
                self._give_up(call)
            if event is not None:
                self.events.put(event)

    def _call(self, worker: WorkerHandle, command: control.Command, references: list[Any]) -> None:
        call = Call(worker, command, set(references))
        self.pending.update(dict.fromkeys(references, call))

    def _give_up(self, call: Call) -> None:
        """End what is left of a worker of which a rank was lost."""
        for reference in call.waiting:
            self.pending.pop(reference, None)
        call.worker.kill()
        self.placing.leave(call.worker.name)

    # --- commands -----------------------------------------------------------------------------------
    def _carry_out(self, command: control.Command) -> None:
        if isinstance(command, control.PrepareBase):
            self._prepare_base()
        elif isinstance(command, control.StartWorker):
            self._start_worker(command)
        elif isinstance(command, control.RunJob):
            me = ray.get_runtime_context().current_actor
            worker = self.workers[command.worker]
            self._call(worker, command, worker.run_job(command.job, command.units, me))
        elif isinstance(command, control.ReleaseWorker):
            self._release(command.worker)
        elif isinstance(command, control.StopJobs):
            for worker in self.workers.values():
                worker.stop(self.state.signal_number)
            if self.preparer is not None:
                self.preparer.stop.remote(self.state.signal_number)
        elif isinstance(command, control.Aggregate):
            worker = self.workers[command.worker]
            self._call(worker, command, worker.aggregate(command.units, self.board.started_at))

    def _prepare_base(self) -> None:
        """Before any worker is placed: the CPUs that they will hold are free to solve layers on."""
        if not self.base:
            why = "the coordinator was restarted when nobody followed the run any more, who could say what to prepare"
            self.events.put(control.BaseFailed(why))
            return
        self.preparer = Preparer.options(num_gpus=self.plan.gpus_per_worker).remote(  # type: ignore[attr-defined]
            self.spec, self.plan.gpus_per_worker, self.store.uri
        )
        me = ray.get_runtime_context().current_actor
        self.preparing = self.preparer.prepare.remote(self.base[0], me)

    def _start_worker(self, command: control.StartWorker) -> None:
        self._let_preparer_go()
        kept = self.kept.pop(command.worker, None)
        if kept is not None:
            self.workers[command.worker] = kept
            self.events.put(control.WorkerReady(command.worker))
            return
        plan = self.plan
        worker = self.placing.start(command.worker, (
            self.run_name, self.spec, self.store.uri, plan.cpus_per_worker, plan.gpus_per_worker, self.assignment,
            self.store.epoch, self.nonce,
        ))
        self.workers[command.worker] = worker
        self._call(worker, command, worker.load(ray.get_runtime_context().current_actor))

    def _release(self, name: str) -> None:
        """End a worker that nothing is left for, so that its machine is free; that is no loss to be told."""
        self.pending = {reference: call for reference, call in self.pending.items() if call.worker.name != name}
        self.workers.pop(name).kill()
        self.placing.leave(name)

    def _let_preparer_go(self) -> None:
        if self.preparer is not None:
            ray.kill(self.preparer)
            self.preparer = None

    def _stop_workers(self) -> None:
        self._let_preparer_go()
        self.placing.leave_all()

    # --- answered while running ---------------------------------------------------------------------
    def report(self, job: str, progress: Progress, rank: int = 0) -> None:
        """Take the progress of a worker, or of one rank of it."""
        self.board.report(job, self.gang_progress.merged(job, rank, progress) if self.plan.ranks > 1 else progress)

    def report_preparation(self, done: BlockDone) -> None:
        """Take how far the base is."""
        self.board.preparation = done

    def publish(self, role: str) -> Publication:
        """Publish what a node does not have, and say how far that is; it answers at once."""
        return self.publisher.ask(role)

    def tell(self, text: str) -> None:
        """Take a piece of news that no job has."""
        self.board.tell(text)

    def interrupt(self, signal_number: int) -> None:
        """Ask the run to commit and stop."""
        self.events.put(control.InterruptRequested(signal_number))

    def status(self) -> RunStatus:
        """Return where the run is."""
        return self.board.status(self.state)

    def uri(self) -> str:
        """Return where the run directory is."""
        return self.store.uri

    def is_detached(self) -> bool:
        """Return whether it stays when its driver and its run have ended, until somebody has followed it."""
        return self.detached


def _outcome_of_preparation(reference: Any) -> control.Event:
    try:
        ray.get(reference)
    except Interrupted:
        return control.PreparationInterrupted()
    except RayTaskError as error:
        reason = str(error.cause) if isinstance(error.cause, RayloraError) else str(error)
        return control.BaseFailed(reason)
    except RayActorError as error:
        return control.BaseFailed(f"the preparer was lost: {first_line(error)}")
    return control.BasePrepared()
