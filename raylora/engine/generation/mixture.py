"""What an ensemble of language models draws its next token from, and how sure its members are of it.

Shapes: M members, N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.data.order import derive_seed
from raylora.ensemble.aggregate import log_mean_exp, mean


@dataclass(frozen=True)
class Mixture:
    """The members' next-token distributions as one, over the whole vocabulary."""

    logp_NV: Tensor
    """float32"""
    entropy_N: Tensor
    """Of the mixture, in nats."""
    mutual_information_N: Tensor
    """How much of the entropy is the members' disagreement: H(mean of p_m) - mean of H(p_m)."""


def mix(logits_MNV: Tensor, rule: str = "mean_probabilities", weights_M: Tensor | None = None) -> Mixture:
    """Return the mixture of the members' distributions: of their probabilities, or by the mean of their logits.

    Means are plain, or by the members' weights.

    By either rule the mutual information is that of the mean of probabilities, for which it is defined.
    """
    logp_MNV = torch.log_softmax(logits_MNV.float(), dim=-1)
    mean_NV = log_mean_exp(logp_MNV, weights_M)
    entropy_N, of_members_N = _entropy(mean_NV), mean(_entropy(logp_MNV), weights_M)
    if rule == "mean_probabilities":
        return Mixture(mean_NV, entropy_N, (entropy_N - of_members_N).clamp(min=0))
    drawn_NV = torch.log_softmax(mean(logits_MNV.float(), weights_M), dim=-1)
    return Mixture(drawn_NV, _entropy(drawn_NV), (entropy_N - of_members_N).clamp(min=0))


def draw(logp_NV: Tensor, temperature: float, top_p: float, uniform_N: Tensor) -> Tensor:
    """Return a token per row, N: the most probable one at temperature 0, else one drawn by a number of [0, 1).

    Temperature and nucleus (Holtzman et al., arXiv 1904.09751) are the mixture's, not the members'. A nucleus is the
    fewest most probable tokens that have ``top_p`` together.
    """
    if temperature == 0:
        return logp_NV.argmax(dim=-1)
    p_NV = torch.softmax(logp_NV.double() / temperature, dim=-1)
    sorted_NV, token_NV = p_NV.sort(dim=-1, descending=True, stable=True)
    up_to_NV = sorted_NV.cumsum(dim=-1)
    kept_NV = sorted_NV.masked_fill(up_to_NV - sorted_NV >= top_p, 0.0)
    cumulative_NV = kept_NV.cumsum(dim=-1)
    target_N1 = uniform_N.to(p_NV.device, torch.float64)[:, None] * cumulative_NV[:, -1:]
    place_N1 = torch.searchsorted(cumulative_NV, target_N1, right=True)
    last_N1 = (kept_NV > 0).sum(dim=-1, keepdim=True) - 1
    return token_NV.gather(1, torch.minimum(place_N1, last_N1))[:, 0]


def uniforms(seed: int, rows: Sequence[str], position: int) -> Tensor:
    """Return a number of [0, 1) per row, N, that depends on the seed, the row and the position and nothing else."""
    drawn = [derive_seed("token", seed, row, position) / 2**63 for row in rows]
    return torch.tensor(drawn, dtype=torch.float64).clamp(max=1 - 2**-53)


def _entropy(logp_V: Tensor) -> Tensor:
    """Return the entropy over the last axis, in nats; a token that cannot come adds 0, and not 0 times infinity."""
    return torch.special.entr(logp_V.exp()).sum(dim=-1)
