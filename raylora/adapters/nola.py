"""NOLA: A and B are combinations of frozen random matrices, and only the coefficients are trained (arXiv 2310.02556).

    A = sum_i a_i A_i  (R x I)      B = sum_i b_i B_i  (O x R)      y = W x + (alpha / R) * B A x

Parameters: 2 n per layer for n bases each, whatever its width and rank. The bases come from the member's seed
and are never saved, so a member is a few kilobytes; while it is in use they take 4 n R (I + O) bytes per layer
and member, which is what n and the rank are limited by.

Which distribution is ours to say: A_i ~ U(-1/sqrt I, 1/sqrt I) and a_i ~ N(0, 1/n), so that A starts with the
variance of LoRA's; B_i ~ U(-1/sqrt R, 1/sqrt R) and b_i = 0, so that a fresh member changes nothing.

Shapes: K members, N tokens, I inputs, O outputs, R rank, P bases (n).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from raylora.adapters.base import Site, Tensors, WeightOf
from raylora.adapters.low_rank import check_rank, packed_product, uniform, written_out
from raylora.spec import AdapterSpec


class Spec(AdapterSpec):
    """Coefficients of seeded random matrices."""

    kind: Literal["nola"] = "nola"
    rank: int = Field(default=8, ge=1)
    """R, the rank of the change; at most a layer's smaller side."""
    bases: int = Field(default=64, ge=1)
    """n, the random matrices that A and B are each made of."""
    alpha: float = Field(default=16.0, gt=0)
    """The change is scaled by ``alpha / rank``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)


FIRST: tuple[dict[str, Any], ...] = ({"rank": 8, "alpha": 16}, {"rank": 2, "alpha": 4})
"""What a first spec begins with; where the layers cannot have it, the next."""


class Nola:
    """A member trains ``<site>.nola_a`` and ``.nola_b`` (P); ``.bases_A`` (P x R x I), ``.bases_B`` (P x O x R)."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.scale = spec.alpha / spec.rank

    def check(self, sites: Sequence[Site]) -> None:
        """Raise BaseError for a rank beyond a layer's smaller side."""
        check_rank("rank", self.spec.rank, sites)

    def build(self, sites: Sequence[Site], generator: torch.Generator) -> Tensors:
        """Return a ~ N(0, 1/n) and b = 0 for every site."""
        tensors: Tensors = {}
        for site in sites:
            tensors[f"{site.name}.nola_a"] = torch.empty(self.spec.bases).normal_(
                0.0, self.spec.bases**-0.5, generator=generator
            )
            tensors[f"{site.name}.nola_b"] = torch.zeros(self.spec.bases)
        return tensors

    def frozen_tensors(self, sites: Sequence[Site], seed: int, weight_of: WeightOf) -> Tensors:
        """Return the member's own random bases, drawn from its seed site after site."""
        generator = torch.Generator().manual_seed(seed)
        p, r = self.spec.bases, self.spec.rank
        tensors: Tensors = {}
        for site in sites:
            i, o = site.in_features, site.out_features
            tensors[f"{site.name}.bases_A"] = uniform(p * r, i, i, generator).view(p, r, i)
            tensors[f"{site.name}.bases_B"] = uniform(p * o, r, r, generator).view(p, o, r)
        return tensors

    def decay_group(self, name: str) -> str:
        """Return which decay a tensor takes, by its name."""
        return "a" if name.endswith(".nola_a") else "b"

    def materialize(self, stacked: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return per site (A_KRI, B_KOR)."""
        return {site.name: _combine(stacked, site) for site in sites}

    def packed_delta(self, x_KNI: Tensor, at_site: tuple[Tensor, Tensor]) -> Tensor:
        """Return (alpha / R) * x A^T B^T per member, in x's type."""
        return packed_product(x_KNI, *at_site, self.scale)

    def delta_weight(self, tensors: Mapping[str, Tensor], site: Site) -> Tensor:
        """Return (alpha / R) * B A, O x I."""
        a_KRI, b_KOR = _combine({name: t.float()[None] for name, t in tensors.items()}, site)
        return self.scale * (b_KOR[0] @ a_KRI[0])

    def notes(self, sites: Sequence[Site]) -> list[str]:
        """Return what a person should know before training."""
        numbers = sum(self.spec.bases * self.spec.rank * (site.in_features + site.out_features) for site in sites)
        return [f"the random bases of one member take {4 * numbers / 1e6:.0f} MB while it is in use"]

    def as_lora(self, tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> tuple[AdapterSpec, Tensors]:
        """Return the same change as LoRA, from one member's trained and frozen tensors."""
        one = {name: t[None] for name, t in tensors.items()}
        pairs = {site.name: _combine(one, site) for site in sites}
        return written_out(self.spec, self.scale, {name: (a[0], b[0]) for name, (a, b) in pairs.items()})


def _combine(stacked: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor]:
    a_KRI = torch.einsum("kp,kpri->kri", stacked[f"{site.name}.nola_a"], stacked[f"{site.name}.bases_A"])
    b_KOR = torch.einsum("kp,kpor->kor", stacked[f"{site.name}.nola_b"], stacked[f"{site.name}.bases_B"])
    return a_KRI, b_KOR


def build(spec: Spec) -> Nola:
    """Return the adapter for a spec."""
    return Nola(spec)
