"""Asymmetric min/max grids, one per row and group of inputs: weight = (code - zero) * scale.

A grid holds 0 exactly and its zero point is a code. Its scale is a float16 rounded up: what is stored is what was
computed with, and with shrink = 1 no weight is further than scale / 2 from its code.

Shapes: O outputs, I inputs, G groups per row, S inputs in a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from raylora.errors import BaseError
from raylora.quant.packing import check_bits


def group_count(in_features: int, group_size: int) -> int:
    """Return G: the last group is shorter if ``group_size`` does not divide the inputs, and may be the only one."""
    if group_size < 1:
        raise BaseError(f"group_size: {group_size} is not a number of inputs", "use 64, or the inputs for one per row")
    return -(-in_features // group_size)


def check_weight(weight_OI: Tensor, name: str) -> None:
    """Raise BaseError, with the layer's name, for what is no finite matrix."""
    if weight_OI.ndim != 2:
        raise BaseError(f"{name}: a matrix is needed, not {tuple(weight_OI.shape)}")
    if not bool(torch.isfinite(weight_OI).all()):
        raise BaseError(f"{name}: the weight has NaN or infinite entries", "the checkpoint is damaged, or overflowed")


def fit_grid(
    weight_OI: Tensor, bits: int, group_size: int, shrink: float = 1.0, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    """Return (scales_OG float16, zeros_OG uint8) of the grids that span each group's range and 0.

    ``shrink`` multiplies both ends of the range: at 2 bits per row, clipping a few weights buys a finer grid for the
    others. Raise BaseError for a group whose scale does not fit into a float16.
    """
    check_bits(bits)
    groups, most = group_count(weight_OI.shape[1], group_size), 2**bits - 1
    missing = groups * group_size - weight_OI.shape[1]
    weight_OGS = F.pad(weight_OI.float(), (0, missing)).unflatten(1, (groups, group_size))  # 0 is in every range
    low_OG = weight_OGS.amin(2).clamp_(max=0) * shrink
    high_OG = weight_OGS.amax(2).clamp_(min=0) * shrink
    scales_OG = _float16_up((high_OG - low_OG) / most)
    if not bool(torch.isfinite(scales_OG).all()):
        raise BaseError(f"{name}: weights as large as {float(weight_OI.abs().max()):.3g} do not fit a float16 scale")
    scales_OG[scales_OG == 0] = 1  # a group of zeros
    zeros_OG = (-low_OG / scales_OG.float()).round_().clamp_(0, most)
    return scales_OG, zeros_OG.to(torch.uint8)


def to_codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the nearest codes, in float32, of weights that meet their scales and zero points by broadcasting."""
    return (weight / scale).round_().add_(zero).clamp_(0, 2**bits - 1)


def _float16_up(values: Tensor) -> Tensor:
    """Return the smallest float16 that is not below each (non-negative) value, infinity if there is none."""
    near = values.half()
    below = near.float() < values
    return (near.view(torch.int16) + below.short()).view(torch.float16)  # positive floats are ordered as their bits are
