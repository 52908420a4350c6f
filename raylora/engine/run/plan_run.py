"""Everything that can be wrong is found here: before an actor starts and before a byte is written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import psutil
import torch

from raylora import control
from raylora.adapters.base import Noted
from raylora.control import JobState
from raylora.data.sets import DataSets
from raylora.engine.model.blocks import base_linears
from raylora.engine.model.checkpoint import load_tokenizer, source_folder
from raylora.engine.model.machine import compute_dtype
from raylora.engine.model.model_files import check_unchanged, record_models, with_published
from raylora.engine.model.quantized_layers import bases_folder
from raylora.engine.quantization.quantize_base import PreparedBase, open_base
from raylora.engine.run.baseline_checks import baseline_notes, check_lengths, check_whole_base
from raylora.engine.run.checks import check_placement, check_start, check_task, differences, doubts
from raylora.engine.run.demand import batch_of, demand_of, groups_of, shell_of
from raylora.engine.run.growth import Growth, check_data, check_final_states, clear_outgrown, growth_of
from raylora.engine.run.roster import Damage, clear, damages_of, read_state
from raylora.engine.run.run_answers import check_generation, run_shards
from raylora.engine.run.session import TrainingSession
from raylora.engine.run.shared_trunk import check_trunk
from raylora.engine.run.tracking import check_trackers
from raylora.engine.run.work import TrainingAssignment
from raylora.engine.training.bracket import check_places
from raylora.engine.training.distillation_loss import task_of
from raylora.engine.training.inputs import sets_of
from raylora.engine.training.member_plan import (
    MemberPlan,
    PlanRole,
    check_baselines,
    check_weights,
    member_plans_of,
)
from raylora.engine.training.row_packing import packing_of
from raylora.engine.training.schedule import total_steps
from raylora.errors import RunDirectoryError, StoreError
from raylora.placement.expected import with_expected_nodes
from raylora.placement.inventory import Gpu, Inventory, Node
from raylora.placement.plan import Demand, Plan
from raylora.placement.planner import make_plan
from raylora.records import DataRecord
from raylora.spec import RunSpec, SetSpec
from raylora.spec.paths import located, places_here
from raylora.store.run_store import RunStore


@dataclass(frozen=True)
class Prepared:
    """A checked run: what it needs, where it goes, and who trains what."""

    spec: RunSpec
    store: RunStore
    units: list[MemberPlan]
    plan: Plan
    demand: Demand
    sets: DataSets
    total_steps: int
    is_resume: bool
    member_parameters: int
    notes: tuple[str, ...] = ()
    """What the adapter does to these layers that one would not expect."""
    base: PreparedBase | None = None
    """The base that has to be prepared, or was; None for kinds that are quantized as they are loaded."""
    damages: Sequence[Damage] = ()
    """What was finished and is not whole: it is made again."""
    growth: Growth | None = None
    """What this spec changes in a run that was begun with another."""
    kept: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Jobs that were finished, and pieces of split ones that were begun, with their units; a unit stays in its pack."""
    answers: Sequence[str] = ()
    """Shards of answers that are written when the members are finished."""

    @property
    def jobs(self) -> dict[str, list[str]]:
        """Every job of the run with its units: those that are finished, and those that are planned."""
        numbers = (name.rpartition("-")[2].partition(".")[0] for name in self.kept)  # a piece of job-07 is job-07.0
        first = max((int(number) + 1 for number in numbers), default=0)
        return {**{name: list(units) for name, units in self.kept.items()}, **self.plan.jobs(first)}

    @property
    def compute(self) -> str:
        """What the base will be computed in, and who decided."""
        asked = self.spec.base.dtype
        if asked != "auto":
            return f"{asked}, as base.dtype asks"
        if self.plan.gpus_per_worker:
            return "bfloat16 where the GPU has it, else float32 (base.dtype: auto)"
        found = str(compute_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
        return f"{found}, the fastest that this kind of CPU multiplies natively (base.dtype: auto)"

    def start_event(self, workers: list[str]) -> control.RunStarted:
        """Return the event that begins the run, or takes it up again."""
        ensemble, jobs, later = self.spec.ensemble, self.jobs, self._later()
        return control.RunStarted(
            jobs={**jobs, **later},
            workers=workers,
            required=[unit.name for unit in self.units if unit.role is PlanRole.MEMBER],
            min_members=ensemble.min_members or ensemble.members,
            max_failures=self.spec.checkpointing.max_failures,
            prepare_base=self.base is not None and not self.base.is_ready,
            # Of shards the worker knows which are committed of just these members.
            reopened=[*self._reopened(), *self.answers],
            later=list(later),
            changes=list(self.growth.changes) if self.growth is not None else [],
            costs={name: float(len(units) * self.total_steps) for name, units in jobs.items()},
            may_split=self._may_split(jobs),
            later_workers=workers[self.plan.workers :] if self.plan.later_workers else [],
            release_idle=self.plan.workers_in_all > 1,
        )

    def _later(self) -> dict[str, list[str]]:
        """Return the jobs of answers with their shards: as many as a worker's ranks can do side by side."""
        size = self.plan.ranks // self.plan.partners
        starts = range(0, len(self.answers), size)
        return {f"answers-{n:03d}": list(self.answers[start : start + size]) for n, start in enumerate(starts)}

    def _may_split(self, jobs: Mapping[str, Sequence[str]]) -> list[str]:
        """Return the jobs of several units none of which has begun, if the run lets them be split."""
        if not self.spec.placement.split_last or self.demand.places is not None:
            return []
        begun = {*self.store.storage.list("checkpoints"), *(unit for units in self.kept.values() for unit in units)}
        return [name for name, units in jobs.items() if len(units) > 1 and begun.isdisjoint(units)]

    def _reopened(self) -> list[str]:
        """Return the units of finished jobs that are to be done again."""
        if self.growth is not None and (self.growth.trains_on or self.growth.other_sets):
            return [name for units in self.kept.values() for name in units]
        return list(dict.fromkeys(damage.unit for damage in self.damages))

    @property
    def assignment(self) -> TrainingAssignment:
        """What its workers are told."""
        return TrainingAssignment()

    def make_session(self, cpus: int, gpus: int) -> TrainingSession:
        """Return what a worker trains its packs on."""
        return TrainingSession(self.spec, self.store, cpus, gpus)

    def begin(self) -> None:
        """Write what a run begins with; the first thing that touches the disk."""
        # Deleted before anything is written: whoever is stopped in between finds what is missing, and it is made again.
        clear(self.store, self.damages)
        if self.growth is not None:
            reopened = set(self._reopened())
            clear_outgrown(self.store, [unit for unit in self.units if unit.name in reopened], self.growth)
        if not self.is_resume or (self.growth is not None and self.growth.other_sets):
            self.store.write_json("data.json", data_record(self.sets))
        if not self.is_resume and self.base is not None:
            self.store.write_json("base.json", {"prepared": self.base.store.uri.rpartition("/")[2]})
        self.store.write_spec(self.spec)  # on resume too: placement and checkpointing may have changed
        record_models(self.spec, self.store)
        task = task_of(self.spec)
        sets_of(self.spec, task, load_tokenizer(self.spec.base, task), self.store, keep=True)


def prepare(
    spec: RunSpec, inventory: Inventory | None = None, repair: bool = False, look: bool = False
) -> Prepared:
    """Check a spec against its data, its base, the machines and the run directory.

    Args:
        repair: train again what was finished and is damaged; else damage is refused.
        look: nobody is going to run this: a run that stands in the way is noted, not refused.

    Raises:
        UsageError: with what is wrong and how to fix it; nothing was started or written.
        StoreError: something that was finished is damaged.
    """
    spec = located(spec, places_here(spec))  # workers have other current folders
    store = RunStore.for_spec(spec)
    store.storage.check_writable()
    if not look:
        store.check_unlocked()
        store.is_begun()
    task = task_of(spec)
    spec = with_published(spec, store)
    source_folder(spec.base)
    shell = shell_of(spec, task)
    check_baselines(spec, bool(shell.heads))
    check_weights(spec)
    check_task(spec, task)
    check_placement(spec, shell)
    check_trackers(spec)
    own = shell.adapter.notes(shell.sites) if isinstance(shell.adapter, Noted) else ()
    notes = (*own, *check_trunk(spec, shell.model, shell.sites), *baseline_notes(spec, shell.sites))
    tokenizer = load_tokenizer(spec.base, task)
    sets = sets_of(spec, task, tokenizer, store)
    check_lengths(spec, total_steps(len(sets.train.examples), spec.optimization))
    check_places(spec, len(sets.train.examples))
    check_generation(spec, task, shell.model.config, tokenizer, sets)
    found, obstacle = _Begun(), ""
    try:
        found = _begun(store, spec, sets, repair)
    except (RunDirectoryError, StoreError) as error:
        if not look:
            raise
        obstacle = f"{error.message}; `raylora run` will refuse it"
    base = open_base(
        spec.base, task, bases_folder(store.uri.rpartition("/")[0]), sets.evaluated_keys(), evaluation_sets(spec)
    ) if spec.base.grid is not None else None
    if base is not None:
        check_start(spec, base_linears(shell.model), shell.layers)
        notes = (*notes, *base.notes(spec))
    units = member_plans_of(spec)
    kept = {name for names in found.kept.values() for name in names}
    new = [unit for unit in units if unit.name not in kept]
    inventory = with_expected_nodes(inventory or local_inventory(), spec.placement)
    shards = tuple(run_shards(spec, sets))
    demand = demand_of(spec, shell, batch_of(spec, sets), units if found.reopens or not new else new, inventory)
    demand = replace(demand, later_jobs=len(shards))
    plan = make_plan(demand, inventory, spec.placement)
    check_whole_base(spec, plan)
    if found.kept:
        packs = make_plan(replace(demand, groups=groups_of(spec, new)), inventory, spec.placement).packs if new else ()
        plan = replace(plan, packs=packs)
    packing = packing_of(spec, sets.train.examples)
    notes = (*notes, *([] if packing is None else [str(packing)]), *doubts(spec, sets), *differences(spec))
    if found.growth is not None:
        notes = (*notes, *(f"the run that is there grows: {change}" for change in found.growth.changes))
    return Prepared(
        spec, store, units, plan, demand, sets, total_steps(len(sets.train.examples), spec.optimization),
        found.is_resume, shell.member_parameters, (*notes, obstacle) if obstacle else notes, base, found.damages,
        found.growth, found.kept, shards,
    )


@dataclass(frozen=True)
class _Begun:
    """What there is of a run already."""

    is_resume: bool = False
    growth: Growth | None = None
    damages: Sequence[Damage] = ()
    kept: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def reopens(self) -> bool:
        """Whether finished units are done again."""
        return bool(self.damages) or (self.growth is not None and (self.growth.trains_on or self.growth.other_sets))


def _begun(store: RunStore, spec: RunSpec, sets: DataSets, repair: bool) -> _Begun:
    """Return how far a run is. Raises: RunDirectoryError, StoreError, for what stands in the way of going on."""
    if not store.is_begun():
        return _Begun()
    growth = growth_of(store, spec, len(sets.train.examples))
    check_data(store, data_record(sets), growth)
    check_unchanged(spec, store)
    damages = damages_of(store, store.read_spec())
    if damages and not repair:
        raise StoreError(
            f"{store.uri}: " + "; ".join(map(str, damages)), f"`raylora repair {store.uri}` trains again what is lost"
        )
    state = read_state(store)
    if growth is not None and growth.trains_on:
        check_final_states(store, spec, state.finished_units())
    kept = {
        name: job.units for name, job in state.jobs.items()
        if not job.later  # what is committed of answers is known by the members who gave them
        # A piece fits wherever packs do.
        and (job.status is JobState.FINISHED or (job.attempt and control.is_piece(name)))
    }
    return _Begun(True, growth, damages, kept)


def evaluation_sets(spec: RunSpec) -> list[SetSpec]:
    """Return the sets that are evaluated on and nothing else."""
    own = [found for found in (spec.data.validation, spec.data.test) if found is not None]
    return [*own, *spec.evaluation.in_distribution.values(), *spec.evaluation.out_of_distribution.values()]


def local_inventory(in_process: bool = False) -> Inventory:
    """Return what this machine has, for workers on it or for this process alone; a container's CPU share counts."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count()
    devices = tuple(Gpu(torch.cuda.get_device_properties(n).total_memory) for n in range(gpus))
    node = Node("this machine", cpus, int(psutil.virtual_memory().available), devices)
    return Inventory((node,), in_process=in_process)


def data_record(sets: DataSets) -> DataRecord:
    """Return what is remembered of the data: its hash, to refuse other data on resume, and the counts."""
    roles = {name: "in_distribution" for name in sets.in_distribution}
    roles |= {name: "out_of_distribution" for name in sets.out_of_distribution}
    return {
        "content_hash": sets.content_hash(),
        "sets": [
            {
                "name": loaded.name,
                "role": roles.get(loaded.name, loaded.name),
                "origin": loaded.origin,
                "rows": len(loaded.examples),
                "truncated": loaded.truncated,
                "skipped": loaded.skipped,
                "left_out": loaded.left_out,
                "duplicates": loaded.duplicates,
                "content_hash": loaded.content_hash,
            }
            for loaded in sets.all()
        ],
    }
