"""LoRA: ``y = W x + (alpha / R) B A x`` with A random and B zero (Hu et al., arXiv 2106.09685).

LoRA-FA (Zhang et al., arXiv 2308.03303, section 3) is the same with A left as it was drawn: the change stays in the
space that A spans, ``dL/dB = (alpha / R) (dL/dy) (A x)^T`` needs A x alone, of R numbers, and x is not kept for it.

Shapes: K members, N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from raylora.adapters.base import Site, Tensors, WeightOf
from raylora.errors import BaseError
from raylora.spec import AdapterSpec


class Spec(AdapterSpec):
    """One pair of low-rank matrices per adapted layer."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)
    """R, the rank of the change; at most a layer's smaller side."""
    alpha: float = Field(default=16.0, gt=0)
    """The change is scaled by ``alpha / rank``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    freeze_a: bool = False
    """LoRA-FA (arXiv 2308.03303): A stays as it was drawn, and B alone is trained, for less memory."""

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        if not self.freeze_a:  # runs from before there was the key keep their digest
            content.pop("freeze_a", None)
        return content


FIRST: tuple[dict[str, Any], ...] = ({"rank": 8, "alpha": 16}, {"rank": 2, "alpha": 4})
"""What a first spec begins with; where the layers cannot have it, the next."""


class Lora:
    """The LoRA adapter; a member holds ``<site>.lora_A`` (R x I) and ``<site>.lora_B`` (O x R)."""

    two_factors: Literal[True] = True

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.scale = spec.alpha / spec.rank
        self.keeps_inputs = not spec.freeze_a

    def check(self, sites: Sequence[Site]) -> None:
        """Raise BaseError for a rank beyond a layer's smaller side: more rank than a full matrix has."""
        for site in sites:
            most = min(site.in_features, site.out_features)
            if self.spec.rank > most:
                raise BaseError(
                    f"adapter.rank: {self.spec.rank} is more than {site.name} "
                    f"({site.out_features} x {site.in_features}) can have",
                    f"use a rank of at most {most}",
                )

    def build(self, sites: Sequence[Site], generator: torch.Generator) -> Tensors:
        """Return A ~ U(-1/sqrt I, 1/sqrt I) (Kaiming-uniform with a = sqrt 5) and B = 0 for every site."""
        tensors: Tensors = {}
        for site in sites:
            bound = site.in_features**-0.5
            a_RI = torch.empty(self.spec.rank, site.in_features).uniform_(-bound, bound, generator=generator)
            tensors[f"{site.name}.lora_A"] = a_RI
            tensors[f"{site.name}.lora_B"] = torch.zeros(site.out_features, self.spec.rank)
        return tensors

    def frozen_tensors(self, sites: Sequence[Site], seed: int, weight_of: WeightOf) -> Tensors:
        """Return nothing: all of a member is saved."""
        return {}

    def parted(self, tensors: Mapping[str, Tensor], round: int = 0) -> tuple[Tensors, Tensors]:
        """Return all tensors, or B alone and A apart from it if A is frozen."""
        kept = {n: t for n, t in tensors.items() if self.spec.freeze_a and n.endswith(".lora_A")}
        return {n: t for n, t in tensors.items() if n not in kept}, kept

    def joined(self, trained: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensors:
        """Return both."""
        return {**trained, **kept}

    def decay_group(self, name: str) -> str:
        """Return which decay a tensor takes, by its name."""
        return "a" if name.endswith(".lora_A") else "b"

    def materialize(self, stacked: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return per site (A_KIR, B_KRO) as views; the scale is folded into the smaller product, not here."""
        return {
            site.name: (
                stacked[f"{site.name}.lora_A"].transpose(1, 2),
                stacked[f"{site.name}.lora_B"].transpose(1, 2),
            )
            for site in sites
        }

    def packed_delta(self, x_KNI: Tensor, at_site: tuple[Tensor, Tensor]) -> Tensor:
        """Return (alpha / R) * x A^T B^T per member, in x's type."""
        a_KIR, b_KRO = at_site
        h_KNR = torch.bmm(x_KNI, a_KIR.to(x_KNI.dtype)) * self.scale
        return torch.bmm(h_KNR, b_KRO.to(x_KNI.dtype))

    def delta_weight(self, tensors: Mapping[str, Tensor], site: Site) -> Tensor:
        """Return (alpha / R) * B A, O x I."""
        a_RI, b_OR = tensors[f"{site.name}.lora_A"], tensors[f"{site.name}.lora_B"]
        return self.scale * (b_OR.float() @ a_RI.float())

    def peft_config(self) -> dict[str, Any]:
        """Return what PEFT calls these settings."""
        spec = self.spec
        return {"peft_type": "LORA", "r": spec.rank, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout}


def build(spec: Spec) -> Lora:
    """Return the adapter for a spec."""
    return Lora(spec)
