"""ApiQ: a grid's clipping and a low-rank pair, found together by gradient on calibration inputs (arXiv 2402.05147).

With X what a layer reads in the full model and X' what it reads behind quantized layers, the paper (section 4)
minimizes

    ``|| X W^T - X' (Q(W; g, b) + B A)^T ||_F^2``     over A, B and the clipping g, b of every group, by Adam.

The grid of a group spans ``[sigmoid(b) min W, sigmoid(g) max W]``; rounding passes gradients straight through. The loss
and its gradient, ``2 (M H - W C^T)`` at M = Q + B A, need H = X'^T X' and C = X'^T X alone, so every step sees all of
the calibration text, where the paper takes a sample at a time. Layers of one block are solved at once, from what the
quantized blocks before it make.

Shapes: O outputs, I inputs, R rank, G groups per row, S inputs in a group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from raylora.errors import BaseError
from raylora.init.factors import check_rank
from raylora.spec import CompensationSpec

_OPEN = 4.0
"""What clipping begins with: sigmoid(4) = 0.98 of the range."""


class Spec(CompensationSpec):
    """A pair and the grid's clipping, found together by gradient; with quantization rtn, whose grid it takes."""

    rounds_itself: ClassVar[bool] = True
    reads_full_model: ClassVar[bool] = True

    kind: Literal["apiq"] = "apiq"
    steps: int = Field(default=300, ge=1)
    """Steps of Adam for each layer, each on all of the calibration text."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of the pair."""
    clip_lr: float = Field(default=5e-3, gt=0)
    """Learning rate of the clipping."""


@dataclass(frozen=True)
class Grid:
    """What a weight is rounded to: codes, a float16 scale and a zero point for every group, as they are stored."""

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor


class ClippedGrid:
    """The grid of a weight as a function of its clipping, differentiable but for rounding, which is passed through."""

    def __init__(self, weight_OI: Tensor, bits: int, group_size: int) -> None:
        """Look at the weight once."""
        self.inputs, self.most = weight_OI.shape[1], 2**bits - 1
        groups = -(-self.inputs // group_size)
        self.weight_OGS = F.pad(weight_OI, (0, groups * group_size - self.inputs)).unflatten(1, (groups, group_size))
        self.low_OG, self.high_OG = self.weight_OGS.amin(2).clamp(max=0), self.weight_OGS.amax(2).clamp(min=0)

    def open(self) -> tuple[Tensor, Tensor]:
        """Return clipping parameters (g_OG, b_OG) of a grid that spans nearly everything."""
        return torch.full_like(self.high_OG, _OPEN), torch.full_like(self.low_OG, _OPEN)

    def rounded(self, g_OG: Tensor, b_OG: Tensor) -> tuple[Tensor, Grid]:
        """Return (Q_OI with gradients, the grid that it is stored as)."""
        low_OG, high_OG = torch.sigmoid(b_OG) * self.low_OG, torch.sigmoid(g_OG) * self.high_OG
        scale_OG = ((high_OG - low_OG) / self.most).clamp(min=2**-24)
        scale_OG = scale_OG + (scale_OG.half().to(scale_OG.dtype) - scale_OG).detach()
        zero_OG = _straight(-low_OG / scale_OG).clamp(0, self.most)
        code_OGS = (_straight(self.weight_OGS / scale_OG[..., None]) + zero_OG[..., None]).clamp(0, self.most)
        q_OI = ((code_OGS - zero_OG[..., None]) * scale_OG[..., None]).flatten(1)[:, : self.inputs]
        codes_OI = code_OGS.detach().flatten(1)[:, : self.inputs]
        return q_OI, Grid(
            codes_OI.to(torch.uint8), scale_OG.detach().half(), zero_OG.detach().to(torch.uint8)
        )


def apiq(
    weight_OI: Tensor, gram_II: Tensor, cross_II: Tensor, bits: int, group_size: int, rank: int, steps: int = 300,
    lr: float = 1e-3, clip_lr: float = 5e-3, seed: int = 0, name: str = "layer",
) -> tuple[Grid, Tensor, Tensor]:
    """Return (grid, A_RI, B_OR) in float32 with the least loss that was met on the way.

    Args:
        gram_II: H = X'^T X' of the inputs behind quantized layers.
        cross_II: C = X'^T X, with those of the full model; H again where they are the same.
        seed: of A's start, U(-1/sqrt I, 1/sqrt I); B starts at zero.

    Raises:
        BaseError: a rank beyond the smaller side, or entries that are not finite.
    """
    check_rank(rank, weight_OI.shape[0], weight_OI.shape[1], name)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (weight_OI, gram_II, cross_II)):
        raise BaseError(f"{name}: its weights or calibration inputs have NaN or infinite entries")
    weight_OI = weight_OI.detach().float()
    scale = float(gram_II.diagonal().mean()) or 1.0  # Adam's step does not know it; its epsilon does
    h_II = (gram_II / scale).float()
    target_OI = (weight_OI.double() @ (cross_II / scale).double().T).float()
    bound = weight_OI.shape[1] ** -0.5
    drawn_RI = torch.empty(rank, weight_OI.shape[1]).uniform_(
        -bound, bound, generator=torch.Generator().manual_seed(seed)
    )
    a_RI = drawn_RI.to(weight_OI.device).requires_grad_()
    b_OR = torch.zeros(len(weight_OI), rank, device=weight_OI.device, requires_grad=True)
    clipped = ClippedGrid(weight_OI, bits, group_size)
    clips = [tensor.requires_grad_() for tensor in clipped.open()]
    optimizer = torch.optim.Adam([{"params": [a_RI, b_OR], "lr": lr}, {"params": clips, "lr": clip_lr}])
    best: tuple[float, Grid, Tensor, Tensor] | None = None
    for step in range(steps + 1):
        q_OI, grid = clipped.rounded(*clips)
        change_OI = q_OI + b_OR @ a_RI
        with torch.no_grad():
            half_gradient_OI = change_OI @ h_II - target_OI
            loss = float(((half_gradient_OI - target_OI).double() * change_OI.double()).sum())
        if best is None or loss < best[0]:
            best = loss, grid, a_RI.detach().clone(), b_OR.detach().clone()
        if step < steps:
            optimizer.zero_grad()
            change_OI.backward(2 * half_gradient_OI)
            optimizer.step()
    assert best is not None
    return best[1:]


class ApiQ:
    """Rounds and compensates together."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def solve(
        self, weight_OI: Tensor, quantize: Callable[[Tensor], Any], gram_II: Tensor, name: str,
        cross_II: Tensor | None = None,
    ) -> tuple[Any, Tensor, Tensor]:
        """Return (Q, A_RI, B_OR); of what ``quantize`` makes only bits and groups are taken."""
        spec, plain = self.spec, quantize(weight_OI)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        grid, a_RI, b_OR = apiq(
            weight_OI, gram_II, gram_II if cross_II is None else cross_II, plain.bits, plain.group_size, spec.rank,
            spec.steps, spec.lr, spec.clip_lr, seed, name,
        )
        quantized = type(plain).of_codes(grid.codes_OI, grid.scales_OG, grid.zeros_OG, plain.bits, plain.group_size)
        return quantized, a_RI, b_OR


def build(spec: Spec) -> ApiQ:
    """Return the method for a spec."""
    return ApiQ(spec)


def _straight(values: Tensor) -> Tensor:
    """Return rounded values through which gradients pass as if nothing had been rounded."""
    return values + (values.round() - values).detach()
