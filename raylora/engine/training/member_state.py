"""One member while it trains: built new or from a commit, and cut into what a commit holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from raylora.adapters.base import HEAD, Adapter, InRounds, PartlyTrained, Tensors
from raylora.adapters.side_by_side import adapter_of
from raylora.data.order import Order
from raylora.data.task import Example
from raylora.engine.model.base import head_tensors
from raylora.engine.model.member_tensors import frozen_tensors_of, initial_member, start_tensors
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.model.serialization import check_layout, layout_of
from raylora.engine.training.member_plan import MemberPlan, order_seed
from raylora.engine.training.optimizer import MemberOptimizer
from raylora.engine.training.schedule import restart_steps, round_starts, total_steps
from raylora.engine.training.weight_moments import WeightMoments
from raylora.ensemble.outputs import output_of
from raylora.records import HistoryRow
from raylora.spec import EnsembleSpec, OptimizationSpec

SavedState = tuple[dict[str, Tensors], dict[str, Any]]
"""What a commit holds of a member: tensors by section, and the plain facts beside them."""


@dataclass
class MemberState:
    """One member while it trains."""

    plan: MemberPlan
    optimizer: MemberOptimizer
    order: Order
    initial_head: Tensors
    frozen_tensors: Tensors
    """What the adapter needs but does not train, and can make again."""
    kept: Tensors = field(default_factory=dict)
    """What is saved with the member and is not trained, if its adapter parts it so."""
    history: list[HistoryRow] = field(default_factory=list)
    best_value: float | None = None
    best_tensors: Tensors | None = None
    bad_epochs: int = 0
    stopped_at: int | None = None
    """The step after which early stopping took the member out of the pack."""
    begun_at: int = 0
    """The step of its pack after which it began."""
    failure: str = ""
    moments: WeightMoments = field(default_factory=WeightMoments)
    """Of its weights after some of its steps, where a baseline draws from them."""

    @property
    def training(self) -> bool:
        """Whether the member still takes steps."""
        return self.stopped_at is None and not self.failure

    def tensors(self) -> Tensors:
        """Return the live member: what is trained, and what is saved with it."""
        adapter = adapter_of(self.plan.adapter)
        if not isinstance(adapter, PartlyTrained):
            return self.optimizer.tensors()
        trained, heads = _without_head(self.optimizer.tensors())
        return adapter.joined(trained, self.kept) | heads

    def beside(self) -> Tensors:
        """Return what a forward needs beside the tensors that are trained."""
        return {**self.kept, **self.frozen_tensors}

    def whole(self) -> Tensors:
        """Return the live member with what is fixed, as a forward needs it."""
        return {**self.tensors(), **self.frozen_tensors}

    def result(self) -> Tensors:
        """Return the member: its best state if early stopping watched it, else its last."""
        final = self.best_tensors if self.best_tensors is not None else self.tensors()
        return {name: t.detach().cpu().clone() for name, t in final.items()}

    def saved(self, step: int) -> SavedState:
        """Return what a commit after a step holds; of a member that failed, no tensors."""
        if self.failure:
            return {}, {"step": step, "failure": self.failure}
        sections = {"member": self.tensors(), "optimizer": self.optimizer.state()}
        if self.best_tensors is not None:
            sections["best"] = self.best_tensors
        sections |= self.moments.sections()
        facts = {
            "step": step,
            "updates": self.optimizer.steps_done,
            "history": self.history,
            "best_value": self.best_value,
            "bad_epochs": self.bad_epochs,
            "stopped_at": self.stopped_at,
            "layout": layout_of(sections["member"], self.frozen_tensors),
            **({"moments": self.moments.count} if self.moments.count else {}),
        }
        return sections, facts

    def judge(self, value: float, step: int, patience: int, lower_is_better: bool) -> None:
        """Keep the weights if a validation metric is the best so far; stop after too many epochs that are not."""
        best = self.best_value
        if best is None or (value < best if lower_is_better else value > best):
            self.best_value, self.bad_epochs = value, 0
            self.best_tensors = {n: t.cpu().clone() for n, t in self.tensors().items()}
            return
        self.bad_epochs += 1
        if self.bad_epochs >= patience:
            self.stopped_at = step


def lengths_of(examples: Sequence[Example]) -> tuple[int, ...]:
    """Return the tokens of each example's longest sequence."""
    return tuple(max(map(len, example.sequences)) for example in examples)


def order_of(
    plan: MemberPlan, lengths: tuple[int, ...], optimization: OptimizationSpec, ensemble: EnsembleSpec
) -> Order:
    """Return the order in which a unit sees training rows of these lengths."""
    return Order(
        len(lengths), optimization.micro_batch, order_seed(plan, ensemble), plan.sample_of(len(lengths)),
        lengths if optimization.group_by_length else None,
    )


