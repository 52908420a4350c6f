"""Delta-CoMe: a low-rank change in mixed precision, more bits for larger singular values (arXiv 2406.08903).

The change of a layer is decomposed, ``B A = U S V^T = sum_i s_i u_i v_i^T``, and each pair of singular vectors is
rounded to 8, 3 or 2 bits or left out (Ping et al., section 3). Which has how many bits follows from a budget of bytes:
the least ``sum_i || s_i u_i v_i^T - s_i u'_i v'_i^T ||_F^2`` over all layers at once, where the paper tries fixed
splits. Vectors are rounded to the nearest level, with a scale of least error for each; the paper rounds by GPTQ on
calibration text.

Shapes: I inputs, O outputs, R rank, N vectors, S numbers of one, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raylora.quant.packing import pack_codes, packed_bytes, unpack_codes

WIDTHS = (2, 3, 8)
"""Bits that a singular vector may have, beside none."""
SCALE_BYTES = 2
"""Of the float16 scale of one vector."""
_SHRINKS = torch.linspace(0.3, 1.0, 29, dtype=torch.float64)
"""Shares of its greatest number that a vector's grid may span."""


def singular_factors(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
    """Return (rows sqrt(s_i) u_i, R x O, and sqrt(s_i) v_i, R x I) of B A in float64, by decreasing s_i.

    B A has rank R, so the decomposition is that of an R x R matrix between two QR factors.
    """
    outer_OR, upper_RR = torch.linalg.qr(b_OR.double())
    inner_IR, lower_RR = torch.linalg.qr(a_RI.double().T)
    left_RR, values_R, right_RR = torch.linalg.svd(upper_RR @ lower_RR.T)
    root_R = values_R.sqrt()[:, None]
    return root_R * (outer_OR @ left_RR).T, root_R * (inner_IR @ right_RR.T).T


def round_vectors(rows_NS: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return (codes uint8 N x S, scales float16 N) of small squared error.

    A code c stands for ``(c - (2^bits - 1) / 2) * scale``: levels lie evenly around zero, which is none of them.
    """
    middle = (2**bits - 1) / 2
    peak_N = rows_NS.abs().amax(dim=1)
    best_N = torch.full_like(peak_N, float("inf"))
    codes_NS, scales_N = torch.zeros_like(rows_NS, dtype=torch.uint8), peak_N.half()
    for shrink in _SHRINKS.tolist():
        tried_N = (shrink * peak_N / middle).half()
        step_N1 = tried_N.to(rows_NS.dtype).clamp(min=2**-24)[:, None]
        found_NS = (rows_NS / step_N1 + middle).round().clamp(0, 2**bits - 1)
        error_N = ((found_NS - middle) * tried_N.to(rows_NS.dtype)[:, None] - rows_NS).square().sum(dim=1)
        better_N = error_N < best_N
        best_N = torch.where(better_N, error_N, best_N)
        scales_N = torch.where(better_N, tried_N, scales_N)
        codes_NS[better_N] = found_NS[better_N].to(torch.uint8)
    return codes_NS, scales_N


def restored(codes_NS: Tensor, scales_N: Tensor, bits: int) -> Tensor:
    """Return the numbers that codes stand for, float32."""
    return (codes_NS.float() - (2**bits - 1) / 2) * scales_N.float()[:, None]


def change_error(u_NO: Tensor, v_NI: Tensor, near_u_NO: Tensor, near_v_NI: Tensor) -> Tensor:
    """Return ``|| u v^T - u' v'^T ||_F^2`` of each pair of vectors, N, without making the matrices."""
    u_NO, v_NI, near_u_NO, near_v_NI = (t.double() for t in (u_NO, v_NI, near_u_NO, near_v_NI))
    squares = u_NO.square().sum(1) * v_NI.square().sum(1) + near_u_NO.square().sum(1) * near_v_NI.square().sum(1)
    return (squares - 2 * (u_NO * near_u_NO).sum(1) * (v_NI * near_v_NI).sum(1)).clamp(min=0)


def whole_error(u_NO: Tensor, v_NI: Tensor, near_u_NO: Tensor, near_v_NI: Tensor) -> tuple[float, float]:
    """Return ``|| U^T V - U'^T V' ||_F^2`` and ``|| U^T V ||_F^2`` of a layer, from products of its vectors alone."""
    u_NO, v_NI, near_u_NO, near_v_NI = (t.double() for t in (u_NO, v_NI, near_u_NO, near_v_NI))

    def inner(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> float:
        return float(((one[0] @ two[0].T) * (one[1] @ two[1].T)).sum())

    whole, near = (u_NO, v_NI), (near_u_NO, near_v_NI)
    square = inner(whole, whole)
    return max(0.0, square - 2 * inner(whole, near) + inner(near, near)), square


def pair_bytes(inputs: int, outputs: int, bits: int) -> int:
    """Return what one pair of singular vectors takes at some bits; nothing at 0."""
    return vector_bytes(inputs, bits) + vector_bytes(outputs, bits) + 2 * SCALE_BYTES if bits else 0


def vector_bytes(count: int, bits: int) -> int:
    """Return what the codes of one vector take."""
    return count if bits == 8 else packed_bytes(count, bits)


def pack_vectors(codes_NS: Tensor, bits: int) -> Tensor:
    """Return codes as bytes, row by row, flat."""
    return (codes_NS if bits == 8 else pack_codes(codes_NS, bits)).flatten()


def unpack_vector(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes of one vector."""
    return packed if bits == 8 else unpack_codes(packed, bits, count)


def choose(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Return which choice each item takes, so that the sum of errors is small and that of costs within the budget.

    Choices stand by rising cost. From each item's first one, the step that takes away most error per byte is taken
    again and again, over choices that no straight line between others needs. Until one does not fit any more, no other
    choices of that cost have a smaller sum; what is left is filled with smaller steps.
    """
    steps = []
    for item, (own_errors, own_costs) in enumerate(zip(errors, costs, strict=True)):
        at = 0
        while at < len(own_errors) - 1:
            gains = [
                ((own_errors[at] - own_errors[to]) / (own_costs[to] - own_costs[at]), to)
                for to in range(at + 1, len(own_errors))
            ]
            gain, to = max(gains)
            if gain <= 0:
                break
            steps.append((-gain, item, at, to))
            at = to
    chosen = [0] * len(errors)
    left = budget - sum(own[0] for own in costs)
    for _, item, at, to in sorted(steps):
        price = costs[item][to] - costs[item][at]
        if chosen[item] == at and price <= left:
            chosen[item], left = to, left - price
    return chosen
