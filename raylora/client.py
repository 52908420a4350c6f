"""From a driver's side: start a run on Ray or in this process, follow it, take it up again."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util import list_named_actors

from raylora import control, logs
from raylora.actors.coordinator import NAMESPACE, Coordinator, coordinator_name
from raylora.actors.preparer import solve_on_cluster
from raylora.engine.distillation.compare import compare, distillations
from raylora.engine.distillation.plan import check_ahead, is_finished, prepare_distillation
from raylora.engine.distillation.target_job import TargetPlan
from raylora.engine.model.machine import compute_device
from raylora.engine.quantization.layer_solver import Solve, solve_here
from raylora.engine.quantization.quantize_base import ensure_prepared
from raylora.engine.run.local_driver import conclude, run_in_process, signals_handled_by
from raylora.engine.run.plan_run import Prepared, local_inventory, prepare
from raylora.engine.run.run_status import OnStatus, RunStatus
from raylora.engine.training.distillation_loss import task_of
from raylora.errors import Interrupted, RayloraError, RunDirectoryError, SpecError, TrainingError
from raylora.placement.plan import Inventory
from raylora.progress import OnBlock
from raylora.records import DistillationRecord, PreparationSummary, RunMetrics
from raylora.report.page import write_report
from raylora.spec import DistillSpec, RunSpec
from raylora.store.run_store import RunStore

_POLL_S = 0.5


def run_local(spec: RunSpec, on_status: OnStatus = lambda status: None) -> RunMetrics:
    """Run a spec in this process, without Ray, and return its metrics; the members equal Ray's.

    ``on_status`` is told after every event, step and batch of rows.

    Raises:
        UsageError: bad input; nothing was written.
        Interrupted: a signal came; run again to continue.
        TrainingError: the run failed.
    """
    prepared = prepare(spec)
    check_ahead(spec)
    metrics = cast(RunMetrics, run_in_process(prepared, on_status))
    publish_report(prepared.store)
    return metrics


def prepare_base(
    spec: RunSpec, local: bool = False, on_block: OnBlock = lambda done: None
) -> tuple[str, PreparationSummary]:
    """Prepare a spec's base, unless it is prepared already, and return where it lies and its summary.

    Layers are solved side by side on the cluster that ``RAY_ADDRESS`` names or on a local one, else in this process.

    Raises:
        UsageError: bad input, or a base that is quantized as it is loaded and needs no preparation.
        Interrupted: a signal came; the blocks so far are committed.
    """
    prepared = prepare(spec)
    if prepared.base is None:
        raise SpecError(
            f"base.quantization: {spec.base.quantization.kind} needs no preparation", "`raylora run` loads it as it is"
        )
    task = task_of(spec)
    solve: Solve = solve_here
    if not local and not prepared.base.is_ready:
        connect()
        solve = solve_on_cluster
    received: list[int] = []
    with signals_handled_by(received.append):
        summary = ensure_prepared(
            spec.base, task, prepared.base, compute_device(prepared.plan.gpus_per_worker), solve, on_block,
            lambda: received[0] if received else 0,
        )
    return prepared.base.store.uri, summary


class RunHandle:
    """A run that is going on in a Ray cluster."""

    def __init__(self, coordinator: Any, store: RunStore, outcome: Any = None) -> None:
        self.store = store
        self._coordinator, self._outcome = coordinator, outcome

    @property
    def uri(self) -> str:
        """Where the run directory is."""
        return self.store.uri

    def status(self) -> RunStatus:
        """Return phase, workers, progress per job and an estimate of the time left."""
        return ray.get(self._coordinator.status.remote())

    def interrupt(self, signal_number: int = signal.SIGINT) -> None:
        """Ask the run to commit and stop after the current step."""
        self._coordinator.interrupt.remote(int(signal_number))

    def wait(self, on_status: OnStatus = lambda status: None) -> RunMetrics:
        """Follow the run to its end, write the report and return the metrics.

        A SIGINT or SIGTERM meanwhile lets the workers commit before this returns.

        Raises:
            Interrupted: the run was stopped and can be resumed.
            TrainingError: it failed, or its coordinator was lost.
            UsageError: it could not start.
        """
        metrics = self.join(on_status)
        publish_report(self.store)
        return metrics

    def join(self, on_status: OnStatus = lambda status: None) -> RunMetrics:
        """Follow the run to its end as :meth:`wait`, but write no report."""
        with signals_handled_by(self.interrupt):
            state = self._final_state(on_status)
        if self._outcome is not None:
            _put_away(self._coordinator, coordinator_name(self.uri))
        metrics = self.store.read_json("metrics.json")
        found: RunMetrics = metrics if metrics is not None else {}
        return conclude(state, found, self.uri)

    def _final_state(self, on_status: OnStatus) -> control.State:
        try:
            while self._outcome is None or not ray.wait([self._outcome], timeout=_POLL_S)[0]:
                status = self.status()
                on_status(status)
                if self._outcome is None:
                    if status.phase.terminal:
                        return control.replay(control.from_record(r) for r in self.store.read_events())
                    time.sleep(_POLL_S)
            with contextlib.suppress(RayActorError):
                on_status(self.status())
            return ray.get(self._outcome)
        except RayTaskError as error:
            if isinstance(error.cause, RayloraError):
                raise error.cause from None
            raise
        except RayActorError as error:
            raise TrainingError(
                "the run's coordinator was lost", f"nothing committed is lost: raylora resume {self.uri}"
            ) from error


def launch(spec: RunSpec, dashboard: bool = False) -> RunHandle:
    """Start a run on the cluster that ``RAY_ADDRESS`` names or this process is connected to, else on a local one.

    Everything is checked first: with bad input no cluster is started and no actor.

    Raises:
        UsageError: bad input, or more workers than the cluster has.
    """
    inventory = _inventory()
    prepared = prepare(spec, inventory)
    check_ahead(spec, inventory)
    connect(dashboard)
    return _start(prepared)


def distill_run(
    run: str, settings: DistillSpec, local: bool = False, on_status: OnStatus = lambda status: None,
    on_stage: Callable[[str], None] = lambda what: None,
) -> DistillationRecord:
    """Have a finished run teach a student: make targets, train it with and without them, compare, and return that.

    What is there already is not done again, so an interrupted distillation goes on when it is called again.

    Args:
        local: do it all in this process, without Ray; the result is the same.
        on_stage: told in words what begins.

    Raises:
        UsageError: bad input; nothing was started or written.
        Interrupted: a signal came; call again to continue.
        TrainingError: the targets could not be made, or a student not be trained.
    """
    work = prepare_distillation(run, settings, None if local else _inventory())
    try:
        if not work.targets.is_done:
            shards, where = len(work.targets.shards), work.targets.store.uri
            on_stage(f"making targets of {work.targets.rows:,} rows in {shards} shard(s), in {where}")
            _carry_out(work.targets, local, on_status)
        for student in work.students():
            store = RunStore.for_spec(student)
            if not is_finished(store):
                on_stage(f"training {student.run_name()} in {store.uri}")
                _carry_out(prepare(student, None if local else _inventory()), local, on_status)
                publish_report(store)
    except Interrupted as error:
        raise Interrupted(
            f"distillation stopped by signal {error.args[2]}; what is done is committed",
            "run the same command again: it continues", error.args[2],
        ) from error
    on_stage("comparing teacher and student")
    record = compare(work)
    publish_report(work.store)
    return record


def _carry_out(prepared: Prepared | TargetPlan, local: bool, on_status: OnStatus) -> None:
    if local:
        run_in_process(prepared, on_status)
        return
    connect()
    _start(prepared).join(on_status)


def _inventory() -> Inventory | None:
    """Return what the cluster has that would be used; None for a local one, which is not started yet."""
    if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
        return None
    connect()
    return cluster_inventory()


def resume(run: str, dashboard: bool = False) -> RunHandle:
    """Continue the run in a directory from its last commits.

    Raises:
        RunDirectoryError: there is no run there.
    """
    return launch(RunStore(run).spec_in_place(), dashboard)


def attach(run: str) -> RunHandle:
    """Return a handle on a run that another driver started, by its directory or name.

    Raises:
        RunDirectoryError: no such run is going on in this cluster.
    """
    connect()
    wanted = {coordinator_name(run), coordinator_name(RunStore(run).uri)}
    going_on = [a["name"] for a in list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
    found = [n for n in going_on if n in wanted or n.rpartition("-")[0] == f"coordinator-{run}"]
    if len(found) != 1:
        raise RunDirectoryError(
            f"no run {run!r} is going on in this cluster" if not found else f"{len(found)} runs are called {run!r}",
            "give its directory; `raylora status RUN` reads what it has written",
        )
    coordinator = ray.get_actor(found[0], namespace=NAMESPACE)
    uri: Any = ray.get(coordinator.uri.remote())
    return RunHandle(coordinator, RunStore(uri))


def connect(dashboard: bool = False) -> None:
    """Join the cluster of ``RAY_ADDRESS``, or start a local one; do nothing if already connected."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    if address:
        ray.init(address=address, **options)
        return
    inventory = local_inventory()
    ray.init(
        address="local", num_cpus=inventory.cpus, num_gpus=inventory.gpus, include_dashboard=dashboard, **options
    )


