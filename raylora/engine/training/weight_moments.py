"""Where a member's weights went in the last part of its training: their mean and variance (SWAG-diagonal).

Maddox et al., arXiv 1902.02476, section 3.2. A member is neither trained otherwise nor slower for it: after some of its
steps its weights are counted in, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raylora.adapters.base import Tensors
from raylora.data.order import derive_seed
from raylora.spec.baselines import SwagSpec

_TIMES = 20
"""How often weights are counted in where the spec does not say how often."""
MEAN, DEVIATION = "swag_mean", "swag_deviation"
"""The sections of a checkpoint that hold them."""


def collection_steps(spec: SwagSpec, total: int) -> list[int]:
    """Return the steps, from 1, after which weights are counted in; the last step is one of them."""
    span = max(1, round(spec.last * total))
    every = spec.every_steps or max(1, span // _TIMES)
    return list(range(total, total - span, -every))[::-1]


@dataclass
class WeightMoments:
    """The running mean of weight vectors and the sum of their squared deviations from it, by tensor name, in float64.

    Welford's recurrence: squares of weights are never summed, whose difference would lose what little weights move.
    """

    count: int = 0
    mean: Tensors = field(default_factory=dict)
    deviation: Tensors = field(default_factory=dict)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Count one more weight vector in."""
        self.count += 1
        for name, tensor in tensors.items():
            weight = tensor.detach().to("cpu", torch.float64, copy=True)
            if self.count == 1:
                self.mean[name], self.deviation[name] = weight, torch.zeros_like(weight)
                continue
            apart = weight - self.mean[name]
            self.mean[name] += apart / self.count
            self.deviation[name] += apart * (weight - self.mean[name])

    @property
    def tells(self) -> bool:
        """Whether there is a variance: one weight vector has none."""
        return self.count > 1

    def variance(self, name: str) -> Tensor:
        """Return ``mean(w^2) - mean(w)^2`` of a tensor's entries, float64 (arXiv 1902.02476, section 3.2)."""
        return self.deviation[name] / self.count

    def sample(self, seed: int, variance_scale: float) -> Tensors:
        """Return float32 tensors drawn from ``N(mean, variance_scale * variance)``; a tensor's draw is its name's."""
        drawn: Tensors = {}
        for name, mean in self.mean.items():
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
            drawn[name] = (mean + (variance_scale * self.variance(name)).sqrt() * noise).float()
        return drawn

    def sections(self) -> dict[str, Tensors]:
        """Return what a checkpoint holds of them, beside their count."""
        return {MEAN: self.mean, DEVIATION: self.deviation} if self.count else {}

    @classmethod
    def restored(cls, sections: Mapping[str, Tensors], count: int) -> WeightMoments:
        """Return them as a checkpoint held them."""
        return cls(count, dict(sections.get(MEAN, {})), dict(sections.get(DEVIATION, {})))
