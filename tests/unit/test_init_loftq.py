"""LoftQ against PEFT's own, and against its algorithm written out."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft.utils import loftq_utils
from torch import Tensor

from raylora.errors import BaseError
from raylora.init.loftq import loftq, low_rank
from raylora.quant.quantized import Quantized
from raylora.quant.rtn import round_to_nearest

SHAPES = ((48, 40), (40, 48))


def weight(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


def nf4(weight_OI: Tensor) -> Tensor:
    from bitsandbytes import functional

    return functional.dequantize_4bit(*functional.quantize_4bit(weight_OI, quant_type="nf4"))


@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_peft(shape: tuple[int, int], iterations: int) -> None:
    # PEFT's function moves everything to "cuda" by name: the same source with another name runs on a CPU.
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    names = dict(vars(loftq_utils))
    exec(source, names)
    weight_OI = weight(*shape)
    expected_OI, expected_A, expected_B = names["loftq_init"](weight_OI, 4, 6, iterations)
    got_OI, a_RI, b_OR = loftq(weight_OI, nf4, 6, iterations)
    torch.testing.assert_close(got_OI, expected_OI)
    torch.testing.assert_close(b_OR @ a_RI, expected_B[:, :6] @ expected_A[:6], rtol=0, atol=1e-5)
    torch.testing.assert_close(a_RI.norm(dim=1), expected_A[:6].norm(dim=1), rtol=1e-4, atol=0)
    torch.testing.assert_close(b_OR.norm(dim=0), expected_B[:, :6].norm(dim=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_kept_and_each_iteration_is_the_algorithm_s(shape: tuple[int, int]) -> None:
    weight_OI = weight(*shape)

    def quantize(target_OI: Tensor) -> Quantized:
        return round_to_nearest(target_OI, 2, 8)

    quantized, a_RI, b_OR = loftq(weight_OI, quantize, 6, iterations=3)
    assert isinstance(quantized, Quantized)
    product = torch.zeros_like(weight_OI)
    for _ in range(3):
        q_OI = round_to_nearest(weight_OI - product, 2, 8).dequantize()
        u, s, v = torch.linalg.svd(weight_OI - q_OI)
        product = u[:, :6] @ torch.diag(s[:6]) @ v[:6]
    torch.testing.assert_close(quantized.dequantize(), q_OI)
    torch.testing.assert_close(b_OR @ a_RI, product, rtol=0, atol=1e-5)


def test_it_leaves_less_than_no_pair_and_than_one_iteration() -> None:
    weight_OI = weight(48, 40)
    plain = torch.linalg.norm(weight_OI - round_to_nearest(weight_OI, 2, 8).dequantize())
    left = []
    for iterations in (1, 5):
        quantized, a_RI, b_OR = loftq(weight_OI, lambda w: round_to_nearest(w, 2, 8), 6, iterations)
        left.append(torch.linalg.norm(weight_OI - quantized.dequantize() - b_OR @ a_RI))
    assert left[1] < left[0] < plain


def test_the_pair_is_split_evenly() -> None:
    a_RI, b_OR = low_rank(weight(48, 40), 40)
    torch.testing.assert_close(b_OR @ a_RI, weight(48, 40), rtol=0, atol=1e-5)
    torch.testing.assert_close(a_RI.norm(dim=1), b_OR.norm(dim=0), rtol=1e-5, atol=0)


def test_bad_input_is_refused() -> None:
    for rank in (0, 41):
        with pytest.raises(BaseError, match=f"rank: {rank}"):
            loftq(weight(48, 40), nf4, rank)
    with pytest.raises(BaseError, match="iterations: 0"):
        loftq(weight(48, 40), nf4, 4, 0)
