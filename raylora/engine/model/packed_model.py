"""One packed forward: K members' batches through one base, to scores and losses of each member.

Shapes: K members, N examples of one member, B model rows (K * N * rows per example), U distinct ones of them,
T time, D width between blocks, C classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from raylora.adapters.base import Adapter, Tensors
from raylora.adapters.packed import Dropout, Pack, make_pack
from raylora.data.task import Batch, Task, repeat, sum_per_example
from raylora.engine.model.base import Base
from raylora.engine.model.gang import Round
from raylora.engine.model.trunk import DistinctRows, enough_tokens
from raylora.engine.model.trunk_cache import TrunkCache
from raylora.ensemble.outputs import output_of
from raylora.spec.run import KLSpec

ExampleLoss = Callable[[Tensor, Batch], Tensor]
"""(logits, joined batch) -> loss of each example."""


@dataclass(frozen=True)
class PackLoss:
    """What one packed micro-batch gave each of its members."""

    losses_K: list[float]
    gradients: list[Tensors]
    """Per member, by tensor name: the gradient of its own loss and of nothing else."""
    tokens: int


class StepTensors:
    """K members' tensors as one optimizer step uses them: adapters are materialized once, not per micro-batch."""

    def __init__(
        self, base: Base, adapter: Adapter, stacked: Mapping[str, Tensor],
        frozen_tensors: Mapping[str, Tensor] | None = None, micro_batches: int = 1,
    ) -> None:
        """Take the members' trained tensors and what the adapter needs beside them, both stacked over K."""
        self.leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in stacked.items()}
        self.pack = make_pack(adapter, base.sites, {**self.leaves, **(frozen_tensors or {})})
        self.micro_batches = micro_batches

    def gradients_of(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the loss's gradient by tensor name; the graph of the materialized adapters stays if it is shared."""
        found = torch.autograd.grad(
            loss, list(self.leaves.values()), retain_graph=self.micro_batches > 1, allow_unused=True
        )
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(self.leaves.items(), found, strict=True)
        }


