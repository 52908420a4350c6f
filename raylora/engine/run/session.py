"""One worker's session: the base and the data, loaded once, and the jobs that are done on it.

The Ray actor and the in-process driver both work here; neither knows anything about training.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from raylora import logs, registry
from raylora.adapters.base import Tensors, WholeModel
from raylora.adapters.export import to_peft
from raylora.adapters.packed import stack
from raylora.data.sets import DataSets
from raylora.engine.model import serialization
from raylora.engine.model.base import Base, load_base
from raylora.engine.model.machine import compute_device, peak_memory_bytes
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.model.quantized_layers import prepared_store
from raylora.engine.run.profiling import StepProfiler
from raylora.engine.run.run_metrics import aggregate
from raylora.engine.run.tracking import TrackedPack, Tracking, track_results
from raylora.engine.training.distillation_loss import DistillationLoss, read_distillation_loss, task_of
from raylora.engine.training.inputs import sets_of
from raylora.engine.training.member_plan import MemberPlan, PlanRole, member_plans_of
from raylora.engine.training.member_state import MemberState, SavedState
from raylora.engine.training.optimizer import start_deepspeed
from raylora.engine.training.predict import predict_set
from raylora.engine.training.trainer import PackTrainer, TrainingSettings
from raylora.ensemble.predictions import Predictions, Role
from raylora.errors import Interrupted, RunDirectoryError, StoreError
from raylora.progress import Activity, OnProgress, Progress, RowCounter
from raylora.records import JobTiming, RunMetrics
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore

logger = logging.getLogger(__name__)

StopSignal = Callable[[], int]


class Session(Protocol):
    """What a worker does its jobs on."""

    def load(self) -> None:
        """Load what all jobs need. Raises: UsageError for bad input."""

    def run_job(
        self, job: str, unit_names: Sequence[str], report: OnProgress, should_stop: StopSignal
    ) -> dict[str, str]:
        """Do and commit the units of a job; return those that failed. Raises: Interrupted."""

    def aggregate(self, units: Sequence[str], started_at: float) -> Mapping[str, Any]:
        """Put the finished units together. Raises: StoreError for a damaged one."""


class TrainingSession:
    """Trains, evaluates and commits packs of units over one base."""

    def __init__(self, spec: RunSpec, store: RunStore, cpus: int, gpus: int) -> None:
        """Remember what to load; :meth:`load` does the work."""
        self.spec, self.store, self.cpus = spec, store, cpus
        self.device = compute_device(gpus)
        self.task = task_of(spec)
        self.plans = {plan.name: plan for plan in member_plans_of(spec)}
        self.base: Base
        self.sets: DataSets
        self.distillation_loss: DistillationLoss | None

    def load(self) -> None:
        """Load the base and the data.

        Raises:
            RunDirectoryError: the data is not what the run was begun with.
        """
        started = time.perf_counter()
        # The thread count decides the order of float additions: equal members need equal threads.
        torch.set_num_threads(self.cpus)
        # On a GPU too: there the pools' index_add would add in any order. What has no such kernel only warns.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=self.device.type == "cuda")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs 7 % and nothing reads such memory
        start_deepspeed(self.device)
        self.base = load_base(
            self.spec.base, self.spec.adapter, self.task, self.device, prepared_store(self.store)
        )
        self.sets = sets_of(self.spec, self.task, self.base.tokenizer, self.store)
        recorded = self.store.read_json("data.json")
        if recorded and recorded["content_hash"] != self.sets.content_hash():
            raise RunDirectoryError(
                f"{self.store.uri}: the data has changed since the run was begun", "restore it, or start a new run"
            )
        logger.info("base and data loaded in %.1f s", time.perf_counter() - started)
        self.distillation_loss = read_distillation_loss(self.spec, self.store, self.task, self.sets)

    # --- a job --------------------------------------------------------------------------------------
    def run_job(
        self, job: str, unit_names: Sequence[str], report: OnProgress, should_stop: StopSignal
    ) -> dict[str, str]:
        """Train and evaluate units in one pack, commit each, and return those that failed with the reason.

        Raises:
            Interrupted: the units' state is committed; the job can be run again and continues.
        """
        plans = [self.plans[name] for name in unit_names]
        plans = [plan for plan in plans if not self.store.has_result(folder_of(plan))]
        if not plans:
            return {}
        with logs.about(self.spec.run_name(), [plan.name for plan in plans]):
            return self._run_job(job, plans, report, should_stop)

    def _run_job(
        self, job: str, plans: Sequence[MemberPlan], report: OnProgress, should_stop: StopSignal
    ) -> dict[str, str]:
        adapter = registry.load("adapter", plans[0].adapter.kind).build(plans[0].adapter)
        model = PackedModel(self.base, adapter, self.task)
        trainer = PackTrainer(
            model, TrainingSettings.of(self.spec), plans, self.sets.train.examples, self.sets.validation.examples,
            self.distillation_loss, self._saved(plans),
        )
        resumed_at = trainer.step
        logger.info("%s: training from step %d to %d", job, resumed_at, trainer.total)
        tracking = Tracking(self.spec, self.store)
        tracked, complete = TrackedPack(tracking, trainer), False
        profiler = StepProfiler(self.spec.profile, self.store, job, trainer.total - trainer.step)
        meter = _Meter(report, tracked, profiler)

        def save(trainer: PackTrainer) -> None:
            self._save(trainer)
            tracked.commit()

        try:
            with profiler:
                trainer.run(save, meter, should_stop, self._epoch_end)
            complete = True
        finally:
            tracking.close(complete)
        trained_s = time.perf_counter() - meter.started
        done = [state for state in trainer.states if not state.failure]
        logger.info("%s: trained in %.1f s", job, trained_s)
        evaluate_s = self._evaluate(model, done, report, should_stop)
        logger.info("%s: evaluated in %.1f s", job, evaluate_s)
        self.store.write_json(f"timing/{job}.json", JobTiming({
            "units": [t.plan.name for t in done],
            "train_s": trained_s,
            "evaluate_s": evaluate_s,
            "steps": trainer.step - resumed_at,
            "resumed_at_step": resumed_at,
            "tokens": meter.tokens,
            "peak_rss_bytes": peak_memory_bytes(),
            "peak_device_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0,
            "base_bytes": self.base.size_bytes,
            "base_parameters": self.base.parameters,
            "head_parameters": sum(p.numel() for head in self.base.heads.values() for p in head.parameters()),
            "member_parameters": sum(t.numel() for t in done[0].result().values()) if done else 0,
            "compute_dtype": str(self.base.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "pid": os.getpid(),
        }))
        return {t.plan.name: t.failure for t in trainer.states if t.failure}

    def aggregate(self, units: Sequence[str], started_at: float) -> RunMetrics:
        """Combine the finished units' predictions into the run's metrics. Raises: StoreError for a damaged one."""
        metrics = aggregate(self.spec, self.store, units, started_at)
        track_results(self.spec, self.store, metrics)
        return metrics

    # --- checkpoints --------------------------------------------------------------------------------
    def _save(self, trainer: PackTrainer) -> None:
        logger.debug("committing step %d", trainer.step)
        for state in trainer.states:
            files = serialization.pack_state(*state.saved(trainer.step))
            self.store.commit_checkpoint(state.plan.name, trainer.step, files)
        # Only now: until every plan has this step, the one before is the newest that all have.
        for state in trainer.states:
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
        if wanted and first is not None and first.training and epoch > epochs - wanted:
            content = serialization.to_bytes(first.optimizer.tensors())
            self.store.commit_result(f"snapshots/epoch-{epoch:03d}", {"member.safetensors": content})

    # --- results ------------------------------------------------------------------------------------
    def _evaluate(
        self, model: PackedModel, done: Sequence[MemberState], report: OnProgress, should_stop: StopSignal
    ) -> float:
        started = time.perf_counter()
        if not done:
            return 0.0
        # Before member 0 is committed: it is not taken up again afterwards.
        if any(t.plan.name == "member-000" for t in done) and self.spec.baselines.checkpoints:
            self._evaluate_snapshots(model, done[0].frozen_tensors, report, should_stop)
        members = [state.result() for state in done]
        whole = [{**tensors, **state.frozen_tensors} for tensors, state in zip(members, done, strict=True)]
        if done[0].plan.role is PlanRole.MC_DROPOUT:
            assert self.spec.baselines.mc_dropout is not None
            passes = self.spec.baselines.mc_dropout.passes
            seeds = [done[0].plan.stream("pass", number) for number in range(passes)]
            self._commit(done[0], members[0], self._predict(model, whole * passes, report, should_stop, seeds))
        else:
            sets = self._predict(model, whole, report, should_stop)
            for index, (state, tensors) in enumerate(zip(done, members, strict=True)):
                self._commit(state, tensors, [one.member(index) for one in sets])
        return time.perf_counter() - started

    def _evaluate_snapshots(
        self, model: PackedModel, frozen_tensors: Tensors, report: OnProgress, should_stop: StopSignal
    ) -> None:
        snapshots = [
            serialization.from_bytes(self.store.load_result(f"snapshots/{name}")["member.safetensors"]) | frozen_tensors
            for name in self.store.storage.list("snapshots")
            if self.store.has_result(f"snapshots/{name}")
        ]
        if snapshots:
            predictions = self._predict(model, snapshots, report, should_stop)
            self.store.commit_result("predictions/checkpoints", serialization.pack_predictions(predictions))

    def _predict(
        self, model: PackedModel, members: Sequence[Tensors], report: OnProgress, should_stop: StopSignal,
        dropout_seeds: Sequence[int] | None = None,
    ) -> list[Predictions]:
        stacked = stack([{n: t.to(self.base.device) for n, t in member.items()} for member in members])
        sets = evaluated_sets(self.sets)
        rows = RowCounter(Activity.EVALUATING, sum(len(loaded.examples) for loaded, _ in sets), report)
        predictions = []
        for loaded, role in sets:
            predictions.append(predict_set(
                model, stacked, loaded.examples, loaded.name, role, self.spec.evaluation.batch, dropout_seeds, rows,
            ))
            if should_stop():
                raise Interrupted("stopped while evaluating; the trained state is committed",
                                  signal_number=should_stop())
        return predictions

    def _commit(self, state: MemberState, tensors: Tensors, predictions: Sequence[Predictions]) -> None:
        """Publish predictions first: a member's folder is what marks the plan as done."""
        plan = state.plan
        self.store.commit_result(f"predictions/{plan.name}", serialization.pack_predictions(predictions))
        facts = {
            "name": plan.name,
            "role": plan.role,
            "seed": plan.seed,
            "run_digest": self.spec.digest(),
            "adapter": plan.adapter.model_dump(mode="json"),
            "base": self.spec.base.model_dump(mode="json"),
            "labels": self.task.label_names,
            "history": state.history,
            "stopped_at": state.stopped_at,
            "layout": serialization.layout_of(tensors, state.frozen_tensors),
        }
        task_type = "SEQ_CLS" if self.task.auto_class == "AutoModelForSequenceClassification" else "CAUSAL_LM"
        peft = to_peft(
            tensors, plan.adapter, self.base.sites, self.base.target_modules, task_type, self.base.export_name
        )
        check_finite(peft.tensors, plan)
        config = {"adapter_config.json": peft.config_bytes()} if peft.config is not None else {}
        self.store.commit_result(folder_of(plan), {
            "adapter_model.safetensors": serialization.to_bytes(peft.tensors),
            **config,
            "member.json": serialization.json.dumps(facts, indent=1, sort_keys=True).encode(),
            "README.md": _readme(plan, self.spec, self.base.export_name, bool(config)).encode(),
        })
        self.store.discard_checkpoints(plan.name)


