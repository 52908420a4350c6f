"""LoftQ: alternate between quantizing W - B A and the SVD of W - Q; no data (arXiv 2310.08659, algorithm 1).

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from raylora.errors import BaseError
from raylora.spec import CompensationSpec


class Spec(CompensationSpec):
    """The pair that leaves the least error in the weights, whatever the data."""

    kind: Literal["loftq"] = "loftq"
    iterations: int = Field(default=5, ge=1)
    """How often quantizing and the singular value decomposition take turns."""


class LoftQ:
    """Quantize and compensate in turn."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def solve(
        self, weight_OI: Tensor, quantize: Callable[[Tensor], Any], gram_II: Tensor, name: str
    ) -> tuple[Any, Tensor, Tensor]:
        """Return (Q, A_RI, B_OR); the Gram matrix is looked at by the quantizer at most."""
        return loftq(weight_OI, quantize, self.spec.rank, self.spec.iterations)


def build(spec: Spec) -> LoftQ:
    """Return the method for a spec."""
    return LoftQ(spec)


class Dequantizable(Protocol):
    """What a quantizer returns: a tensor that is already rounded, or codes."""

    def dequantize(self) -> Tensor:
        """Return the weight, O x I, in float32."""
        ...


Rounded = TypeVar("Rounded", bound=Dequantizable)


def loftq(
    weight_OI: Tensor, quantize: Callable[[Tensor], Rounded], rank: int, iterations: int = 5
) -> tuple[Rounded, Tensor, Tensor]:
    """Return (Q as ``quantize`` made it, A_RI, B_OR), with B A the best rank-R pair for W - Q in the plain norm.

    The singular values are split evenly, A = Z^1/2 V^T and B = U Z^1/2, as LoftQ's authors and PEFT do. The last step
    is the SVD. Raise BaseError for a rank beyond the smaller side, and for fewer iterations than one.
    """
    if not 0 < rank <= min(weight_OI.shape):
        raise BaseError(f"rank: {rank} for a layer of {tuple(weight_OI.shape)}", f"use 1 to {min(weight_OI.shape)}")
    if iterations < 1:
        raise BaseError(f"iterations: {iterations} is less than 1")
    weight_OI = weight_OI.detach().float()
    target_OI = weight_OI
    for _ in range(iterations):
        rounded = quantize(target_OI)
        a_RI, b_OR = low_rank(weight_OI - rounded.dequantize(), rank)
        target_OI = weight_OI - b_OR @ a_RI
    return rounded, a_RI, b_OR


def low_rank(residual_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (A_RI, B_OR) of the truncated SVD, sqrt of the singular values on either side.

    The singular vectors are eigenvectors of the smaller side's Gram matrix, in float64: several times faster than the
    whole SVD. Directions without any weight are left out.
    """
    d_OI = residual_OI.double()
    tall = d_OI.shape[0] > d_OI.shape[1]
    d_SL = d_OI.T if tall else d_OI
    square_S, vectors_SS = torch.linalg.eigh(d_SL @ d_SL.T)
    s_R = square_S[-rank:].flip(0).clamp(min=0).sqrt()
    u_SR = vectors_SS[:, -rank:].flip(1)
    seen_R = s_R > s_R[0] * torch.finfo(torch.float64).eps ** 0.5
    root_R = torch.where(seen_R, s_R, 1.0).sqrt()
    small_SR, large_RL = u_SR * (root_R * seen_R), (u_SR.T @ d_SL) * (seen_R / root_R)[:, None]
    a_RI, b_OR = (small_SR.T, large_RL.T) if tall else (large_RL, small_SR)
    return a_RI.float().contiguous(), b_OR.float().contiguous()
