"""One packed forward: K members' batches through one base, to scores and losses of each member.

Shapes: K members, N examples of one member, B model rows (K * N * rows per example), U distinct ones of them,
T time, D width between blocks, C classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from raylora.adapters.base import Adapter, Tensors
from raylora.adapters.packed import Masks, Pack, make_pack, member_count, unstack
from raylora.data.task import Batch, Task, repeat
from raylora.engine.model.base import Base
from raylora.engine.model.gang import Round
from raylora.engine.model.packed_forward import inputs_of, pass_pack
from raylora.engine.model.token_head import Forward, WholeHead
from raylora.engine.model.token_losses import (
    PositionLoss,
    TokenLoss,
    at_tokens,
    divergence,
    negative_log_likelihood,
    predicting,
    with_divergence,
)
from raylora.engine.model.trunk import DistinctRows, enough_tokens
from raylora.engine.model.trunk_cache import TrunkCache
from raylora.ensemble.outputs import output_of
from raylora.spec.members import KLSpec

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
        self, model: PackedModel, stacked: Mapping[str, Tensor], frozen_tensors: Mapping[str, Tensor] | None = None,
        micro_batches: int = 1,
    ) -> None:
        """Take the members' trained tensors and what the adapter needs beside them, both stacked over K."""
        self.leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in stacked.items()}
        self.pack = model.pack({**self.leaves, **(frozen_tensors or {})})
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
    adapter: Adapter | Sequence[Adapter]
    """The one of all members, or that of each part of the stacks that they are in."""
    task: Task
    trunk_cache: TrunkCache | None = None
    """What training reads in place of computing the blocks below the adapters; predictions always compute them."""

    def pack(self, stacked: Mapping[str, Tensor], adapters_on: bool = True) -> Pack:
        """Return members' tensors, stacked over K, as a forward reads them."""
        own = self.adapter
        sites = [self.base.sites_of(one) for one in own] if isinstance(own, Sequence) else self.base.sites_of(own)
        return make_pack(own, sites, stacked, adapters_on)

    def step_tensors(
        self, stacked: Mapping[str, Tensor], frozen_tensors: Mapping[str, Tensor] | None = None, micro_batches: int = 1
    ) -> StepTensors:
        """Return members' tensors, stacked over K, materialized for all micro-batches of a step."""
        return StepTensors(self, stacked, frozen_tensors, micro_batches)

    def gradients(
        self, tensors: StepTensors | Mapping[str, Tensor], batch: Batch, dropout_seeds_K: Sequence[int],
        kl: KLSpec | None = None, reference_heads: Mapping[str, Tensor] | None = None, loss: ExampleLoss | None = None,
        token_loss: TokenLoss | None = None,
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
            token_loss: the same for a task that is scored token by token.
        """
        step = tensors if isinstance(tensors, StepTensors) else self.step_tensors(tensors)
        members, tokens = len(batch.lengths_K), int(batch.attention_mask_BT.sum())
        collated, batch = batch, batch.to(self.base.device)
        hidden_BTD = self._shared(collated, batch, forwards=1 if kl is None else 2)
        masks = self._masks(batch, dropout_seeds_K)
        # Before the pass with gradients: of a base that is split, a pass in between would leave nearly all gathered.
        reference = self._reference(step, reference_heads or {}, batch, hidden_BTD) if kl is not None else None
        pack = step.pack.dropping(masks)
        with self.base.round(Round.TRAIN):
            forward = partial(pass_pack, self.base, self.task, pack, batch, hidden_BTD)
            if self.per_token:
                of_position = self._position_loss(batch, token_loss, kl, reference)
                losses_N = self.task.loss(-self._token_losses(forward, batch, of_position), batch)
            else:
                losses_N = self._example_losses(forward(), batch, loss, kl, reference)
            losses_KN = losses_N.view(members, -1)
            if batch.weight_N is not None:
                losses_KN = losses_KN * batch.weight_N.view(members, -1)
            losses_K = losses_KN.mean(dim=1) if batch.part is None else losses_KN.sum(dim=1) * batch.part.weight
            with self.base.slot.use(pack):  # blocks that are run again read it again
                of_all = step.gradients_of(losses_K.sum())
        return PackLoss(losses_K.detach().tolist(), unstack(of_all), tokens)

    @property
    def per_token(self) -> bool:
        """Whether the task is scored token by token; then no more than a chunk of its logits need exist at once."""
        return output_of(self.task.output).per_token

    @torch.no_grad()
    def scores(
        self, stacked: Mapping[str, Tensor], batch: Batch, dropout_seeds_K: Sequence[int] | None = None
    ) -> tuple[Tensor, Batch]:
        """Return (scores, repeated batch) of K members that all read the same batch, member by member."""
        forward, repeated = self._forward_of_all(stacked, batch, dropout_seeds_K)
        with self.base.round(Round.FORWARD):
            if self.per_token:
                return -self._token_losses(forward, repeated, negative_log_likelihood(repeated)), repeated
            return self.task.scores(forward(), repeated), repeated

    @torch.no_grad()
    def token_logits(self, packs: Sequence[Mapping[str, Tensor]], batch: Batch) -> Iterator[Iterable[Tensor]]:
        """Yield, chunk by chunk of the positions that predict a batch's target tokens, each member's logits_CV.

        The members of all packs follow each other, and one's logits are made when they are asked for.
        """
        head = self.base.token_head
        states = (states_PS for stacked in packs for states_PS in self.token_states(stacked, batch))
        if isinstance(head, WholeHead):  # its states are all logits: those of one pack at a time
            yield states
            return
        of_members = list(states)
        for chunk in head.chunks(len(of_members[0])):
            yield (head.logits(states_PD[chunk]) for states_PD in of_members)

    @torch.no_grad()
    def token_states(self, stacked: Mapping[str, Tensor], batch: Batch) -> Sequence[Tensor]:
        """Return what each member's logits are made from at the positions that predict a batch's targets, P x S."""
        forward, repeated = self._forward_of_all(stacked, batch)
        with self.base.round(Round.FORWARD):
            states = self.base.token_head.states(forward, predicting(repeated))
        return states.chunk(len(repeated.lengths_K))

    def _forward_of_all(
        self, stacked: Mapping[str, Tensor], batch: Batch, dropout_seeds_K: Sequence[int] | None = None
    ) -> tuple[Forward, Batch]:
        """Return a forward pass of K members that all read the same batch, and the batch once per member."""
        members, batch = member_count(stacked), batch.to(self.base.device)
        hidden_BTD = None
        if self.base.trunk is not None and members > 1 and enough_tokens(batch.input_ids_BT.numel()):
            hidden_BTD = self.base.trunk.run(inputs_of(self.base, self.task, batch)).repeat(members, 1, 1)
        repeated = repeat(batch, members)
        pack = self.pack(stacked)
        if dropout_seeds_K is not None:
            pack = pack.dropping(self._masks(repeated, dropout_seeds_K))
        return partial(pass_pack, self.base, self.task, pack, repeated, hidden_BTD), repeated

    def _position_loss(
        self, batch: Batch, loss: TokenLoss | None, kl: KLSpec | None, reference_PS: Tensor | None
    ) -> PositionLoss:
        """Return the loss of a position, with the divergence from the reference if there is one."""
        of_position = (loss or negative_log_likelihood)(batch)
        if kl is None or reference_PS is None:
            return of_position
        return with_divergence(of_position, lambda chunk: self.base.token_head.logits(reference_PS[chunk]), kl)

    def _token_losses(self, forward: Forward, batch: Batch, loss: PositionLoss) -> Tensor:
        """Return loss_BT of one forward pass at its target tokens, and 0 elsewhere."""
        return at_tokens(self.base.token_head.losses(forward, predicting(batch), loss), batch)

    def _example_losses(
        self, logits: Tensor, batch: Batch, loss: ExampleLoss | None, kl: KLSpec | None, reference: Tensor | None
    ) -> Tensor:
        """Return loss_N, with the divergence from the reference's logits if there is one."""
        task = self.task
        losses_N = loss(logits, batch) if loss is not None else task.loss(task.scores(logits, batch), batch)
        if kl is None or reference is None:
            return losses_N
        return losses_N + kl.beta * divergence(task.scores(logits, batch), task.scores(reference, batch), kl)

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
        inputs = inputs_of(self.base, self.task, on_device)
        if cache is None and not saves:
            return trunk.run(inputs)
        first_U, of_B = rows.first_U.to(self.base.device), rows.of_B.to(self.base.device)
        distinct = {name: value[first_U] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        hidden_UTD = trunk.run(distinct) if cache is None else cache.read(batch, rows.first_U, distinct)
        return hidden_UTD[of_B]

    def _masks(self, batch: Batch, seeds_K: Sequence[int]) -> Masks:
        left_padded = batch.segments_BT is None and self.task.padding_side(self.base.is_decoder) == "left"
        masks = Masks(list(seeds_K), batch.lengths_K, left_padded)
        if batch.part is None:
            return masks
        rows = batch.rows_per_example
        return replace(masks, rows_before=batch.part.start * rows, rows=batch.part.of * rows)

    @torch.no_grad()
    def _reference(
        self, step: StepTensors, heads: Mapping[str, Tensor], batch: Batch, hidden_BTD: Tensor | None
    ) -> Tensor:
        """Return the logits with every adapter off, or what they are made from; the base's own pair stays on."""
        off = self.pack({**step.leaves, **heads}, adapters_on=False)
        forward = partial(pass_pack, self.base, self.task, off, batch, hidden_BTD)
        with self.base.round(Round.FORWARD):
            return self.base.token_head.states(forward, predicting(batch)) if self.per_token else forward()
