"""What is computed of a language model's logits, position by position, and how it comes back to tokens and examples.

The logits at a position say something of the token that follows, so a mask of target tokens, moved one to the left,
is the mask of the positions that are asked. Nothing else is computed of a position than its own logits tell; that is
why the output layer may be passed in chunks of positions (:mod:`raylora.engine.model.token_head`).

Shapes: B rows, T tokens, P positions that predict a target token, C of them in a chunk, V vocabulary, N examples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from raylora.data.task import Batch
from raylora.distill.loss_functions import at_least_float32
from raylora.spec.members import KLSpec

PositionLoss = Callable[[Tensor, slice], Tensor]
"""(logits_CV of some positions, which of all P they are) -> loss_C in float32."""
TokenLoss = Callable[[Batch], PositionLoss]


def predicting(batch: Batch) -> Tensor:
    """Return, B x (T - 1), which positions' logits predict a target token: the mask, one to the left."""
    assert batch.target_mask_BT is not None
    return batch.target_mask_BT[:, 1:]


def next_tokens(batch: Batch) -> Tensor:
    """Return the target tokens, P, in the order of the positions that predict them."""
    return batch.input_ids_BT[:, 1:][predicting(batch)]


def at_tokens(values_P: Tensor, batch: Batch) -> Tensor:
    """Return values_BT, each at the token that its position predicts, and 0 elsewhere."""
    mask_BT = F.pad(predicting(batch), (1, 0))
    return values_P.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_P)


def negative_log_likelihood(batch: Batch) -> PositionLoss:
    """Return the loss of a language model: minus the log-probability of the next token."""
    tokens_P = next_tokens(batch)
    return lambda logits_CV, chunk: F.cross_entropy(at_least_float32(logits_CV), tokens_P[chunk], reduction="none")


def with_divergence(loss: PositionLoss, reference: Callable[[slice], Tensor], kl: KLSpec) -> PositionLoss:
    """Return a loss plus ``beta * KL`` to a reference, whose logits at some positions are made when they are needed."""
    def both(logits_CV: Tensor, chunk: slice) -> Tensor:
        with torch.no_grad():
            reference_CV = reference(chunk)
        divergence_C = divergence(at_least_float32(logits_CV), at_least_float32(reference_CV), kl)
        return loss(logits_CV, chunk) + kl.beta * divergence_C

    return both


def divergence(scores: Tensor, reference: Tensor, kl: KLSpec) -> Tensor:
    """Return ``KL(softmax(scores) || softmax(reference))`` over the last dimension, or its reverse."""
    logp, logq = F.log_softmax(scores, dim=-1), F.log_softmax(reference, dim=-1)
    if kl.direction == "reverse":
        logp, logq = logq, logp
    return (logp.exp() * (logp - logq)).sum(dim=-1)
