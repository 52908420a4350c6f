"""A teacher that stays loaded: its members say what they think of every token that a student reads or has written.

The teacher's hidden states of a batch are kept, of every member, and its logits are made where the student's are: for
some positions at a time, over the whole vocabulary.

Shapes: M teacher members, K students of a pack, B model rows of all students, P positions that predict a target token,
C of them in a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from raylora.data.task import Batch
from raylora.distill import Annealed, Loss, Writing
from raylora.distill.loss_functions import UNLABELED, mixture
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.model.token_head import WholeHead
from raylora.engine.model.token_losses import PositionLoss, next_tokens, predicting


class LiveTeacher:
    """The members of a finished run, ready to be asked."""

    def __init__(
        self, model: PackedModel, packs: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
    ) -> None:
        """Take the members' tensors, stacked by what shares a forward, and what each of them weighs in that order."""
        self.model, self.packs, self.weights = model, packs, weights

    @torch.no_grad()
    def mixture(self, batch: Batch, temperature: float) -> Callable[[slice], Tensor]:
        """Return what makes ``log sum_m w_m softmax(z_m / T)`` of some positions, C x V.

        The members have then read the batch, all of a pack in one forward.
        """
        head = self.model.base.token_head
        states = chain.from_iterable(self.model.token_states(stacked, batch) for stacked in self.packs)
        if isinstance(head, WholeHead):  # its states are logits: those of one pack at a time
            logp_PV = mixture(states, temperature, self.weights)
            return lambda chunk: logp_PV[chunk]
        of_members = list(states)
        return lambda chunk: mixture(
            (head.logits(states_PS[chunk]) for states_PS in of_members), temperature, self.weights
        )


class LiveDistillationLoss:
    """Takes the place of the task's loss while a student trains beside its teacher."""

    def __init__(self, loss: Loss, teacher: LiveTeacher, writing: Writing) -> None:
        self.loss, self.teacher, self.writing = loss, teacher, writing

    def of_positions(self, batch: Batch, progress: float) -> PositionLoss:
        """Return the loss of the positions that predict a batch's target tokens; the teacher reads the batch first."""
        loss = self.loss.at(progress) if isinstance(self.loss, Annealed) else self.loss
        labels_P = labels_of(batch)
        teacher = self.teacher.mixture(batch, loss.spec.temperature)

        def of_chunk(logits_CV: Tensor, chunk: slice) -> Tensor:
            with torch.no_grad():
                teacher_CV = teacher(chunk)
            return loss.per_example(logits_CV, teacher_CV, labels_P[chunk])

        return of_chunk


def labels_of(batch: Batch) -> Tensor:
    """Return the target tokens, P, in the order of the positions that predict them; -1 where a student wrote them."""
    tokens_P = next_tokens(batch)
    if not any(batch.own_K):
        return tokens_P
    own_K = torch.tensor(batch.own_K, device=tokens_P.device)
    predicting_BT = predicting(batch)
    own_B1 = own_K.repeat_interleave(len(predicting_BT) // len(own_K))[:, None]
    return tokens_P.masked_fill(own_B1.expand_as(predicting_BT)[predicting_BT], UNLABELED)