@dataclass(frozen=True)
class PackedModel:
    """A base, a kind of adapter and a task: what any K members together compute from their tensors and batches."""

    base: Base
    adapter: Adapter
    task: Task
    trunk_cache: TrunkCache | None = None
    """What training reads in place of computing the blocks below the adapters; predictions always compute them."""

    def step_tensors(
        self, stacked: Mapping[str, Tensor], frozen_tensors: Mapping[str, Tensor] | None = None, micro_batches: int = 1
    ) -> StepTensors:
        """Return members' tensors, stacked over K, materialized for all micro-batches of a step."""
        return StepTensors(self.base, self.adapter, stacked, frozen_tensors, micro_batches)

    def gradients(
        self, tensors: StepTensors | Mapping[str, Tensor], batch: Batch, dropout_seeds_K: Sequence[int],
        kl: KLSpec | None = None, reference_heads: Mapping[str, Tensor] | None = None, loss: ExampleLoss | None = None,
    ) -> PackLoss:
        """Run K members forward and backward once and return each one's loss and gradient.

        The losses are summed, not averaged: a member's gradient is what it would get alone.

        Args:
            tensors: the members' tensors, stacked over K; as a mapping they are materialized for this call alone.
            batch: every member's own rows, as :func:`raylora.data.task.collate_pack` puts them together.
            dropout_seeds_K: seeds of this step's adapter dropout.
            kl: adds ``beta * KL`` to the base with its adapters off (arXiv 2310.00035, section 3).
            reference_heads: the members' initial heads, which the reference predicts with.
            loss: takes the place of the task's, such as a distillation loss.
        """
        step = tensors if isinstance(tensors, StepTensors) else self.step_tensors(tensors)
        members, tokens = len(batch.lengths_K), int(batch.attention_mask_BT.sum())
        collated, batch = batch, batch.to(self.base.device)
        hidden_BTD = self._shared(collated, batch, forwards=1 if kl is None else 2)
        dropout = self._dropout(batch, dropout_seeds_K)
        # Before the pass with gradients: of a base that is split, a pass in between would leave nearly all gathered.
        reference = self._reference(step, reference_heads or {}, batch, hidden_BTD) if kl is not None else None
        pack = replace(step.pack, dropout=dropout)
        with self.base.round(Round.TRAIN):
            logits = _forward(self.base, self.task, pack, batch, hidden_BTD)
            task_loss = loss or (lambda logits, batch: self.task.loss(self.task.scores(logits, batch), batch))
            losses_KN = task_loss(logits, batch).view(members, -1)
            if kl is not None and reference is not None:
                divergence = _divergence(self.task, batch, logits, reference, kl)
                losses_KN = losses_KN + kl.beta * divergence.view(members, -1)
            if batch.weight_N is not None:
                losses_KN = losses_KN * batch.weight_N.view(members, -1)
            losses_K = losses_KN.mean(dim=1) if batch.part is None else losses_KN.sum(dim=1) * batch.part.weight
            with self.base.slot.use(pack):  # blocks that are run again read it again
                of_all = step.gradients_of(losses_K.sum())
        gradients = [{name: gradient[k] for name, gradient in of_all.items()} for k in range(members)]
        return PackLoss(losses_K.detach().tolist(), gradients, tokens)

    @torch.no_grad()
    def scores(
        self, stacked: Mapping[str, Tensor], batch: Batch, dropout_seeds_K: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Batch]:
        """Return (logits, scores, repeated batch) of K members that all read the same batch, member by member."""
        members, batch = len(next(iter(stacked.values()))), batch.to(self.base.device)
        hidden_BTD = None
        if self.base.trunk is not None and members > 1 and enough_tokens(batch.input_ids_BT.numel()):
            hidden_BTD = self.base.trunk.run(_inputs(self.base, self.task, batch)).repeat(members, 1, 1)
        repeated = repeat(batch, members)
        dropout = None if dropout_seeds_K is None else self._dropout(repeated, dropout_seeds_K)
        with self.base.round(Round.FORWARD):
            pack = make_pack(self.adapter, self.base.sites, stacked, dropout)
            logits = _forward(self.base, self.task, pack, repeated, hidden_BTD)
        return logits, self.task.scores(logits, repeated), repeated

    def _shared(self, batch: Batch, on_device: Batch, forwards: int) -> Tensor | None:
        """Return what enters the first adapted block, each distinct row computed once; None if it saves nothing.

        What decides is the batch and nothing else, so that a member is the same whenever it takes this step.

        Args:
            batch: the rows as they were collated, which is where they are compared.
            on_device: the same rows where the base is.
            forwards: how many forwards of this batch will read it.
        """
        trunk, cache = self.base.trunk, self.trunk_cache
        if trunk is None:
            return None
        rows = DistinctRows.of(batch)
        saves = rows.save_work(batch.input_ids_BT.shape[1])
        if cache is None and not saves and forwards == 1:
            return None
        inputs = _inputs(self.base, self.task, on_device)
        if cache is None and not saves:
            return trunk.run(inputs)
        first_U, of_B = rows.first_U.to(self.base.device), rows.of_B.to(self.base.device)
        distinct = {name: value[first_U] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        hidden_UTD = trunk.run(distinct) if cache is None else cache.read(batch, rows.first_U, distinct)
        return hidden_UTD[of_B]

    def _dropout(self, batch: Batch, seeds_K: Sequence[int]) -> Dropout | None:
        if self.adapter.spec.dropout == 0.0:
            return None
        left_padded = batch.segments_BT is None and self.task.padding_side(self.base.is_decoder) == "left"
        dropout = Dropout(self.adapter.spec.dropout, list(seeds_K), batch.lengths_K, left_padded)
        if batch.part is None:
            return dropout
        rows = batch.rows_per_example
        return replace(dropout, rows_before=batch.part.start * rows, rows=batch.part.of * rows)

    @torch.no_grad()
    def _reference(
        self, step: StepTensors, heads: Mapping[str, Tensor], batch: Batch, hidden_BTD: Tensor | None
    ) -> Tensor:
        """Return the logits with every adapter off; a pair that belongs to the base stays on."""
        off = make_pack(self.adapter, self.base.sites, {**step.leaves, **heads}, adapters_on=False)
        with self.base.round(Round.FORWARD):
            return _forward(self.base, self.task, off, batch, hidden_BTD)


def _inputs(base: Base, task: Task, batch: Batch) -> dict[str, Any]:
    """Return what the model's forward is given."""
    return {**batch.model_inputs(), **task.forward_kwargs(batch), **({"use_cache": False} if base.is_decoder else {})}


def _forward(base: Base, task: Task, pack: Pack, batch: Batch, hidden_BTD: Tensor | None = None) -> Tensor:
    """Return the logits; ``hidden_BTD`` is what the trunk made of the batch, if that is known."""
    inputs = _inputs(base, task, batch)
    if pack.weights:
        return torch.cat([
            _forward_own(base, own, {n: v.chunk(pack.members)[k] if isinstance(v, Tensor) else v
                                     for n, v in inputs.items()})
            for k, own in enumerate(pack.alone())
        ])
    replaced = nullcontext() if base.trunk is None or hidden_BTD is None else base.trunk.replaced(hidden_BTD)
    with base.slot.use(pack), replaced:
        return base.model(**inputs).logits


def _forward_own(base: Base, pack: Pack, inputs: dict[str, Any]) -> Tensor:
    """Return the logits of one member whose weights stand in for the base's; tied weights follow their first name."""
    types = {name: parameter.dtype for name, parameter in base.model.named_parameters()}
    weights = {name: weight.to(types[name]) for name, weight in pack.weights.items()}
    with base.slot.use(pack):
        return functional_call(base.model, weights, kwargs=inputs).logits


def _divergence(task: Task, batch: Batch, logits: Tensor, reference: Tensor, kl: KLSpec) -> Tensor:
    """Return KL per example, over the classes, or over the vocabulary as a mean of the target tokens."""
    if not output_of(task.output).per_token:
        return _kl(task.scores(logits, batch), task.scores(reference, batch), kl)
    assert batch.target_mask_BT is not None
    # The logits at position t predict token t + 1, so the mask moves one to the left.
    mask_BT = batch.target_mask_BT[:, 1:].float()
    kl_BT = _kl(logits[:, :-1].float(), reference[:, :-1].float(), kl)
    return sum_per_example(kl_BT * mask_BT, batch) / sum_per_example(mask_BT, batch).clamp(min=1)


def _kl(scores: Tensor, reference: Tensor, kl: KLSpec) -> Tensor:
    logp, logq = F.log_softmax(scores, dim=-1), F.log_softmax(reference, dim=-1)
    if kl.direction == "reverse":
        logp, logq = logq, logp
    return (logp.exp() * (logp - logq)).sum(dim=-1)