class _Meter:
    """Counts tokens and time on the way to profiler, trackers and whoever listens to progress."""

    def __init__(self, report: OnProgress, tracked: TrackedPack, profiler: StepProfiler) -> None:
        self.report, self.tracked, self.profiler = report, tracked, profiler
        self.tokens, self.started = 0, time.perf_counter()

    def __call__(self, progress: Progress) -> None:
        self.profiler.after_step()
        self.tokens += progress.tokens
        self.tracked.step(progress)
        self.report(progress)


def folder_of(plan: MemberPlan) -> str:
    """Return where a unit's result lies in the run directory."""
    return f"members/{plan.name}" if plan.role is PlanRole.MEMBER else f"baselines/{plan.name}"


def evaluated_sets(sets: DataSets) -> list[tuple[Any, Role]]:
    """Return every set that members are evaluated on, with its role."""
    return [
        (sets.validation, "validation"),
        (sets.test, "test"),
        *((loaded, "in_distribution") for loaded in sets.in_distribution.values()),
        *((loaded, "out_of_distribution") for loaded in sets.out_of_distribution.values()),
    ]


def check_finite(tensors: Tensors, plan: MemberPlan) -> None:
    """Raise StoreError rather than save a member that is not a number."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise StoreError(f"{plan.name}: {bad[0]} is not finite and is not saved")


def _readme(plan: MemberPlan, spec: RunSpec, base_name: str, in_peft: bool) -> str:
    whole = isinstance(registry.load("adapter", plan.adapter.kind).build(plan.adapter), WholeModel)
    head_only = plan.role is PlanRole.LAST_LAYER
    kind = "last-layer head" if head_only else "whole model" if whole else f"{plan.adapter.kind} adapter"
    library = "peft" if in_peft else "raylora"
    use = (
        "`raylora export RUN --format checkpoint` writes it as a folder that transformers loads." if whole else
        f"Load it with `PeftModel.from_pretrained(base, folder)` on `{base_name}`." if in_peft else
        "PEFT does not know this kind: `raylora export RUN --format peft-lora` writes its members in PEFT's format."
    )
    return (
        f"---\nbase_model: {base_name}\nlibrary_name: {library}\ntags: [raylora, {plan.adapter.kind}]\n---\n\n"
        f"# {plan.name}\n\nOne {kind} of an ensemble, seed {plan.seed}, task {spec.task.kind}.\n{use}\n"
    )
