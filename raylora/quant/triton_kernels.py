"""Dequantizing on CUDA in one pass over the codes: unpack, subtract the zero point, scale, round once.

Imported only where Triton is (torch's CUDA builds bring it). Checked in Triton's interpreter on a CPU against the
torch path; never run on a device so far. ``tests/gpu/test_gpu_quant.py`` is the check for one.

Shapes: O outputs, I inputs, G groups per row.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from raylora.quant.grid import group_count

_COLUMNS = 512


@triton.jit
def _code(packed, index, mask, bits: tl.constexpr, last_byte):  # type: ignore[no-untyped-def]
    """Return the codes at ``index`` of one packed run: bits ``bits * index`` and up, lowest first."""
    byte = index * bits // 8
    word = tl.load(packed + byte, mask=mask, other=0).to(tl.int32)
    if bits == 3:  # the only width whose codes straddle two bytes
        word = word | (tl.load(packed + byte + 1, mask=mask & (byte < last_byte), other=0).to(tl.int32) << 8)
    return ((word >> (index * bits % 8).to(tl.int32)) & ((1 << bits) - 1)).to(tl.float32)


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    codes, scales, zeros, weight, inputs, groups, group_size, row_bytes, zero_bytes,
    bits: tl.constexpr, columns: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # offsets of a large matrix do not fit 32 bits
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = column < inputs
    code = _code(codes + row * row_bytes, column, inside, bits, row_bytes - 1)
    group = row * groups + column // group_size
    zero = _code(zeros, group, inside, bits, zero_bytes - 1)
    scale = tl.load(scales + group, mask=inside, other=0).to(tl.float32)
    value = (code - zero) * scale
    tl.store(weight + row * inputs + column, value.to(weight.dtype.element_ty), mask=inside)


def dequantize(
    codes: Tensor, scales_OG: Tensor, zeros: Tensor, bits: int, group_size: int, shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Return what ``kernels.dequantize_plain`` returns; all tensors are on one CUDA device."""
    outputs, inputs = shape
    weight_OI = torch.empty(shape, dtype=dtype, device=codes.device)
    grid = (outputs, triton.cdiv(inputs, _COLUMNS))
    with torch.cuda.device_of(codes):  # Triton launches on the current device, which may be another
        _dequantize[grid](
            codes.contiguous(), scales_OG.contiguous(), zeros.contiguous(), weight_OI, inputs,
            group_count(inputs, group_size), group_size, codes.shape[1], zeros.shape[0], bits=bits, columns=_COLUMNS,
        )
    return weight_OI
