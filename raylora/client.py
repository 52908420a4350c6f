"""From a driver's side: start a run on Ray or in this process, follow it, resume it."""

from __future__ import annotations

import atexit
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylora import logs
from raylora.actors.coordinator import NAMESPACE, Coordinator, coordinator_name
from raylora.actors.keeper import Keeper
from raylora.actors.preparer import solve_on_cluster
from raylora.actors.sealed import Sealed
from raylora.connection import clear_name, connect, find_run, inventory_of_cluster
from raylora.engine.distillation.compare import compare, made_before
from raylora.engine.distillation.plan import check_ahead, is_finished, prepare_distillation
from raylora.engine.model.machine import compute_device
from raylora.engine.quantization.layer_solver import Solve, solve_here
from raylora.engine.quantization.quantize_base import ensure_prepared
from raylora.engine.run.answer_plan import plan_evaluation
from raylora.engine.run.local_driver import run_in_process, signals_handled_by
from raylora.engine.run.plan_run import Prepared, local_inventory, prepare
from raylora.engine.run.roster import read_state, sound_seal
from raylora.engine.run.run_status import OnStatus
from raylora.engine.run.work import Work
from raylora.engine.training.distillation_loss import task_of
from raylora.errors import Interrupted, SpecError
from raylora.handle import RunHandle, shown
from raylora.progress import OnBlock
from raylora.records import DistillationRecord, PreparationSummary, RunMetrics
from raylora.report.publish import publish_report
from raylora.spec import DistillSpec, GenerationSpec, RunSpec
from raylora.store.commit import MANIFEST
from raylora.store.probe import leave_probe
from raylora.store.run_store import RunStore

_POLL_S = 0.5
_EXIT_S = 60.0
"""How long a driver that ends waits for its run to commit."""


def run_local(spec: RunSpec, on_status: OnStatus | None = None) -> RunMetrics:
    """Run a spec in this process, without Ray, and return its metrics.

    One worker has all cores, unless ``placement`` says otherwise. With ``placement.workers`` and ``cpus_per_worker``
    given, the members equal Ray's bit for bit; other threads and packs change last bits.

    ``on_status`` is told after every event, step and batch of rows; by default progress is shown on stderr.

    Raises:
        UsageError: bad input; nothing was written.
        Interrupted: a signal came; run again to continue.
        TrainingError: the run failed.
    """
    inventory = local_inventory(in_process=True)
    prepared = prepare(spec, inventory)
    check_ahead(spec, inventory)
    with shown(on_status) as show:
        metrics = cast(RunMetrics, run_in_process(prepared, show))
    publish_report(prepared.store)
    return metrics


def prepare_base(
    spec: RunSpec, local: bool = False, on_block: OnBlock = lambda done: None
) -> tuple[str, PreparationSummary]:
    """Prepare a spec's base, unless it is already prepared, and return where it lies and its summary.

    Layers are solved side by side on the cluster that ``RAY_ADDRESS`` names or on a local one, else in this process.

    Raises:
        UsageError: bad input, or a base that is quantized as it is loaded and needs no preparation.
        Interrupted: a signal came; the blocks so far are committed.
    """
    prepared = prepare(spec, local_inventory(in_process=True) if local else None)
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


def launch(spec: RunSpec, dashboard: bool = False, detach: bool = False) -> RunHandle:
    """Start a run on the cluster that ``RAY_ADDRESS`` names or this process is connected to, else on a local one.

    Everything is checked first: with bad input no cluster is started and no actor. A run whose driver ends without
    waiting for it commits and stops before the driver goes.

    Args:
        detach: the run goes on when this process has ended; follow it with :func:`attach`.

    Raises:
        UsageError: bad input, or more workers than the cluster has.
        SpecError: detach without a cluster that outlives this process.
    """
    inventory = inventory_of_cluster()
    if detach and inventory is None:
        raise SpecError(
            "detach: a cluster that this process starts ends with it",
            "start one with `ray start --head` and set RAY_ADDRESS, or call wait()",
        )
    prepared = prepare(spec, inventory)
    check_ahead(spec, inventory)
    connect(dashboard)
    handle = _start(prepared, detach)
    print(_announcement(prepared), file=sys.stderr, flush=True)
    if detach:
        _wait_until_begun(handle)
    else:
        _ends_with_its_driver(handle)
    return handle


