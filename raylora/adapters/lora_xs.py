"""LoRA-XS: a trainable R x R matrix between frozen singular vectors of the weight (arXiv 2405.17604).

    W ~ U_R S_R V_R^T  (truncated SVD)      B = U_R S_R (O x R),  A = V_R^T (R x I), both frozen
    y = W x + (alpha / R) * B M A x         M: R x R, trained

Parameters: R^2 per layer, whatever its width. The factors come from the frozen base, so they are never saved.
The paper starts M with a small Gaussian; here it starts at zero, as every kind starts from the base exactly.
Members therefore start alike and differ by their heads, data order and dropout.

Shapes: K members, N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from raylora.adapters.base import Site, Tensors, WeightOf
from raylora.adapters.low_rank import check_rank, packed_product, written_out
from raylora.spec import AdapterSpec


class Spec(AdapterSpec):
    """One small square matrix per adapted layer."""

    kind: Literal["lora_xs"] = "lora_xs"
    rank: int = Field(default=8, ge=1)
    """R: the side of the trained matrix; at most a layer's smaller side."""
    alpha: float = Field(default=8.0, gt=0)
    """The change is scaled by ``alpha / rank``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)


FIRST: tuple[dict[str, Any], ...] = ({"rank": 8, "alpha": 8}, {"rank": 2, "alpha": 2})
"""What a first spec begins with; where the layers cannot have it, the next."""


class LoraXs:
    """A member trains ``<site>.xs_M`` (R x R) and needs ``.xs_A`` (R x I) and ``.xs_B`` (O x R)."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.scale = spec.alpha / spec.rank

    def check(self, sites: Sequence[Site]) -> None:
        """Raise BaseError for a rank beyond a layer's smaller side."""
        check_rank("rank", self.spec.rank, sites)

    def build(self, sites: Sequence[Site], generator: torch.Generator) -> Tensors:
        """Return M = 0 for every site."""
        return {f"{site.name}.xs_M": torch.zeros(self.spec.rank, self.spec.rank) for site in sites}

    def frozen_tensors(self, sites: Sequence[Site], seed: int, weight_of: WeightOf) -> Tensors:
        """Return A = V_R^T and B = U_R S_R of every frozen weight, the same for every member."""
        tensors: Tensors = {}
        for site in sites:
            a_RI, b_OR = _factors(weight_of(site.name), self.spec.rank)
            tensors[f"{site.name}.xs_A"], tensors[f"{site.name}.xs_B"] = a_RI, b_OR
        return tensors

    def decay_group(self, name: str) -> str:
        """Return ``b``: M is the factor that starts at zero, as B does elsewhere."""
        return "b"

    def materialize(self, stacked: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return per site (A_KRI, (B M)_KOR)."""
        return {
            site.name: (
                stacked[f"{site.name}.xs_A"], torch.bmm(stacked[f"{site.name}.xs_B"], stacked[f"{site.name}.xs_M"])
            )
            for site in sites
        }

    def packed_delta(self, x_KNI: Tensor, at_site: tuple[Tensor, Tensor]) -> Tensor:
        """Return (alpha / R) * x A^T M^T B^T per member, in x's type."""
        return packed_product(x_KNI, *at_site, self.scale)

    def delta_weight(self, tensors: Mapping[str, Tensor], site: Site) -> Tensor:
        """Return (alpha / R) * B M A, O x I."""
        a_RI, m_RR, b_OR = (tensors[f"{site.name}.xs_{key}"].float() for key in "AMB")
        return self.scale * (b_OR @ m_RR @ a_RI)

    def notes(self, sites: Sequence[Site]) -> list[str]:
        """Return what a person should know before training."""
        return ["members start alike: they differ by their heads, data order and dropout"]

    def as_lora(self, tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> tuple[AdapterSpec, Tensors]:
        """Return the same change as LoRA, from one member's trained and frozen tensors."""
        pairs = {}
        for site in sites:
            a_RI, m_RR, b_OR = (tensors[f"{site.name}.xs_{key}"] for key in "AMB")
            pairs[site.name] = (a_RI, b_OR @ m_RR)
        return written_out(self.spec, self.scale, pairs)


def _factors(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (V_R^T, U_R S_R); each pair of vectors has the sign that makes V's largest entry positive.

    A singular vector is known up to its sign, which libraries choose as they like; a member that is loaded
    on another machine must meet the factors it was trained with.
    """
    u_OS, s_S, v_SI = torch.linalg.svd(weight_OI.float(), full_matrices=False)
    a_RI, b_OR = v_SI[:rank], u_OS[:, :rank] * s_S[:rank]
    sign_R = a_RI.gather(1, a_RI.abs().argmax(dim=1, keepdim=True)).sign()[:, 0]
    return (a_RI * sign_R[:, None]).contiguous(), (b_OR * sign_R).contiguous()


def build(spec: Spec) -> LoraXs:
    """Return the adapter for a spec."""
    return LoraXs(spec)
