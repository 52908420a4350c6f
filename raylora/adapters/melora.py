"""MELoRA: n mini LoRAs on the diagonal blocks of a layer (arXiv 2402.17263).

    y = W x + (alpha / r) * blockdiag(B_1, ..., B_n) blockdiag(A_1, ..., A_n) x      A_i: r x I/n,  B_i: O/n x r

The change has rank up to n r for the parameters of a LoRA of rank r: n * (r I/n + r O/n) = r (I + O) per layer.
Each mini A starts as U(-1/sqrt(I/n), 1/sqrt(I/n)), the usual LoRA start at its own fan, since it reads I/n
inputs only; each B as zero. The scale is that of one mini LoRA, alpha over its own rank.

Shapes: K members, N tokens, I inputs, O outputs, G minis (n), R rank of one mini, C inputs and D outputs of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from raylora.adapters.base import Site, Tensors, WeightOf
from raylora.adapters.low_rank import check_divides, uniform, written_out
from raylora.errors import BaseError
from raylora.spec import AdapterSpec


class Spec(AdapterSpec):
    """Small LoRAs side by side, each for its own inputs and outputs."""

    kind: Literal["melora"] = "melora"
    rank: int = Field(default=4, ge=1)
    """Rank of one mini LoRA; together they reach ``minis * rank``."""
    minis: int = Field(default=2, ge=1)
    """n, how many mini LoRAs a layer has; it must divide the inputs and outputs of every adapted layer."""
    alpha: float = Field(default=8.0, gt=0)
    """The change is scaled by ``alpha / rank``, with the rank of one mini LoRA."""
    dropout: float = Field(default=0.0, ge=0, lt=1)


FIRST: tuple[dict[str, Any], ...] = ({"rank": 4, "minis": 2}, {"rank": 1, "minis": 2})
"""What a first spec begins with; where the layers cannot have it, the next."""


class MeLora:
    """The MELoRA adapter; a member holds ``<site>.mini_A`` (G x R x I/G) and ``<site>.mini_B`` (G x O/G x R)."""

    two_factors: Literal[True] = True

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.scale = spec.alpha / spec.rank

    def check(self, sites: Sequence[Site]) -> None:
        """Raise BaseError if a layer does not split into the blocks, or a block cannot have the rank."""
        check_divides("minis", self.spec.minis, sites)
        for site in sites:
            most = min(site.in_features, site.out_features) // self.spec.minis
            if self.spec.rank > most:
                raise BaseError(
                    f"adapter.rank: {self.spec.rank} is more than a block of {site.name} "
                    f"({site.out_features // self.spec.minis} x {site.in_features // self.spec.minis}) can have",
                    f"use a rank of at most {most}, or fewer minis",
                )

    def build(self, sites: Sequence[Site], generator: torch.Generator) -> Tensors:
        """Return every mini's A ~ U(-1/sqrt(I/G), 1/sqrt(I/G)) and B = 0."""
        g, r = self.spec.minis, self.spec.rank
        tensors: Tensors = {}
        for site in sites:
            width = site.in_features // g
            tensors[f"{site.name}.mini_A"] = uniform(g * r, width, width, generator).view(g, r, width)
            tensors[f"{site.name}.mini_B"] = torch.zeros(g, site.out_features // g, r)
        return tensors

    def frozen_tensors(self, sites: Sequence[Site], seed: int, weight_of: WeightOf) -> Tensors:
        """Return nothing: all of a member is trained."""
        return {}

    def decay_group(self, name: str) -> str:
        """Return which decay a tensor takes, by its name."""
        return "a" if name.endswith(".mini_A") else "b"

    def materialize(self, stacked: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return per site (A_KGRC, B_KGDR) as they are stored."""
        return {site.name: (stacked[f"{site.name}.mini_A"], stacked[f"{site.name}.mini_B"]) for site in sites}

    def packed_delta(self, x_KNI: Tensor, at_site: tuple[Tensor, Tensor]) -> Tensor:
        """Return each block's own (alpha / r) * x A^T B^T, side by side, per member and in x's type."""
        a_KGRC, b_KGDR = (t.to(x_KNI.dtype) for t in at_site)
        x_KGNC = x_KNI.unflatten(2, (self.spec.minis, -1)).transpose(1, 2)
        h_KGNR = x_KGNC @ a_KGRC.transpose(2, 3) * self.scale
        return (h_KGNR @ b_KGDR.transpose(2, 3)).transpose(1, 2).flatten(2)

    def delta_weight(self, tensors: Mapping[str, Tensor], site: Site) -> Tensor:
        """Return the scaled products on the diagonal of an O x I of zeros."""
        a_GRC, b_GDR = tensors[f"{site.name}.mini_A"].float(), tensors[f"{site.name}.mini_B"].float()
        return self.scale * torch.block_diag(*(b_GDR @ a_GRC))

    def as_lora(self, tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> tuple[AdapterSpec, Tensors]:
        """Return the same change as LoRA, from one member's trained and frozen tensors."""
        pairs = {}
        for site in sites:
            a_GRC, b_GDR = tensors[f"{site.name}.mini_A"], tensors[f"{site.name}.mini_B"]
            pairs[site.name] = (torch.block_diag(*a_GRC), torch.block_diag(*b_GDR))
        return written_out(self.spec, self.scale, pairs)


def build(spec: Spec) -> MeLora:
    """Return the adapter for a spec."""
    return MeLora(spec)