def _announcement(prepared: Prepared) -> str:
    plan, units = prepared.plan, sum(map(len, prepared.plan.packs))
    processes = plan.workers * plan.ranks
    workers = "1 worker" if processes == 1 else f"{processes} workers"
    return (
        f"{prepared.store.uri}: checked; {workers} on Ray for {units} unit(s) to train "
        "(each imports torch and loads the base first, which takes a while)"
    )


def _wait_until_begun(handle: RunHandle) -> None:
    """Wait until the coordinator is at work: a call that is still in this process's queue would end with it."""
    while not handle.has_ended() and not handle.store.read_events():
        time.sleep(_POLL_S)


def _ends_with_its_driver(handle: RunHandle) -> None:
    """Let a run commit before its driver's cluster goes: Ray kills actors where they stand."""
    ended = atexit.register(_stop_before_exit, handle)
    handle.on_end = lambda: atexit.unregister(ended)


def _stop_before_exit(handle: RunHandle) -> None:
    if not ray.is_initialized() or handle.has_ended():
        return
    print(
        f"raylora: {handle.uri} is not finished and nobody waits for it: it commits and stops now.\n"
        f"  -> call wait() on what launch() returned, launch with detach=True on a cluster, "
        f"or go on later: raylora resume {handle.uri}",
        file=sys.stderr, flush=True,
    )
    handle.interrupt(signal.SIGTERM)
    deadline = time.monotonic() + _EXIT_S
    while not handle.has_ended() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def distill_run(
    run: str, settings: DistillSpec, local: bool = False, on_status: OnStatus = lambda status: None,
    on_stage: Callable[[str], None] = lambda what: None,
) -> DistillationRecord:
    """Distill a finished run into a student: make targets, train it with and without them, and return the comparison.

    What already exists is not made again, so an interrupted distillation continues when this is called again.

    Args:
        local: do it all in this process, without Ray; where ``placement`` leaves threads and packs open, members differ
            from Ray's in their last bits.
        on_stage: told in words what begins.

    Raises:
        UsageError: bad input; nothing was started or written.
        Interrupted: a signal came; call again to continue.
        TrainingError: the targets could not be made, or a student not be trained.
    """
    inventory = local_inventory(in_process=True) if local else inventory_of_cluster()
    work = prepare_distillation(run, settings, inventory)
    before = made_before(work)
    if before is not None:
        on_stage(f"{work.settings.name} is distilled already, and nothing has changed")
        return before
    try:
        if work.targets is not None and not work.targets.is_done:
            shards, where = len(work.targets.shards), work.targets.store.uri
            on_stage(f"making targets of {work.targets.rows:,} rows in {shards} shard(s), in {where}")
            _carry_out(work.targets, local, on_status)
        if work.answers is not None and not work.answers.is_done:
            if not work.answers.plan.is_done:
                on_stage(f"having {work.rows:,} rows answered, in {work.answers.plan.store.uri}")
                _carry_out(work.answers.plan, local, on_status)
            work.answers.conclude()
        for student in work.students():
            store = RunStore.for_spec(student)
            if not is_finished(store):
                beside = " beside its teacher" if student.distill_from and student.distill_from.members else ""
                on_stage(f"training {student.run_name()}{beside} in {store.uri}")
                _carry_out(prepare(student, inventory), local, on_status)
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


