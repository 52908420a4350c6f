"""One worker's session: the base and the data, loaded once, and the jobs that are done on it.

The Ray actor and the in-process driver both work here; neither knows anything about training.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from raylora import logs
from raylora.adapters.side_by_side import SideBySide, adapter_of
from raylora.data.sets import DataSets
from raylora.data.texts import text_finder
from raylora.engine.model import serialization
from raylora.engine.model.base import Base, load_base
from raylora.engine.model.gang import Gang, GangPlace
from raylora.engine.model.machine import compute_device, peak_device_bytes, peak_memory_bytes
from raylora.engine.model.member_tensors import frozen_tensors_of
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.model.quantized_layers import prepared_store
from raylora.engine.model.shared_sequences import check_shared_sequences
from raylora.engine.model.trunk_cache import TrunkCache
from raylora.engine.run.bracket_commits import saved_bracket
from raylora.engine.run.evaluation import Evaluator, Trained, read_trained
from raylora.engine.run.profiling import StepProfiler
from raylora.engine.run.run_answers import RunAnswers
from raylora.engine.run.run_metrics import aggregate
from raylora.engine.run.shared_trunk import discard_trunk_cache, open_trunk_cache
from raylora.engine.run.teaching import teaching_of
from raylora.engine.run.tracking import TrackedPack, Tracking, track_results
from raylora.engine.run.work import StopSignal
from raylora.engine.training.bracket import Ended
from raylora.engine.training.distillation_loss import DistillationLoss, task_of
from raylora.engine.training.inputs import sets_of
from raylora.engine.training.live_teacher import LiveDistillationLoss
from raylora.engine.training.member_plan import MemberPlan, PlanRole, member_adapters, member_plans_of
from raylora.engine.training.member_state import SavedState
from raylora.engine.training.optimizer import engines_let_go, start_deepspeed
from raylora.engine.training.trainer import PackTrainer, TrainingSettings
from raylora.ensemble.outputs.base import Names
from raylora.errors import RunDirectoryError
from raylora.progress import Leaving, OnProgress, Progress, Span, nobody, unmarked
from raylora.records import JobTiming, RunMetrics
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore

logger = logging.getLogger(__name__)

_FORWARD_OF_STEP = 1 / 3
"""Of a step's time, its forward: the backward pass takes about twice as long."""

