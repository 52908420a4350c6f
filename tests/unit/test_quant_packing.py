"""Packed codes, grids, round to nearest: against the obvious ways to compute the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raylora.errors import BaseError
from raylora.quant.grid import fit_grid
from raylora.quant.packing import pack_codes, packed_bytes, unpack_codes
from raylora.quant.quantized import Quantized
from raylora.quant.rtn import round_to_nearest

GROUP_SIZES = (8, 7, 40, 1, 64)  # dividing, with a shorter last group, one per row, one per weight, wider than the row


def weight(outputs: int = 48, inputs: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


# --- packing -----------------------------------------------------------------------------------------
def slow_pack(codes: list[int], bits: int) -> list[int]:
    """Write the codes as one string of bits, lowest first, and cut it into bytes."""
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    stream += "0" * (packed_bytes(len(codes), bits) * 8 - len(stream))
    return [int(stream[at : at + 8][::-1], 2) for at in range(0, len(stream), 8)]


@st.composite
def code_lists(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.sampled_from([2, 3, 4]))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70))


@given(code_lists())
def test_packing_equals_a_string_of_bits_and_comes_back(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack_codes(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == slow_pack(codes, bits)
    assert unpack_codes(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_are_packed_alone(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 2, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, 2, packed_bytes(13, bits))
    assert torch.equal(packed[1, 1], pack_codes(codes[1, 1], bits))
    assert torch.equal(unpack_codes(packed, bits, 13), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits_are_what_they_are_called(bits: int) -> None:
    quantized = round_to_nearest(weight(96, 384), bits, 64)
    groups = 96 * 384 // 64
    assert quantized.codes.nbytes == 96 * 384 * bits // 8
    assert quantized.zeros.nbytes == groups * bits // 8
    assert quantized.scales_OG.nbytes == groups * 2
    assert quantized.size_bytes == sum(t.untyped_storage().nbytes() for t in quantized.to_tensors().values())
    assert quantized.size_bytes * 8 / (96 * 384) == pytest.approx(bits + (16 + bits) / 64)


@pytest.mark.parametrize("bits", [0, 1, 5, 8])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(BaseError, match="use one of 2, 3, 4"):
        round_to_nearest(weight(), bits, 8)


def test_a_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BaseError, match="does not fit into 2 bits"):
        pack_codes(torch.tensor([0, 4], dtype=torch.uint8), 2)


# --- grids -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_weight_is_further_than_half_a_step_from_its_code(bits: int, group_size: int) -> None:
    given_OI = weight() * torch.logspace(-6, 2, 48)[:, None]  # subnormal scales too
    quantized = round_to_nearest(given_OI, bits, group_size)
    steps_OI = quantized.scales_OG.float().repeat_interleave(group_size, 1)[:, :40]
    assert bool(((quantized.dequantize() - given_OI).abs() <= steps_OI / 2 * (1 + 1e-5)).all())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_round_to_nearest_equals_a_loop_over_groups(group_size: int) -> None:
    given_OI, bits = weight(5), 3
    got_OI = round_to_nearest(given_OI, bits, group_size, shrink=0.9).dequantize()
    for o in range(5):
        for start in range(0, 40, group_size):
            group = given_OI[o, start : start + group_size]
            low, high = min(float(group.min()), 0) * 0.9, max(float(group.max()), 0) * 0.9
            scales, zeros = fit_grid(group[None], bits, len(group), 0.9)
            scale, zero = float(scales), float(zeros)
            assert (high - low) / 7 <= scale <= (high - low) / 7 * (1 + 2**-10)
            points = torch.tensor([(code - zero) * scale for code in range(8)])
            nearest = points[(group[:, None] - points).abs().argmin(1)]
            assert torch.allclose(got_OI[o, start : start + group_size], nearest, atol=1e-6)


def test_zeros_and_constants_are_kept() -> None:
    given_OI = torch.stack((torch.zeros(8), torch.full((8,), 0.75), torch.full((8,), -3.0), torch.arange(8.0)))
    for bits in (2, 3, 4):
        got_OI = round_to_nearest(given_OI, bits, 8).dequantize()
        assert torch.allclose(got_OI[:3], given_OI[:3], rtol=2**-10)
        assert got_OI[3, 0] == 0
    assert torch.equal(round_to_nearest(given_OI, 3, 8).dequantize()[3], given_OI[3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    damaged_OI = weight()
    damaged_OI[3, 4] = bad
    with pytest.raises(BaseError, match=r"layers\.2\.q_proj: the weight has NaN"):
        round_to_nearest(damaged_OI, 4, 8, name="layers.2.q_proj")


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(BaseError, match="group_size: 0"):
        round_to_nearest(weight(), 4, 0)
    with pytest.raises(BaseError, match="a matrix is needed"):
        round_to_nearest(weight()[0], 4, 8)
    with pytest.raises(BaseError, match="do not fit a float16 scale"):
        round_to_nearest(weight() * 1e8, 4, 8)


# --- quantized ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_quantized_weight_comes_back_from_its_tensors(bits: int, group_size: int) -> None:
    quantized = round_to_nearest(weight(40, 48), bits, group_size)
    again = Quantized.from_tensors(quantized.to_tensors(), bits, group_size, (40, 48))
    assert torch.equal(again.dequantize(), quantized.dequantize())
    assert torch.equal(again.dequantize(torch.bfloat16), quantized.dequantize().bfloat16())  # rounded once
    with pytest.raises(BaseError, match=r"codes is torch.uint8 of"):
        Quantized.from_tensors(quantized.to_tensors(), bits, group_size, (48, 40))


def test_dequantizing_equals_its_equation() -> None:
    generator = torch.Generator().manual_seed(1)
    codes_OI = torch.randint(0, 8, (5, 11), dtype=torch.uint8, generator=generator)
    zeros_OG = torch.randint(0, 8, (5, 3), dtype=torch.uint8, generator=generator)
    scales_OG = torch.rand(5, 3, generator=generator).half()
    got_OI = Quantized.of_codes(codes_OI, scales_OG, zeros_OG, 3, 4).dequantize()
    for o in range(5):
        for i in range(11):
            code, zero, scale = int(codes_OI[o, i]), int(zeros_OG[o, i // 4]), float(scales_OG[o, i // 4])
            assert float(got_OI[o, i]) == (code - zero) * scale
