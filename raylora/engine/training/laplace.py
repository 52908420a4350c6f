"""A Gaussian over a member's LoRA matrices, from the curvature of its loss, and what it makes of a row's logits.

Yang et al., arXiv 2308.13111: the posterior is ``N(theta, (F + delta I)^-1)`` with F the curvature at the trained
matrices theta and delta the precision of a Gaussian prior around zero. The model is linearized around theta, so that
a row's logits are Gaussian, with mean f(x) and covariance ``J (F + delta I)^-1 J^T``. To draw matrices instead and run
the model with them is known to predict badly (Immer et al., arXiv 2008.08400).

Shapes: N rows, C classes, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.data.order import derive_seed
from raylora.engine.training.curvature import Curvature
from raylora.errors import TrainingError

_TOLERANCE = 1e-10
"""Of the logarithm of the prior's precision."""
_LOWEST, _HIGHEST = -40.0, 60.0


def best_precision(curvature: Curvature, squared_norm: float) -> float:
    """Return the delta with the greatest marginal likelihood of the training rows.

    ``log p(D) = const - 1/2 (delta |theta|^2 + sum_i log(lambda_i + delta) - P log delta)`` is
    greatest where ``delta |theta|^2 = sum_i lambda_i / (lambda_i + delta)`` (MacKay, 1992). The left side rises with
    delta and the right one falls, so there is one such delta; it is found to 1e-10 of its logarithm.

    Raises:
        TrainingError: no row says anything of the matrices, or all of them are zero.
    """
    from scipy.optimize import brentq  # slow to import, which a run without this need not wait for

    eigenvalues = torch.cat([values.flatten() for values in curvature.eigenvalues.values()])
    if not squared_norm > 0 or not bool((eigenvalues > 0).any()) or not bool(torch.isfinite(eigenvalues).all()):
        raise TrainingError("baselines.laplace: the training rows say nothing of member 0's matrices", "leave it out")

    def excess(log_delta: float) -> float:
        delta = math.exp(log_delta)
        return delta * squared_norm - float((eigenvalues / (eigenvalues + delta)).sum())

    return math.exp(brentq(excess, _LOWEST, _HIGHEST, xtol=_TOLERANCE))


@dataclass(frozen=True)
class Posterior:
    """A Gaussian over a member's LoRA matrices."""

    curvature: Curvature
    precision: float
    """Of the prior: delta."""

    @property
    def determined(self) -> float:
        """How many numbers the rows determine, ``sum_i lambda_i / (lambda_i + delta)``."""
        return sum(float((one / (one + self.precision)).sum()) for one in self.curvature.eigenvalues.values())

    def covariance(self, jacobians: Mapping[str, Tensor]) -> Tensor:
        """Return ``J (F + delta I)^-1 J^T`` of each row's logits, N x C x C in float64, from Jacobians by matrix."""
        parts = []
        for name, jacobian in jacobians.items():
            rotated_NCP = self.curvature.rotated(name, jacobian).flatten(2)
            variance_P = 1 / (self.curvature.eigenvalues[name] + self.precision).flatten()
            parts.append((rotated_NCP * variance_P) @ rotated_NCP.transpose(1, 2))
        total_NCC = torch.stack(parts).sum(dim=0)
        return (total_NCC + total_NCC.transpose(1, 2)) / 2


def draw_logits(mean_NC: Tensor, covariance_NCC: Tensor, ids: Sequence[str], seed: int, samples: int) -> Tensor:
    """Return S draws of each row's logits, S x N x C in float32; a row's draws depend on its id and the seed alone.

    They come in pairs that lie opposite each other, so that their mean is the model's own: of two classes the likelier
    one stays the likelier, however few the draws are.
    """
    values_NC, vectors_NCC = torch.linalg.eigh(covariance_NCC)
    root_NCC = vectors_NCC * values_NC.clamp(min=0).sqrt()[:, None]
    noise_NSC = torch.stack([
        torch.randn(-(-samples // 2), mean_NC.shape[1], dtype=torch.float64,
                    generator=torch.Generator().manual_seed(derive_seed(seed, row_id)))
        for row_id in ids
    ])
    noise_NSC = torch.cat([noise_NSC, -noise_NSC], dim=1)[:, :samples]
    return (mean_NC[:, None] + noise_NSC @ root_NCC.transpose(1, 2)).transpose(0, 1).float().contiguous()