class TrainingSession:
    """Trains, evaluates and commits packs of units over one base."""

    def __init__(
        self, spec: RunSpec, store: RunStore, cpus: int, gpus: int, place: GangPlace | None = None
    ) -> None:
        """Remember what to load; :meth:`load` does the work.

        Args:
            place: this worker's place in the gang that the base is split over, if it is.
        """
        self.place = place
        self.spec, self.store, self.cpus = spec, store, cpus
        self.device = compute_device(gpus)
        self.task = task_of(spec)
        self.plans = {plan.name: plan for plan in member_plans_of(spec)}
        self.places = spec.ensemble.places
        self.gang: Gang | None
        self.base: Base
        self.sets: DataSets
        self.evaluator: Evaluator
        self.answers: RunAnswers
        self.distillation_loss: DistillationLoss | LiveDistillationLoss | None
        self.trunk_cache: TrunkCache | None
        self.span: Span = unmarked
        self.leaving: Leaving = nobody

    @property
    def base_bytes(self) -> int:
        """How much of the base is held, once it is loaded."""
        return self.base.size_bytes

    def load(self) -> None:
        """Load the base and the data.

        Raises:
            RunDirectoryError: the data is not what the run was begun with.
            BaseError: rows are to be packed, and this model does not keep them apart.
        """
        started = time.perf_counter()
        # The thread count decides the order of float additions: equal members need equal threads.
        torch.set_num_threads(self.cpus)
        # On a GPU too: there the pools' index_add would add in any order. What has no such kernel only warns.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=self.device.type == "cuda")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs 7 % and nothing reads such memory
        self.gang = start_deepspeed(self.device, self.place)
        self.base = load_base(
            self.spec.base, member_adapters(self.spec), self.task, self.device, prepared_store(self.store), self.gang,
            self.spec.placement.recompute, output_in_parts=self.spec.placement.output_layer == "parts",
        )
        if self.spec.optimization.pack_rows:
            check_shared_sequences(self.base)
        self.sets = sets_of(self.spec, self.task, self.base.tokenizer, self.store, as_begun=True)
        recorded = self.store.read_json("data.json")
        if recorded and recorded["content_hash"] != self.sets.content_hash():
            raise RunDirectoryError(
                f"{self.store.uri}: the data has changed since the run was begun", "restore it, or start a new run"
            )
        logger.info("base and data loaded in %.1f s", time.perf_counter() - started)
        self.distillation_loss = teaching_of(self.spec, self.store, self.base, self.sets)
        self.evaluator = Evaluator(self.spec, self.store, self.task, self.base, self.sets)
        self.answers = RunAnswers(self.spec, self.store, self.task, self.base, self.sets)
        self.trunk_cache = open_trunk_cache(self.spec, self.store, self.base, self.sets.train.examples)

    # --- a job --------------------------------------------------------------------------------------
    def run_job(
        self, job: str, unit_names: Sequence[str], report: OnProgress, should_stop: StopSignal
    ) -> dict[str, str]:
        """Train and evaluate units in one pack, commit each, and return those that failed with the reason.

        Units that are no members and no baselines are shards of answers, which finished members give.

        In a gang all ranks do this together, each with its own units, if any, and return together.

        Raises:
            Interrupted: the units' state is committed; the job can be run again and continues.
        """
        if self.gang is None:
            return self._do(job, unit_names, report, should_stop)
        if not self._is_first:
            said, report = report, lambda progress: said(replace(progress, news=()))
        try:
            return self._do(job, unit_names, report, should_stop) if unit_names else {}
        finally:
            if not self.gang.broken:
                self.gang.leave()  # whoever has nothing to do, or nothing left, joins the others until all are done

    def _do(
        self, job: str, unit_names: Sequence[str], report: OnProgress, should_stop: StopSignal
    ) -> dict[str, str]:
        failed: dict[str, str] = {}
        if unit_names[0] not in self.plans:
            if self._is_first:
                self.answers.make(unit_names, report, should_stop, self.span)
            return failed
        plans = [self.plans[name] for name in unit_names]
        with logs.about(self.spec.run_name(), list(unit_names)):
            to_train = self._to_train(plans)
            if to_train:
                with engines_let_go():
                    failed = self._run_job(job, to_train, report, should_stop)
            whole = [plan for plan in plans if self.store.has_result(plan.folder)]
            if self._is_first and not all(self.evaluator.is_predicted(plan) for plan in whole):
                self._evaluate_again(job, whole, report, should_stop)
        return failed

    def _to_train(self, plans: Sequence[MemberPlan]) -> Sequence[MemberPlan]:
        """Return whom of a job to train: those who have no result, together with those they must share a pack with.

        A member that was lost after the whole pack had ended is trained in that pack again: alone it would see other
        matrix shapes, and its last bits would differ. What the others become again is not committed.
        """
        missing = [plan for plan in plans if not self.store.has_result(plan.folder)]
        if not missing:
            return []
        if self.places is not None:
            return plans  # who is finished tells by what the others were judged
        if all(self._has_failed(plan) for plan in missing):
            return missing  # tried once more, without those who need not wait for it
        begun = [plan for plan in plans if self.store.checkpoint_steps(plan.name)]
        if not all(plan in begun for plan in missing):
            return plans
        return [plan for plan in plans if plan in missing or plan in begun]

    def _has_failed(self, plan: MemberPlan) -> bool:
        steps = self.store.checkpoint_steps(plan.name)
        if not steps:
            return False
        _, facts = serialization.unpack_state(self.store.load_checkpoint(plan.name, steps[-1]).files)
        return "failure" in facts

    def _run_job(
        self, job: str, plans: Sequence[MemberPlan], report: OnProgress, should_stop: StopSignal
    ) -> dict[str, str]:
        adapters = SideBySide.of([plan.adapter for plan in plans]).adapters
        model = PackedModel(self.base, adapters, self.task, self.trunk_cache)
        trainer = PackTrainer(
            model, TrainingSettings.of(self.spec), plans, self.sets.train.examples, self.sets.validation.examples,
            self.distillation_loss,
            self._saved(plans) if self.places is None else saved_bracket(self.spec, self.store, self.base, plans),
        )
        trainer.span, trainer.leaving = self.span, self.leaving
        resumed_at = trainer.step
        logger.info("%s: training from step %d to %d", job, resumed_at, trainer.end)
        tracking = Tracking(self.spec if self._is_first else self.spec.model_copy(update={"tracking": []}), self.store)
        tracked, complete = TrackedPack(tracking, trainer), False
        profiler = StepProfiler(self.spec.profile, self.store, job, trainer.end - trainer.step)
        partners = self.gang.partners if self.gang is not None else None
        rows = self.spec.optimization.micro_batch * self.spec.optimization.accumulation
        meter = _Meter(report, tracked, profiler, self.evaluator.forwards_ahead(plans) / rows)

        def together() -> int:
            return should_stop() if partners is None else partners.greatest(should_stop())

        def save(trainer: PackTrainer) -> None:
            with self.span("checkpoint"):
                self._save(trainer)
            tracked.commit()

        try:
            with profiler:
                trainer.run(save, meter, together, self._epoch_end)
            complete = True
        finally:
            tracking.close(complete)
        trained_s = time.perf_counter() - meter.started
        ended = trainer.ended()
        done = {one.plan.name: one for one in ended if not one.failure}
        logger.info("%s: trained in %.1f s", job, trained_s)
        evaluate_s = self._evaluate(
            model, [one.plan for one in done.values()], lambda plan: self._trained(done[plan.name]), report, should_stop
        ) if self._is_first else 0.0
        logger.info("%s: evaluated in %.1f s", job, evaluate_s)
        self.store.write_json(f"timing/{job}.json", JobTiming({
            "units": list(done),
            "train_s": trained_s,
            "evaluate_s": evaluate_s,
            "steps": trainer.step - resumed_at,
            "resumed_at_step": resumed_at,
            "tokens": meter.tokens,
            "peak_rss_bytes": peak_memory_bytes(),
            "peak_device_bytes": peak_device_bytes(self.device),
            "base_bytes": self.base.size_bytes,
            "base_parameters": self.base.parameters,
            "head_parameters": sum(p.numel() for head in self.base.heads.values() for p in head.parameters()),
            "member_parameters": max((sum(t.numel() for t in one.tensors.values()) for one in ended), default=0),
            "trained_parameters": max((one.trained_parameters for one in ended), default=0),
            "compute_dtype": str(self.base.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "pid": os.getpid(),
        }))
        return {one.plan.name: one.failure for one in ended if one.failure}

    def _trained(self, one: Ended) -> Trained:
        frozen = one.frozen_tensors
        if frozen is None:
            frozen = frozen_tensors_of(self.base, adapter_of(one.plan.adapter), one.plan.stream("fixed"))
        return Trained(
            one.plan, one.tensors, frozen, one.steps, one.history, one.stopped_at, one.moments, one.committed_at
        )

    def _evaluate(
        self, model: PackedModel, plans: Sequence[MemberPlan], trained: Callable[[MemberPlan], Trained],
        report: OnProgress, should_stop: StopSignal,
    ) -> float:
        """Predict with all members of a pack together, or, of a bracket, with as many as trained together."""
        size = self.places or max(1, len(plans))
        parts = [plans[start : start + size] for start in range(0, len(plans), size)]
        return sum(
            self.evaluator.evaluate(model, [trained(plan) for plan in part], report, should_stop)
            for part in parts if self.places is None or not all(map(self._is_whole, part))
        )

    def _evaluate_again(
        self, job: str, plans: Sequence[MemberPlan], report: OnProgress, should_stop: StopSignal
    ) -> None:
        """Predict with members that are committed, in the stack that they were trained in."""
        adapters = SideBySide.of([plan.adapter for plan in plans]).adapters
        model = PackedModel(self.base, adapters, self.task)
        evaluate_s = self._evaluate(
            model, plans, lambda plan: read_trained(self.spec, self.store, self.base, plan), report, should_stop
        )
        timing = self.store.read_json(f"timing/{job}.json")
        if timing is not None:
            self.store.write_json(f"timing/{job}.json", {**timing, "evaluate_s": evaluate_s})

    def _is_whole(self, plan: MemberPlan) -> bool:
        """Return whether a plan's member and all its predictions are committed."""
        return self.store.has_result(plan.folder) and self.evaluator.is_predicted(plan)

    def aggregate(self, units: Sequence[str], started_at: float) -> RunMetrics:
        """Combine the finished units' predictions and answers into the run's metrics. Raises: StoreError."""
        names = Names(self.task.label_names, text_finder(self.sets, self.base.tokenizer))
        done = set(units)
        trained = [name for name in self.plans if name in done]  # in the run's order, whatever pack each was in
        members = [name for name in trained if self.plans[name].role is PlanRole.MEMBER]
        metrics = aggregate(self.spec, self.store, trained, started_at, names, self.answers.conclude(members))
        self.store.seal(members)
        track_results(self.spec, self.store, metrics)
        discard_trunk_cache(self.store)
        return metrics

    @property
    def _is_first(self) -> bool:
        """Whether this worker predicts and commits for all that train the same members."""
        return self.gang is None or self.gang.partners.is_first

    # --- checkpoints --------------------------------------------------------------------------------
    def _save(self, trainer: PackTrainer) -> None:
        logger.debug("committing step %d", trainer.step)
        for state in trainer.states:
            saved = state.saved(trainer.step)  # partners make it together, and one of them commits it
            if not self._is_first:
                continue
            files = serialization.pack_state(saved[0], saved[1] | trainer.facts(state))
            self.store.commit_checkpoint(state.plan.name, trainer.step, files)
        # Only now: until every plan has this step, the one before is the newest that all have.
        for state in trainer.states if self._is_first else ():
            keep = self.spec.checkpointing.num_to_keep
            self.store.prune_checkpoints(state.plan.name, trainer.step, keep)

    def _saved(self, plans: Sequence[MemberPlan]) -> dict[str, SavedState] | None:
        """Return what is committed of a pack at the newest step that all its plans have, or None to begin."""
        common = set.intersection(*(set(self.store.checkpoint_steps(plan.name)) for plan in plans))
        if not common:
            return None
        files = {plan.name: self.store.load_checkpoint(plan.name, max(common)).files for plan in plans}
        states = {name: serialization.unpack_state(found) for name, found in files.items()}
        all_failed = all("failure" in facts for _, facts in states.values())
        return None if all_failed else states  # those who all failed are tried once more

    def _epoch_end(self, trainer: PackTrainer, epoch: int) -> None:
        """Keep the last epoch ends of member 0, for the ensemble of checkpoints."""
        wanted = self.spec.baselines.checkpoints
        first = next((t for t in trainer.states if t.plan.name == "member-000"), None)
        epochs = trainer.epochs(trainer.total - 1) + 1
        if self._is_first and wanted and first is not None and first.training and epoch > epochs - wanted:
            content = serialization.to_bytes(first.tensors())
            self.store.commit_result(f"snapshots/epoch-{epoch:03d}", {"member.safetensors": content})


class _Meter:
    """Counts tokens and time on the way to profiler, trackers and whoever listens to progress."""

    def __init__(
        self, report: OnProgress, tracked: TrackedPack, profiler: StepProfiler, steps_after: float
    ) -> None:
        """Take also how many steps' rows will be predicted after training."""
        self.report, self.tracked, self.profiler, self.steps_after = report, tracked, profiler, steps_after
        self.tokens, self.started = 0, time.perf_counter()
        self.steps, self.seconds = 0, 0.0

    def __call__(self, progress: Progress) -> None:
        self.profiler.after_step()
        self.tokens += progress.tokens
        self.steps += progress.new
        self.seconds += progress.seconds
        self.tracked.step(progress)
        after_s = self.steps_after * self.seconds / self.steps * _FORWARD_OF_STEP
        self.report(replace(progress, after_s=after_s))
