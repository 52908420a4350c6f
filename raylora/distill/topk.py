"""A language model's predictions cut to the k most probable tokens and one bucket for the tail.

Shapes: P token positions, K kept tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.distill.loss_functions import at_least_float32

FLOOR = -65504.0
"""What stands for log 0: float16's lowest number, whose exponential is exactly zero in every float type."""


@dataclass(frozen=True, eq=False)
class TopK:
    """For every position the K most probable tokens in falling order, and what the other V - K have together."""

    index_PK: Tensor
    """int64"""
    logp_PK: Tensor
    tail_P: Tensor
    """Log-probability of all other tokens together; ``FLOOR`` where there are none."""
    vocabulary: int
    temperature: float = 1.0
    """Of the members' softmax; it cannot be changed without the whole vocabulary."""

    def __len__(self) -> int:
        """Return P."""
        return len(self.index_PK)

    def __getitem__(self, chunk: slice) -> TopK:
        """Return some of the positions."""
        index_PK, logp_PK, tail_P = (t[chunk] for t in (self.index_PK, self.logp_PK, self.tail_P))
        return TopK(index_PK, logp_PK, tail_P, self.vocabulary, self.temperature)

    @property
    def k(self) -> int:
        """Return K."""
        return self.index_PK.shape[1]

    def to(self, device: torch.device | str) -> TopK:
        """Return the same on a device."""
        index_PK, logp_PK, tail_P = (t.to(device) for t in (self.index_PK, self.logp_PK, self.tail_P))
        return TopK(index_PK, logp_PK, tail_P, self.vocabulary, self.temperature)


def top_k(logp_PV: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """Return the min(k, V) most probable tokens of log-probabilities that were softened by ``temperature``."""
    best = torch.topk(logp_PV, min(k, logp_PV.shape[-1]), dim=-1)
    tail_P = log_mass_of_the_rest(logp_PV, best.indices)
    return TopK(best.indices, best.values.clamp(min=FLOOR), tail_P, logp_PV.shape[-1], temperature)


def log_mass_of_the_rest(logits_PV: Tensor, index_PK: Tensor) -> Tensor:
    """Return the logsumexp over all tokens but the K given ones, P; ``FLOOR`` for K = V.

    Summed and not taken as ``log(1 - sum_k p_k)``, which has no digits left where the tail is small.
    """
    if index_PK.shape[-1] == logits_PV.shape[-1]:
        return logits_PV.new_full(logits_PV.shape[:-1], FLOOR)
    return torch.logsumexp(logits_PV.scatter(-1, index_PK, -math.inf), dim=-1).clamp(min=FLOOR)


def teacher_logp(targets: TopK) -> Tensor:
    """Return the teacher's log-probabilities over K tokens and the tail, P x (K + 1), normalized again after float16.

    Without that the KL of equal distributions would be off zero by the rounding of the largest probability.
    """
    coarse_PL = torch.cat([at_least_float32(targets.logp_PK), at_least_float32(targets.tail_P)[:, None]], dim=1)
    return torch.log_softmax(coarse_PL, dim=-1)
