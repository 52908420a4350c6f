"""Dequantizing, wherever the tensors are: pure torch, or one Triton kernel on CUDA.

Both compute (code - zero) * scale in float32, where it is exact, and round once to the type asked for: they agree
bit by bit.

Shapes: O outputs, I inputs, G groups per row.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from raylora.quant.grid import group_count
from raylora.quant.packing import unpack_codes


def dequantize(
    codes: Tensor, scales_OG: Tensor, zeros: Tensor, bits: int, group_size: int, shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight, O x I, of packed codes (O x bytes) and packed zero points (O * G of them, flat)."""
    if codes.is_cuda and _has_triton():
        from raylora.quant import triton_kernels

        return triton_kernels.dequantize(codes, scales_OG, zeros, bits, group_size, shape, dtype)
    return dequantize_plain(codes, scales_OG, zeros, bits, group_size, shape, dtype)


def dequantize_plain(
    codes: Tensor, scales_OG: Tensor, zeros: Tensor, bits: int, group_size: int, shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Return what :func:`dequantize` does, in torch's own operations: the reference, and what a CPU runs."""
    outputs, inputs = shape
    groups = group_count(inputs, group_size)
    zeros_OG = unpack_codes(zeros, bits, outputs * groups).view(outputs, groups, 1).float()
    weight_OI = unpack_codes(codes, bits, inputs).float()
    whole = inputs // group_size
    in_groups = weight_OI[:, : whole * group_size].unflatten(1, (whole, group_size)) if whole else weight_OI[:, :0]
    if whole:
        in_groups.sub_(zeros_OG[:, :whole]).mul_(scales_OG[:, :whole, None].float())
    if whole < groups:  # the shorter last group
        weight_OI[:, whole * group_size :].sub_(zeros_OG[:, -1]).mul_(scales_OG[:, -1:].float())
    return weight_OI.to(dtype)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
