"""Gram matrices and OPTQ, against float64 and the textbook's explicit inverse Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raylora.errors import BaseError
from raylora.init.cloq import calibration_error
from raylora.quant import gram
from raylora.quant.gram import Factor, Gram, damped
from raylora.quant.optq import _blocks, default_shrink, optq
from raylora.quant.rtn import round_to_nearest

SHAPES = ((48, 40), (40, 48))


def layer(outputs: int, inputs: int, rows: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x_NI = torch.randn(rows, inputs, generator=generator, dtype=torch.float64) @ mix_II
    return torch.randn(outputs, inputs, generator=generator), x_NI.T @ x_NI


# --- Gram --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gram_equals_float64_whatever_the_batches(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_ROWS_AT_ONCE", 16)  # several parts per batch
    x_BTI = torch.randn(7, 11, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    streamed = Gram(40)
    for batch in (x_BTI[:2], x_BTI[2:3], x_BTI[3:]):
        streamed.add(batch)
    x_NI = x_BTI.double().reshape(-1, 40)
    assert streamed.rows == 77
    assert streamed.matrix_II.dtype == torch.float64
    assert torch.equal(streamed.matrix_II, streamed.matrix_II.T)
    torch.testing.assert_close(streamed.matrix_II, x_NI.T @ x_NI, rtol=1e-5, atol=1e-4)


def test_gram_does_not_lose_small_batches_in_a_large_sum() -> None:
    streamed = Gram(1)
    streamed.add(torch.full((1, 1), 1e4))
    for _ in range(100):
        streamed.add(torch.full((1, 1), 1.0))  # 1e8 + 1 is 1e8 in float32
    assert float(streamed.matrix_II) == 1e8 + 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_gram_refuses_what_is_not_finite(bad: float) -> None:
    x_NI = torch.randn(5, 4)
    x_NI[2, 1] = bad
    with pytest.raises(BaseError, match=r"q_proj: calibration inputs have NaN"):
        Gram(4).add(x_NI, "q_proj")


def test_gram_refuses_another_width() -> None:
    with pytest.raises(BaseError, match="inputs of width 5"):
        Gram(4).add(torch.randn(3, 5))


def test_damping_is_relative_to_the_mean_diagonal() -> None:
    matrix_II = torch.diag(torch.tensor([1.0, 3.0, 0.0, 0.0]))
    assert damped(matrix_II, 0.5).diagonal().tolist() == [1.5, 3.5, 0.5, 0.5]
    assert torch.equal(damped(torch.zeros(3, 3), 0.25), 0.25 * torch.eye(3, dtype=torch.float64))


def test_the_factor_is_the_root_of_the_inverse_and_is_taken_once() -> None:
    _, gram_II = layer(48, 40)
    factor = Factor(gram_II)
    root_II = factor.inverse_root_II
    assert torch.equal(root_II, root_II.triu())
    torch.testing.assert_close(root_II.T @ root_II, torch.linalg.inv(damped(gram_II, 0.01)), rtol=1e-9, atol=1e-15)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped(gram_II, 0.01)), upper=True)
    torch.testing.assert_close(root_II, expected, rtol=1e-7, atol=1e-12)
    assert factor.inverse_root_II is root_II
    assert factor.damped_II is factor.damped_II


def test_a_singular_gram_needs_damping() -> None:
    x_NI = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).double()
    with pytest.raises(BaseError, match=r"down_proj: the calibration inputs do not span .*\n.*damping above 0"):
        _ = Factor(-1e-9 * torch.eye(40) + x_NI.T @ x_NI, damping=0.0, name="down_proj").inverse_root_II
    assert bool(torch.isfinite(Factor(x_NI.T @ x_NI).inverse_root_II).all())


# --- OPTQ --------------------------------------------------------------------------------------------
def textbook_optq(weight_OI: Tensor, gram_II: Tensor, bits: int, group_size: int, shrink: float) -> Tensor:
    """Return Q in float64: one input at a time, with the inverse Hessian of those left kept up to date."""
    weight_OI, most = weight_OI.double().clone(), 2**bits - 1
    inverse_II = torch.linalg.inv(damped(gram_II, 0.01))
    quantized_OI = torch.empty_like(weight_OI)
    for j in range(weight_OI.shape[1]):
        if j % group_size == 0:
            group_OS = weight_OI[:, j : j + group_size]
            low_O, high_O = group_OS.amin(1).clamp(max=0) * shrink, group_OS.amax(1).clamp(min=0) * shrink
            near_O = ((high_O - low_O) / most).half()
            next_O = (near_O.view(torch.int16) + 1).view(torch.float16)
            scale_O = torch.where(near_O.float() < ((high_O - low_O) / most).float(), next_O, near_O).double()
            zero_O = (-low_O / scale_O).round()
        code_O = ((weight_OI[:, j] / scale_O).round() + zero_O).clamp(0, most)
        quantized_OI[:, j] = (code_O - zero_O) * scale_O
        error_O = (weight_OI[:, j] - quantized_OI[:, j]) / inverse_II[j, j]
        weight_OI[:, j:] -= error_O[:, None] * inverse_II[j, j:]
        inverse_II = inverse_II - torch.outer(inverse_II[:, j], inverse_II[j]) / inverse_II[j, j]
    return quantized_OI


@pytest.mark.parametrize("group_size", [8, 64, 12, 20])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_optq_equals_the_textbook(shape: tuple[int, int], bits: int, group_size: int) -> None:
    weight_OI, gram_II = layer(*shape)
    expected_OI = textbook_optq(weight_OI, gram_II, bits, group_size, default_shrink(bits, group_size, shape[1]))
    for block in (128, 16, 5):
        got_OI = optq(weight_OI, Factor(gram_II), bits, group_size, block=block).dequantize()
        # A row whose weight falls between two codes up to float32's rounding goes its own way from there on.
        alike_O = torch.isclose(got_OI.double(), expected_OI, rtol=1e-5, atol=1e-6).all(1)
        assert int(alike_O.sum()) >= shape[0] - 1
        error, expected = (
            calibration_error((weight_OI - each_OI)[alike_O], gram_II) for each_OI in (got_OI, expected_OI)
        )
        assert error == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("group_size", [8, 40])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_optq_beats_round_to_nearest_on_the_calibration_inputs(bits: int, group_size: int) -> None:
    weight_OI, gram_II = layer(48, 40)
    by_optq = optq(weight_OI, Factor(gram_II), bits, group_size).dequantize()
    by_rtn = round_to_nearest(weight_OI, bits, group_size).dequantize()
    assert calibration_error(weight_OI - by_optq, gram_II) < 0.9 * calibration_error(weight_OI - by_rtn, gram_II)
    assert torch.linalg.norm(weight_OI - by_optq) > torch.linalg.norm(weight_OI - by_rtn)  # not in the plain norm


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    weight_OI, _ = layer(48, 40)
    gram_II = torch.diag(torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.5).double()
    got, expected = optq(weight_OI, Factor(gram_II), 3, 8), round_to_nearest(weight_OI, 3, 8)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scales_OG, expected.scales_OG)
    assert torch.equal(got.zeros, expected.zeros)


@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_dead_inputs_get_weight_zero_and_disturb_nobody(damping: float) -> None:
    weight_OI, gram_II = layer(48, 40)
    dead_I = torch.zeros(40, dtype=torch.bool)
    dead_I[[0, 13, 39]] = True
    gram_II[dead_I] = 0
    gram_II[:, dead_I] = 0
    factor = Factor(gram_II, damping)
    assert torch.equal(factor.dead_I, dead_I)
    got_OI = optq(weight_OI, factor, 4, 40).dequantize()
    assert not bool(got_OI[:, dead_I].any())
    other_OI = weight_OI.clone()
    other_OI[:, dead_I] = 1e3
    assert torch.equal(optq(other_OI, factor, 4, 40).dequantize(), got_OI)
    assert torch.equal(other_OI[:, dead_I], torch.full((48, 3), 1e3))  # the caller's weight is left alone


def test_fewer_rows_than_inputs_are_enough() -> None:
    weight_OI, gram_II = layer(48, 40, rows=10)
    error = calibration_error(weight_OI - optq(weight_OI, Factor(gram_II), 2, 8).dequantize(), gram_II)
    assert error < 0.5 * calibration_error(weight_OI - round_to_nearest(weight_OI, 2, 8).dequantize(), gram_II)


def test_shrink_is_for_two_bits_per_row() -> None:
    assert default_shrink(2, 40, 40) == default_shrink(2, 64, 40) == 0.8
    assert default_shrink(2, 8, 40) == default_shrink(3, 40, 40) == 1.0


@pytest.mark.parametrize(("inputs", "group_size", "block"), [(40, 8, 128), (300, 300, 128), (300, 200, 128), (5, 9, 2)])
def test_blocks_cover_the_inputs_and_end_with_their_group(inputs: int, group_size: int, block: int) -> None:
    blocks = _blocks(inputs, group_size, block)
    assert [i for start, stop in blocks for i in range(start, stop)] == list(range(inputs))
    assert all(0 < stop - start <= block and start // group_size == (stop - 1) // group_size for start, stop in blocks)


def test_bad_input_is_refused() -> None:
    weight_OI, gram_II = layer(48, 40)
    with pytest.raises(BaseError, match="bits: 5"):
        optq(weight_OI, Factor(gram_II), 5, 8)
    with pytest.raises(BaseError, match="group_size: 0"):
        optq(weight_OI, Factor(gram_II), 4, 0)
    with pytest.raises(BaseError, match="up_proj: 48 inputs, and a Gram matrix of 40"):
        optq(weight_OI.T, Factor(gram_II), 4, 8, name="up_proj")
    with pytest.raises(BaseError, match="up_proj: the weight has NaN"):
        optq(weight_OI * float("nan"), Factor(gram_II), 4, 8, name="up_proj")
