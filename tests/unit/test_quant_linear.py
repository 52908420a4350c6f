"""A quantized linear layer, against a dense one."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raylora.errors import BaseError
from raylora.quant.linear import QuantizedLinear
from raylora.quant.rtn import round_to_nearest

SHAPES = ((48, 40), (40, 48))


def make(
    outputs: int = 48, inputs: int = 40, dtype: torch.dtype = torch.float32, pair: bool = True, bits: int = 3
) -> tuple[QuantizedLinear, Tensor, Tensor]:
    """Return a layer, the dense weight it stands for, and its bias."""
    generator = torch.Generator().manual_seed(0)
    quantized = round_to_nearest(torch.randn(outputs, inputs, generator=generator), bits, 8)
    a_RI = torch.randn(3, inputs, generator=generator) / 5
    b_OR = torch.randn(outputs, 3, generator=generator) / 5
    bias_O = torch.randn(outputs, generator=generator)
    layer = QuantizedLinear(quantized, bias_O, dtype, (a_RI, b_OR) if pair else None)
    return layer, quantized.dequantize() + (b_OR @ a_RI if pair else 0), bias_O


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 4)])
@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_equal_a_dense_layer(shape: tuple[int, int], pair: bool, leading: tuple[int, ...]) -> None:
    layer, dense_OI, bias_O = make(*shape, pair=pair)
    x = torch.randn(*leading, shape[1], requires_grad=True)
    reference = x.detach().clone().requires_grad_()
    y, expected = layer(x), F.linear(reference, dense_OI, bias_O)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_finite_differences() -> None:
    layer, *_ = make(dtype=torch.float64)
    x = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("of_input", [torch.float32, torch.bfloat16])
def test_the_compute_type_computes_and_the_input_s_type_comes_out(of_input: torch.dtype) -> None:
    layer, dense_OI, bias_O = make(dtype=torch.bfloat16)
    x = torch.randn(5, 40).to(of_input).requires_grad_()
    y = layer(x)
    assert y.dtype == of_input
    torch.testing.assert_close(y.float(), F.linear(x.float(), dense_OI, bias_O), rtol=0.05, atol=0.1)
    assert not torch.equal(y.float(), F.linear(x.float(), dense_OI, bias_O))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == of_input


def test_autocast_does_not_choose_the_type() -> None:
    layer, *_ = make()
    x = torch.randn(5, 40, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    assert torch.equal(inside, layer(x))
    inside.sum().backward()


def test_weight_is_without_the_pair_and_dense_weight_with_it() -> None:
    layer, dense_OI, _ = make(dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, layer.quantized.dequantize(torch.bfloat16))
    assert layer.dense_weight().dtype == torch.float32
    torch.testing.assert_close(layer.dense_weight(), dense_OI, rtol=0, atol=0.02)  # the pair is in the compute type
    assert torch.equal(make(pair=False)[0].dense_weight(), make(pair=False)[1])


def test_it_is_a_linear_layer_without_parameters_and_as_small_as_its_codes() -> None:
    layer, *_ = make(pair=False)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (40, 48)
    assert not list(layer.parameters())
    assert layer.size_bytes == layer.quantized.size_bytes + 48 * 4
    assert "in_features=40, out_features=48, bias=True, bits=3, group_size=8, pair_rank=0" in repr(layer)
    frozen = nn.Sequential(layer).requires_grad_(True)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_no_dense_weight_is_kept_between_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, *_ = make()
    alive: list[weakref.ref] = []
    whole = QuantizedLinear.weight.fget

    def watched(self: QuantizedLinear) -> Tensor:
        weight_OI = whole(self)
        alive.append(weakref.ref(weight_OI))
        return weight_OI

    monkeypatch.setattr(QuantizedLinear, "weight", property(watched))
    saved: list[tuple[int, ...]] = []
    x = torch.randn(5, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = layer(x * 2)
    gc.collect()
    assert len(alive) == 1
    assert alive[0]() is None
    assert (48, 40) not in saved
    y.sum().backward()
    assert len(alive) == 2


def test_it_survives_copies_and_a_state_dict() -> None:
    layer, *_ = make()
    x = torch.randn(5, 40)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    state = layer.state_dict()
    assert set(state) == {"codes", "scale_bits", "zeros", "pair_A_RI", "pair_B_OR", "bias"}
    other = make()[0]
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)
    without = make(pair=False)[0]
    assert set(without.state_dict()) == {"codes", "scale_bits", "zeros", "bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model_leaves_the_scales_alone(dtype: torch.dtype) -> None:
    layer, *_ = make(pair=False)
    expected = layer.dense_weight()
    cast = nn.Sequential(layer).to(dtype).to("cpu")
    assert torch.equal(cast[0].dense_weight(), expected)
    assert cast(torch.randn(5, 40)).shape == (5, 48)


def test_what_does_not_fit_is_refused() -> None:
    quantized = make()[0].quantized
    with pytest.raises(BaseError, match=r"a bias of \(40,\) for a layer of 48 x 40"):
        QuantizedLinear(quantized, torch.zeros(40), torch.float32)
    with pytest.raises(BaseError, match=r"a pair of \(3, 48\) and \(40, 3\)"):
        QuantizedLinear(quantized, None, torch.float32, (torch.zeros(3, 48), torch.zeros(40, 3)))
