"""PRoLoRA: chunks of A and B that share one chunk by rotation, beside a few ranks of their own (arXiv 2402.16902).

A layer has rank R, of which u ranks are unshared (plain LoRA) and R - u are shared. The shared part of A is
split along the inputs into m chunks; chunk i is the one stored chunk A_0, (R - u) x I/m, rolled along the rank:

    A = [A_0, roll(A_0, s), roll(A_0, 2 s), ..., roll(A_0, (m - 1) s)]      (R - u) x I
    B = [B_0; roll(B_0, s'); ...; roll(B_0, (m - 1) s')]                     O x (R - u), chunks along the outputs
    y = W x + (alpha / R) * ([B, B_u] [A; A_u]) x

Parameters: (R - u)(I + O)/m + u (I + O) per layer. A_0 starts as U(-1/sqrt I, 1/sqrt I) with the full fan I
("rectified": the default fan I/m would make it sqrt(m) too large), B as zero.

Built from the paper's description, not from its code. Both strides default to floor((R - u)/m), so that no two
chunks of a matrix are the same; with s = s' the block of B A at (j, i) depends on i - j alone, so unequal
strides give more distinct blocks.

Shapes: K members, N tokens, I inputs, O outputs, R rank, S shared ranks, U unshared ranks, C width of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from raylora.adapters.base import Site, Tensors, WeightOf
from raylora.adapters.low_rank import check_divides, check_rank, packed_product, uniform, written_out
from raylora.spec import AdapterSpec


class Spec(AdapterSpec):
    """A rank of which a part is shared within each layer by rotation."""

    kind: Literal["prolora"] = "prolora"
    rank: int = Field(default=8, ge=2)
    """R, the rank of the change, shared and unshared ranks together."""
    unshared_rank: int = Field(default=1, ge=0)
    """Ranks that are not shared, as in LoRA."""
    reduction: int = Field(default=4, ge=1)
    """m, the number of chunks that share one; 1 is LoRA."""
    stride_a: int | None = Field(default=None, ge=1)
    """By how many ranks each next chunk of A is rolled; by default floor(shared ranks / reduction)."""
    stride_b: int | None = Field(default=None, ge=1)
    """By how many ranks each next chunk of B is rolled; by default floor(shared ranks / reduction)."""
    alpha: float = Field(default=16.0, gt=0)
    """The change is scaled by ``alpha / rank``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _chunks_differ(self) -> Spec:
        shared = self.rank - self.unshared_rank
        if shared < 1:
            raise ValueError(f"unshared_rank {self.unshared_rank} leaves nothing of rank {self.rank} to share: "
                             f"use at most {self.rank - 1}, or kind: lora")
        if self.reduction > shared:
            raise ValueError(f"reduction {self.reduction} rolls {shared} shared ranks more often than they differ: "
                             f"use a reduction of at most {shared}, or a rank of at least "
                             f"{self.reduction + self.unshared_rank}")
        return self


FIRST: tuple[dict[str, Any], ...] = ({"rank": 8, "reduction": 4}, {"rank": 8, "reduction": 2})
"""What a first spec begins with; where the layers cannot have it, the next."""


class ProLora:
    """Holds ``.shared_A`` (S x I/m), ``.shared_B`` (O/m x S), ``.unshared_A`` (U x I), ``.unshared_B`` (O x U)."""

    two_factors: Literal[True] = True

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.scale = spec.alpha / spec.rank
        self.shared = spec.rank - spec.unshared_rank
        natural = self.shared // spec.reduction
        self.stride_a, self.stride_b = spec.stride_a or natural, spec.stride_b or natural

    def check(self, sites: Sequence[Site]) -> None:
        """Raise BaseError if a layer does not split into the chunks or cannot have the rank."""
        check_rank("rank", self.spec.rank, sites)
        check_divides("reduction", self.spec.reduction, sites)

    def build(self, sites: Sequence[Site], generator: torch.Generator) -> Tensors:
        """Return A ~ U(-1/sqrt I, 1/sqrt I), shared and unshared, and B = 0 for every site."""
        m, u = self.spec.reduction, self.spec.unshared_rank
        tensors: Tensors = {}
        for site in sites:
            fan = site.in_features
            tensors[f"{site.name}.shared_A"] = uniform(self.shared, fan, fan // m, generator)
            tensors[f"{site.name}.shared_B"] = torch.zeros(site.out_features // m, self.shared)
            if u:
                tensors[f"{site.name}.unshared_A"] = uniform(u, fan, fan, generator)
                tensors[f"{site.name}.unshared_B"] = torch.zeros(site.out_features, u)
        return tensors

    def frozen_tensors(self, sites: Sequence[Site], seed: int, weight_of: WeightOf) -> Tensors:
        """Return nothing: all of a member is trained."""
        return {}

    def decay_group(self, name: str) -> str:
        """Return which decay a tensor takes, by its name."""
        return "a" if name.endswith("_A") else "b"

    def materialize(self, stacked: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return per site (A_KRI, B_KOR), rolled out of the shared chunks."""
        return {site.name: self._expand(stacked, site) for site in sites}

    def packed_delta(self, x_KNI: Tensor, at_site: tuple[Tensor, Tensor]) -> Tensor:
        """Return (alpha / R) * x A^T B^T per member, in x's type."""
        return packed_product(x_KNI, *at_site, self.scale)

    def delta_weight(self, tensors: Mapping[str, Tensor], site: Site) -> Tensor:
        """Return (alpha / R) * B A, O x I."""
        a_KRI, b_KOR = self._expand({name: t.float()[None] for name, t in tensors.items()}, site)
        return self.scale * (b_KOR[0] @ a_KRI[0])

    def as_lora(self, tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> tuple[AdapterSpec, Tensors]:
        """Return the same change as LoRA, from one member's trained and frozen tensors."""
        one = {name: t[None] for name, t in tensors.items()}
        pairs = {site.name: self._expand(one, site) for site in sites}
        return written_out(self.spec, self.scale, {name: (a[0], b[0]) for name, (a, b) in pairs.items()})

    def _expand(self, stacked: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor]:
        a_KSC, b_KCS = stacked[f"{site.name}.shared_A"], stacked[f"{site.name}.shared_B"]
        chunks = range(self.spec.reduction)
        a_KRI = torch.cat([a_KSC.roll(i * self.stride_a, dims=1) for i in chunks], dim=2)
        b_KOR = torch.cat([b_KCS.roll(j * self.stride_b, dims=2) for j in chunks], dim=1)
        if self.spec.unshared_rank:
            a_KRI = torch.cat([a_KRI, stacked[f"{site.name}.unshared_A"]], dim=1)
            b_KOR = torch.cat([b_KOR, stacked[f"{site.name}.unshared_B"]], dim=2)
        return a_KRI, b_KOR


def build(spec: Spec) -> ProLora:
    """Return the adapter for a spec."""
    return ProLora(spec)
