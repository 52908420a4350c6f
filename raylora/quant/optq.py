"""OPTQ (GPTQ): round one input at a time and let the inputs after it make up for the error (arXiv 2210.17323).

With U the upper Cholesky factor of the inverse of H = X^T X + damping, input j of every row at once:

    e_j = (w_j - Q(w_j)) / U_jj          w_k <- w_k - e_j U_jk  for all k > j         (equations 2 and 3, algorithm 1)

No reordering of the inputs, and nothing after the one pass.

Shapes: O outputs, I inputs, G groups per row, B inputs in a block.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raylora.errors import BaseError
from raylora.quant.gram import Factor
from raylora.quant.grid import check_weight, fit_grid, group_count, to_codes
from raylora.quant.magr import magr
from raylora.quant.on_grid import OnGrid
from raylora.quant.quantized import Quantized
from raylora.spec import GridSpec


class Spec(GridSpec):
    """Weights rounded one input after another, later ones making up for earlier ones, on calibration data."""

    reads_calibration: ClassVar[bool] = True

    kind: Literal["optq"] = "optq"
    magr: bool = True
    """Shrink outlying weights first, where the data will not notice (arXiv 2406.00800)."""
    magr_strength: float | None = Field(default=None, gt=0)
    """1e-3 with one group per row and 1e-4 otherwise, as MagR's authors."""
    magr_iterations: int = Field(default=200, ge=1)
    """The most steps that MagR takes per layer; most of the time of a preparation goes there."""
    damping: float = Field(default=0.01, gt=0)
    """Added to the diagonal of the Gram matrix, relative to its mean."""
    shrink: float | None = Field(default=None, gt=0, le=1)
    """Multiplies both ends of a group's range; 0.8 at 2 bits with one group per row, else 1."""


def default_shrink(bits: int, group_size: int, in_features: int) -> float:
    """Return the range shrink of MagR's authors: 0.8 at 2 bits with one grid per row, else none."""
    return 0.8 if bits == 2 and group_size >= in_features else 1.0


def optq(
    weight_OI: Tensor, factor: Factor, bits: int, group_size: int, shrink: float | None = None, block: int = 128,
    name: str = "weight",
) -> Quantized:
    """Return the weight quantized with error compensation.

    A group's grid is fitted when the pass reaches it, to weights that hold every correction so far: a block therefore
    ends where a group begins. Raise BaseError for unsupported bits or group sizes, entries that are not finite, and a
    factor of another width.
    """
    check_weight(weight_OI, name)
    inputs = weight_OI.shape[1]
    if len(factor.gram_II) != inputs:
        raise BaseError(f"{name}: {inputs} inputs, and a Gram matrix of {len(factor.gram_II)}")
    shrink = default_shrink(bits, group_size, inputs) if shrink is None else shrink
    root_II = factor.inverse_root_II.to(weight_OI.device, torch.float32)
    weight_IO = weight_OI.detach().float().T.clone(memory_format=torch.contiguous_format)  # an input's weights together
    weight_IO[factor.dead_I.to(weight_OI.device)] = 0
    codes_IO = torch.empty_like(weight_IO, dtype=torch.uint8)
    grids = []
    for start, stop in _blocks(inputs, group_size, block):
        if start % group_size == 0:
            group_OS = weight_IO[start : start + group_size].T
            grids.append(fit_grid(group_OS, bits, group_OS.shape[1], shrink, name))
        scale_O, zero_O = (each[:, 0].float() for each in grids[-1])
        block_BB, weight_BO = root_II[start:stop, start:stop], weight_IO[start:stop]
        error_BO = _round_block(weight_BO, block_BB, scale_O, zero_O, bits, codes_IO[start:stop])
        weight_IO[stop:].addmm_(root_II[start:stop, stop:].T, error_BO, alpha=-1)
    scales_OG, zeros_OG = (torch.cat(each, 1) for each in zip(*grids, strict=True))
    return Quantized.of_codes(codes_IO.T.contiguous(), scales_OG, zeros_OG, bits, group_size)


def _round_block(
    weight_BO: Tensor, root_BB: Tensor, scale_O: Tensor, zero_O: Tensor, bits: int, codes_BO: Tensor
) -> Tensor:
    """Write the block's codes, correct its weights in place as it goes, and return the errors e_BO."""
    error_BO = torch.empty_like(weight_BO)
    pivots = root_BB.diagonal().tolist()
    for j, pivot in enumerate(pivots):
        code_O = to_codes(weight_BO[j], scale_O, zero_O, bits)
        codes_BO[j] = code_O
        error_BO[j] = (weight_BO[j] - (code_O - zero_O) * scale_O) / pivot
        weight_BO[j + 1 :].addr_(root_BB[j, j + 1 :], error_BO[j], alpha=-1)
    return error_BO


def _blocks(inputs: int, group_size: int, block: int) -> list[tuple[int, int]]:
    """Return (start, stop) of blocks that are at most ``block`` wide and never cross a group's edge."""
    edges = sorted(
        start
        for group in range(group_count(inputs, group_size))
        for start in range(group * group_size, min(inputs, (group + 1) * group_size), block)
    )
    return list(zip(edges, [*edges[1:], inputs], strict=True))


class OPTQ(OnGrid[Spec]):
    """Rounds with error compensation, and shrinks outlying weights with MagR before if the spec says so."""

    def quantize(self, weight_OI: Tensor, factor: Factor | None, name: str) -> Quantized:
        """Return the codes that lose least on the calibration text. Raises: BaseError."""
        spec = self.spec
        if factor is None:
            raise BaseError(f"{name}: optq reads calibration text", "add base.calibration")
        group = spec.group_of(weight_OI.shape[1])
        if spec.magr:
            weight_OI = magr(
                weight_OI, factor.gram_II, group, spec.magr_strength, spec.magr_iterations, name=name
            )
        return optq(weight_OI, factor, spec.bits, group, spec.shrink, name=name)


def build(spec: Spec) -> OPTQ:
    """Return the quantizer for a spec."""
    return OPTQ(spec)