def evaluate_run(
    run: str, settings: GenerationSpec, local: bool | None = None, on_status: OnStatus = lambda status: None,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Let a finished ensemble and each member answer the run's evaluation sets, and return what it is worth.

    Answers that are committed are not written again, so what was interrupted continues when this is called again, and
    other metrics are read off the same answers. The numbers go to ``answers.json``, and into a new report.

    Args:
        local: do it in this process; by default only where no cluster is connected to or named by ``RAY_ADDRESS``.
        allow_missing: go on without members that are damaged, missing or not finished.

    Raises:
        UsageError: the run's rows have no answers, or bad input; nothing was written.
        Interrupted: a signal came; call again to continue.
        TrainingError: the answers could not be written.
    """
    inventory = None if local else inventory_of_cluster()
    in_process = bool(local) or (local is None and inventory is None)
    work = plan_evaluation(run, settings, local_inventory(in_process=True) if in_process else inventory, allow_missing)
    if not work.answers.is_done:
        try:
            _carry_out(work.answers, in_process, on_status)
        except Interrupted as error:
            raise Interrupted(
                f"stopped by signal {error.args[2]} while answering; what is answered is committed",
                "run the same command again: it continues", error.args[2],
            ) from error
    found = work.conclude()
    publish_report(work.store)
    return found


def _carry_out(prepared: Work, local: bool, on_status: OnStatus) -> None:
    if local:
        run_in_process(prepared, on_status)
        return
    connect()
    _start(prepared).join(on_status)


def resume(run: str, dashboard: bool = False, detach: bool = False) -> RunHandle:
    """Continue the run in a directory from its last commits; the options are those of :func:`launch`.

    Raises:
        RunDirectoryError: there is no run there.
    """
    return launch(RunStore(run).spec_in_place(), dashboard, detach)


def attach(run: str | RunHandle) -> RunHandle:
    """Return a handle on a run that is going on, by its directory, by its name, or by a handle of another process.

    Looked for is the cluster that this process is in or that ``RAY_ADDRESS`` names, else the one that the run directory
    names, else every one on this machine.

    Raises:
        RunDirectoryError: no such run is running there.
    """
    if isinstance(run, RunHandle):
        run = run.uri
    coordinator = ray.get_actor(find_run(run), namespace=NAMESPACE)
    uri: Any = ray.get(coordinator.uri.remote())
    return RunHandle(coordinator, RunStore(uri))


@dataclass(frozen=True)
class Repaired:
    """What was damaged in a run, and whether it came out again as it was."""

    lost: Mapping[str, str]
    """Folder or file of the run -> what was the matter with it."""
    equal: Mapping[str, bool]
    """Folder -> whether it is what the run had committed, bit for bit; on another kind of machine it may differ."""


def repair_run(run: str, local: bool = False, on_status: OnStatus = lambda status: None) -> Repaired:
    """Train again what a run has lost, with the packs, seeds and data of before, and write its metrics and report anew.

    Raises:
        UsageError: bad input, such as data that is not what the run was begun with; nothing was started or written.
        Interrupted: a signal came; what is done is committed, and `raylora repair` or `raylora resume` goes on.
        TrainingError: it could not be trained.
    """
    store = RunStore(run)
    spec, before = store.spec_in_place(), sound_seal(store)
    inventory = local_inventory(in_process=True) if local else inventory_of_cluster()
    prepared = prepare(spec, inventory, repair=True)
    lost = {damage.folder: str(damage) for damage in prepared.damages}
    if before is not None and read_state(store).phase.terminal:
        why = before.damage_of(store.storage, "metrics.json")
        lost |= {"metrics.json": f"metrics.json {why}"} if why else {}
    if not lost:
        return Repaired({}, {})
    _carry_out(prepared, local, on_status)
    publish_report(prepared.store)
    now = sound_seal(store)
    if before is None or now is None:
        return Repaired(lost, {})
    manifests = {place: f"{place}/{MANIFEST}" for place in lost}
    return Repaired(lost, {
        place: now.files.get(manifest) == before.files[manifest]
        for place, manifest in manifests.items() if manifest in before.files
    })


def _start(prepared: Work, detach: bool = False) -> RunHandle:
    name, run = coordinator_name(prepared.store.uri), prepared.spec.run_name()
    clear_name(name, run)
    with prepared.store.held():  # of two that begin one run at the same moment the second is refused, not mixed in
        prepared.begin()
    options: dict[str, Any] = {"runtime_env": {"env_vars": logs.environment()}} if logs.environment() else {}
    options |= {"lifetime": "detached"} if detach else {}
    start = prepared.start_event([f"worker-{index}" for index in range(prepared.plan.workers_in_all)])
    # It stays where its driver is: workers' nodes may come and go.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options |= {"namespace": NAMESPACE, "scheduling_strategy": here}
    keeper_name = f"{name.replace('coordinator', 'keeper', 1)}-{uuid.uuid4().hex[:8]}"
    keeper = Keeper.options(name=keeper_name, **options).remote(run)  # type: ignore[attr-defined]
    coordinator = Coordinator.options(name=name, **options).remote(  # type: ignore[attr-defined]
        run, prepared.store.uri, prepared.plan, prepared.spec.placement, start, Sealed.of(prepared.spec),
        Sealed.of(prepared.assignment), keeper, detach, leave_probe(prepared.store.storage),
    )
    return RunHandle(coordinator, prepared.store, [ray.put(prepared.base)], keeper)
