"""What kinds that end in one pair of low-rank matrices have in common: the product, and what does not fit.

Shapes: K members, N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raylora.adapters.base import Site, Tensors
from raylora.adapters.lora import Spec as LoraSpec
from raylora.errors import BaseError
from raylora.spec import AdapterSpec


def packed_product(x_KNI: Tensor, a_KRI: Tensor, b_KOR: Tensor, scale: float) -> Tensor:
    """Return scale * x A^T B^T per member (K x N x O), in x's type; the scale meets the smaller product."""
    h_KNR = torch.bmm(x_KNI, a_KRI.transpose(1, 2).to(x_KNI.dtype)) * scale
    return torch.bmm(h_KNR, b_KOR.transpose(1, 2).to(x_KNI.dtype))


def written_out(
    spec: AdapterSpec, scale: float, pairs_RI_OR: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[AdapterSpec, Tensors]:
    """Return a LoRA spec and tensors whose change is scale * B A at every site; all pairs have one rank."""
    rank = len(next(iter(pairs_RI_OR.values()))[0])
    lora = LoraSpec(
        rank=rank, alpha=scale * rank, dropout=spec.dropout, target_modules=spec.target_modules, layers=spec.layers
    )
    tensors: Tensors = {}
    for name, (a_RI, b_OR) in pairs_RI_OR.items():
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = a_RI.contiguous(), b_OR.contiguous()
    return lora, tensors


def uniform(rows: int, fan: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return rows x columns of U(-1/sqrt fan, 1/sqrt fan): Kaiming-uniform with a = sqrt 5."""
    bound = fan**-0.5
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


def check_rank(key: str, rank: int, sites: Sequence[Site]) -> None:
    """Raise BaseError for a rank beyond a layer's smaller side: more rank than a full matrix has."""
    for site in sites:
        most = min(site.in_features, site.out_features)
        if rank > most:
            raise BaseError(
                f"adapter.{key}: {rank} is more than {site.name} ({site.out_features} x {site.in_features}) can have",
                f"use at most {most}",
            )


def check_divides(key: str, parts: int, sites: Sequence[Site]) -> None:
    """Raise BaseError, naming the nearest values that work, if a layer's sides do not split into equal parts."""
    sides = {side for site in sites for side in (site.in_features, site.out_features)}
    for site in sites:
        if site.in_features % parts or site.out_features % parts:
            works = [n for n in range(1, min(sides) + 1) if all(side % n == 0 for side in sides)]
            near = [max(n for n in works if n < parts), *sorted(n for n in works if n > parts)[:1]]
            raise BaseError(
                f"adapter.{key}: {site.name} ({site.out_features} x {site.in_features}) "
                f"does not split into {parts} equal parts",
                f"the nearest values that divide every adapted layer: {' and '.join(map(str, near))}",
            )