def cluster_inventory() -> Inventory:
    """Return what the connected cluster has in all, whoever uses it now."""
    total = ray.cluster_resources()
    gpus = int(total.get("GPU", 0))
    memory = ray.get(_device_memory.remote()) if gpus else total.get("memory", 0)
    return Inventory(int(total.get("CPU", 0)), gpus, int(memory), "the cluster")


@ray.remote(num_cpus=0, num_gpus=1)
def _device_memory() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def publish_report(store: RunStore) -> None:
    """Write ``report.html`` and its pictures from the run's metrics, wherever the run directory is.

    Raises:
        RunDirectoryError: the run has no metrics yet.
    """
    metrics: RunMetrics | None = store.read_json("metrics.json")
    if metrics is None:
        raise RunDirectoryError(f"{store.uri}: has no metrics yet", "let the run finish: raylora resume")
    metrics["distillation"] = distillations(store)
    if store.storage.is_local:
        write_report(metrics, Path(store.storage.root))
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in write_report(metrics, Path(folder)):
            store.storage.write(path.relative_to(folder).as_posix(), path.read_bytes())


def _start(prepared: Prepared | TargetPlan) -> RunHandle:
    name = coordinator_name(prepared.store.uri)
    _clear_name(name, prepared.spec.run_name())
    prepared.begin()
    target_job = prepared.target_job if isinstance(prepared, TargetPlan) else None
    inherited: dict[str, Any] = {"runtime_env": {"env_vars": logs.environment()}} if logs.environment() else {}
    coordinator = Coordinator.options(name=name, namespace=NAMESPACE, **inherited).remote(  # type: ignore[attr-defined]
        prepared.spec, prepared.store.uri, prepared.plan, [ray.put(prepared.base)], target_job
    )
    workers = [f"worker-{index}" for index in range(prepared.plan.workers)]
    return RunHandle(coordinator, prepared.store, coordinator.run.remote(prepared.start_event(workers)))


def _clear_name(name: str, run: str) -> None:
    """Make sure no coordinator of that name is at work; one that has finished is put away."""
    with contextlib.suppress(ValueError, RayActorError):  # no such actor, or it is just going
        coordinator = ray.get_actor(name, namespace=NAMESPACE)
        status: Any = ray.get(coordinator.status.remote())
        if not status.phase.terminal:
            raise RunDirectoryError(f"run {run!r} is already going on in this cluster", "follow it: raylora status")
        _put_away(coordinator, name)


def _put_away(coordinator: Any, name: str) -> None:
    """Kill a finished coordinator and wait until its name is free."""
    ray.kill(coordinator)
    with contextlib.suppress(ValueError):
        for _ in range(100):
            ray.get_actor(name, namespace=NAMESPACE)
            time.sleep(0.1)