def _without_head(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """Return the adapter's tensors of a member, and its head's."""
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    return {name: tensor for name, tensor in tensors.items() if name not in heads}, heads


class MemberBuilder:
    """Builds the members of one job, from their seeds or from what was committed of them."""

    def __init__(
        self, model: PackedModel, train: Sequence[Example], optimization: OptimizationSpec, ensemble: EnsembleSpec
    ) -> None:
        """Read the base's head and the labels once for all members."""
        self.model, self.rows = model, len(train)
        self.optimization, self.ensemble = optimization, ensemble
        self._head = head_tensors(model.base)
        labels = [example.label for example in train if example.label is not None]
        self._start_value = output_of(model.task.output).start_value(labels)
        self._lengths = lengths_of(train)
        self._total = total_steps(self.rows, optimization)

    def build(self, plan: MemberPlan, saved: SavedState | None = None, begun_at: int = 0) -> MemberState:
        """Return a member at its start, or as it was saved.

        Args:
            begun_at: the step of its pack after which it begins, if it was not saved.

        Raises:
            RunDirectoryError: it was saved with other tensors than it would have now.
        """
        model, adapter = self.model, adapter_of(plan.adapter)
        tensors = initial_member(model.base, adapter, self._head, plan.stream("init"), self._start_value)
        frozen_tensors = frozen_tensors_of(model.base, adapter, plan.stream("fixed"))
        initial_head = {n: t.to(model.base.device) for n, t in tensors.items() if n.startswith(HEAD)}
        sections, facts = saved or ({}, {})
        if "member" in sections:
            found = layout_of(tensors, frozen_tensors)
            check_layout(f"the checkpoint of {plan.name}", facts.get("layout"), found)
            # In this order: a file has its own, and sums depend on it.
            tensors = {name: sections["member"][name] for name in tensors}
        begun_at = facts.get("begun_at", begun_at)
        order = order_of(plan, self._lengths, self.optimization, self.ensemble)
        order = replace(order, begins=begun_at * self.optimization.accumulation)
        starts, own_step = self._round_starts(plan), facts.get("step", begun_at) - begun_at
        # A round begins with its first step: what is saved after the last step of one is that one's still.
        trained, kept = self._parted(adapter, tensors, sum(0 < start < own_step for start in starts))
        state = MemberState(
            plan, self._optimizer(plan, trained), order, initial_head, frozen_tensors, kept, begun_at=begun_at
        )
        state.failure = facts.get("failure", "")
        if "member" in sections:
            state.optimizer.load_state(sections.get("optimizer", {}), facts["updates"])
            state.history, state.best_value = facts["history"], facts["best_value"]
            state.bad_epochs, state.stopped_at = facts["bad_epochs"], facts["stopped_at"]
            state.best_tensors = {n: sections["best"][n] for n in tensors} if "best" in sections else None
            state.moments = WeightMoments.restored(sections, facts.get("moments", 0))
        return state

    def begin_rounds(self, states: Sequence[MemberState], step: int) -> bool:
        """Give a fresh part to the members of whom a round begins with this step, from 0; return whether there are any.

        What their round before trained is kept. The head goes on with its moments, the part begins without.
        """
        beginning = [state for state in states if step and step in self._round_starts(state.plan)]
        for state in beginning:
            adapter, plan = adapter_of(state.plan.adapter), state.plan
            assert isinstance(adapter, InRounds)
            number = self._round_starts(plan).index(step)
            own, heads = _without_head(state.tensors())
            generator = torch.Generator().manual_seed(plan.stream("round", number))
            begun = adapter.begin_round(own, self.model.base.sites_of(adapter), number, generator)
            trained, state.kept = self._parted(adapter, {**begun, **heads}, number)
            moments = {name: t for name, t in state.optimizer.state().items() if name.startswith(HEAD)}
            updates = state.optimizer.steps_done
            state.optimizer = self._optimizer(plan, trained)
            state.optimizer.load_state(moments, updates)
        return bool(beginning)

    def _round_starts(self, plan: MemberPlan) -> list[int]:
        adapter = adapter_of(plan.adapter)
        return round_starts(self._total, adapter.rounds) if isinstance(adapter, InRounds) else [0]

    def _parted(self, adapter: Adapter, tensors: Mapping[str, Tensor], number: int) -> tuple[Tensors, Tensors]:
        """Return what a round trains of a member, its head too, and what it keeps."""
        if not isinstance(adapter, PartlyTrained):
            return dict(tensors), {}
        own, heads = _without_head(tensors)
        trained, kept = adapter.parted(own, number)
        return {**trained, **heads}, {n: t.to(self.model.base.device, torch.float32) for n, t in kept.items()}

    def _optimizer(self, plan: MemberPlan, tensors: Mapping[str, Tensor]) -> MemberOptimizer:
        model, adapter = self.model, adapter_of(plan.adapter)
        return MemberOptimizer(
            tensors, adapter, plan.optimization, plan.regularizers,
            self._total, model.base.device, start_tensors(model.base, adapter),
            restart_steps(self.rows, plan.optimization), model.base.gang, self._round_starts(plan)[1:],
        )
