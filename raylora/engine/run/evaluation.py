"""What is done with members when they are trained: predict every set, and commit predictions and members."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from raylora.adapters.base import Tensors, WholeModel
from raylora.adapters.export import to_peft
from raylora.adapters.packed import stack
from raylora.adapters.side_by_side import SideBySide, adapter_of
from raylora.data.order import derive_seed
from raylora.data.sets import DataSets, LoadedSet
from raylora.data.task import Task
from raylora.engine.model import serialization
from raylora.engine.model.base import Base
from raylora.engine.model.member_tensors import frozen_tensors_of
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.run.derived import MadeOfMember0, Trained
from raylora.engine.run.finished_members import member_facts, member_tensors
from raylora.engine.run.laplace_baseline import FittedLaplace
from raylora.engine.training.member_plan import MemberPlan, PlanRole
from raylora.engine.training.predict import as_predictions, predict_set
from raylora.ensemble.predictions import Predictions, Role
from raylora.errors import Interrupted, StoreError
from raylora.progress import Activity, OnProgress, RowCounter
from raylora.records import BaselineCost, LaplaceFit
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore


def read_trained(spec: RunSpec, store: RunStore, base: Base, plan: MemberPlan) -> Trained:
    """Return a committed member. Raises: StoreError for a damaged one, RunDirectoryError for one of another base."""
    adapter = adapter_of(plan.adapter)
    files = store.load_result(plan.folder)
    facts, tensors = member_facts(files), member_tensors(files)
    frozen_tensors = frozen_tensors_of(base, adapter, plan.stream("fixed"))
    serialization.check_layout(plan.name, facts["layout"], serialization.layout_of(tensors, frozen_tensors))
    return Trained(plan, tensors, frozen_tensors, facts["steps"], facts["history"], facts["stopped_at"])


class Evaluator:
    """Evaluates and commits members of one base on the sets of one run; what is committed already stays as it is."""

    def __init__(self, spec: RunSpec, store: RunStore, task: Task, base: Base, sets: DataSets) -> None:
        self.spec, self.store, self.task, self.base, self.sets = spec, store, task, base, sets
        self.made_of_member_0 = MadeOfMember0(spec.baselines, store)

    def is_predicted(self, plan: MemberPlan) -> bool:
        """Return whether all predictions that belong to a plan are committed."""
        missing = self.made_of_member_0.missing() if plan.name == "member-000" else []
        return self.store.has_result(f"predictions/{plan.name}") and not missing

    def forwards_ahead(self, plans: Sequence[MemberPlan]) -> int:
        """Return how many rows a pack's evaluation will predict, each as often as other dropout or states ask for."""
        rows = sum(len(loaded.examples) for loaded, _ in evaluated_sets(self.sets))
        dropout = self.spec.baselines.mc_dropout
        passes = dropout.passes if dropout is not None and plans[0].role is PlanRole.MC_DROPOUT else 1
        return rows * (passes + (self.made_of_member_0.forwards if plans[0].name == "member-000" else 0))

    def evaluate(
        self, model: PackedModel, done: Sequence[Trained], report: OnProgress, should_stop: Callable[[], int]
    ) -> float:
        """Predict all sets with the members of a pack, commit what is not there yet, and return the seconds taken.

        Raises:
            Interrupted: a signal came; what is not committed is predicted again next time.
            StoreError: a member is not finite.
        """
        started = time.perf_counter()
        if not done:
            return 0.0
        first = done[0]
        if first.plan.name == "member-000":
            own = replace(model, adapter=adapter_of(first.plan.adapter))
            self.made_of_member_0.make(
                first, lambda members: self._predict(own, members, report, should_stop),
                lambda: self._by_laplace(own, first, report, should_stop),
            )
        whole = [{**one.tensors, **one.frozen_tensors} for one in done]
        beside = SideBySide.of([one.plan.adapter for one in done])
        model = replace(model, adapter=beside.adapters)
        if first.plan.role is PlanRole.MC_DROPOUT:
            assert self.spec.baselines.mc_dropout is not None
            passes = self.spec.baselines.mc_dropout.passes
            seeds = [first.plan.stream("pass", number) for number in range(passes)]
            self._commit(first, self._predict(model, whole * passes, report, should_stop, seeds))
        else:
            sets = self._predict(model, whole, report, should_stop, parts=beside.parts)
            for index, one in enumerate(done):
                self._commit(one, [part.member(index) for part in sets])
        return time.perf_counter() - started

    def _predict(
        self, model: PackedModel, members: Sequence[Tensors], report: OnProgress, should_stop: Callable[[], int],
        dropout_seeds: Sequence[int] | None = None, parts: Sequence[int] | None = None,
    ) -> list[Predictions]:
        stacked = stack([{n: t.to(self.base.device) for n, t in member.items()} for member in members], parts)
        sets = evaluated_sets(self.sets)
        rows = RowCounter(Activity.EVALUATING, sum(len(loaded.examples) for loaded, _ in sets), report)
        predictions = []
        for loaded, role in sets:
            predictions.append(predict_set(
                model, stacked, loaded.examples, loaded.name, role, self.spec.evaluation.batch, dropout_seeds, rows,
            ))
            _check_stop(should_stop)
        return predictions

    def _by_laplace(
        self, model: PackedModel, one: Trained, report: OnProgress, should_stop: Callable[[], int]
    ) -> tuple[list[Predictions], LaplaceFit, BaselineCost]:
        """Fit a Gaussian around member 0 on the training rows and predict all sets by it."""
        spec, batch, sets = self.spec.baselines.laplace, self.spec.evaluation.batch, evaluated_sets(self.sets)
        assert spec is not None
        train = self.sets.train.examples
        total, done = len(train) + sum(len(part.examples) for part, _ in sets), 0
        rows = RowCounter(Activity.EVALUATING, total, report)

        def on_rows(count: int) -> None:
            nonlocal done
            done += count
            rows(done, total)
            _check_stop(should_stop)

        fitted = FittedLaplace.on(spec, model, one.tensors, train, batch, on_rows)
        started, predictions = time.perf_counter(), []
        for part, role in sets:
            seed = derive_seed(one.plan.stream("laplace"), part.name)
            predictions.append(as_predictions(model.task, part.examples, part.name, role,
                                              fitted.predict(part.examples, batch, seed, on_rows)))
        return predictions, fitted.facts(), fitted.cost(time.perf_counter() - started)

    def _commit(self, one: Trained, predictions: Sequence[Predictions]) -> None:
        """Publish predictions first: a member's folder is what marks the plan as trained."""
        plan = one.plan
        if not self.store.has_result(f"predictions/{plan.name}"):
            self.store.commit_result(f"predictions/{plan.name}", serialization.pack_predictions(predictions))
        if not self.store.has_result(plan.folder):
            self._commit_member(one)
        if self.spec.checkpointing.keep_final:
            self.store.prune_checkpoints(plan.name, one.steps if one.committed_at is None else one.committed_at, 1)
        else:
            self.store.discard_checkpoints(plan.name)

    def _commit_member(self, one: Trained) -> None:
        plan = one.plan
        facts = {
            "name": plan.name,
            "role": plan.role,
            "seed": plan.seed,
            "adapter": plan.adapter.model_dump(mode="json"),
            "base": self.spec.base.model_dump(mode="json"),
            "labels": self.task.label_names,
            "steps": one.steps,
            "history": one.history,
            "stopped_at": one.stopped_at,
            **({"settings": dict(plan.settings)} if plan.settings else {}),
            "layout": serialization.layout_of(one.tensors, one.frozen_tensors),
        }
        task_type = "SEQ_CLS" if self.task.auto_class == "AutoModelForSequenceClassification" else "CAUSAL_LM"
        at = self.base.layers.of(plan.adapter)
        peft = to_peft(one.tensors, plan.adapter, at.sites, at.target_modules, task_type, self.base.export_name)
        check_finite(peft.tensors, plan)
        config = {"adapter_config.json": peft.config_bytes()} if peft.config is not None else {}
        self.store.commit_result(plan.folder, {
            "adapter_model.safetensors": serialization.to_bytes(peft.tensors),
            **config,
            "member.json": json.dumps(facts, indent=1, sort_keys=True).encode(),
            "README.md": _readme(plan, self.spec, self.base.export_name, bool(config)).encode(),
        })


def _check_stop(should_stop: Callable[[], int]) -> None:
    if should_stop():
        raise Interrupted("stopped while evaluating; the trained state is committed", signal_number=should_stop())


def evaluated_sets(sets: DataSets) -> list[tuple[LoadedSet, Role]]:
    """Return every set of which members predict something, with its role."""
    return [(loaded, role) for loaded, role in with_roles(sets) if not loaded.only_asks]


def with_roles(sets: DataSets) -> list[tuple[LoadedSet, Role]]:
    """Return every set that is not trained on, with its role."""
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
    whole = isinstance(adapter_of(plan.adapter), WholeModel)
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
