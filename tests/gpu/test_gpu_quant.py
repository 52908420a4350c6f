"""Dequantizing with Triton against torch's own operations, and a quantized layer on a GPU."""

from __future__ import annotations

import pytest
import torch

from raylora.init.cloq import cloq
from raylora.quant import kernels
from raylora.quant.gram import Factor, Gram
from raylora.quant.linear import QuantizedLinear
from raylora.quant.magr import magr
from raylora.quant.optq import optq
from raylora.quant.rtn import round_to_nearest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "group_size"), [((48, 40), 8), ((5, 37), 10), ((64, 1536), 64), ((7, 600), 600)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_triton_agrees_bit_by_bit(bits: int, shape: tuple[int, int], group_size: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="torch's CUDA build brings Triton")
    from raylora.quant import triton_kernels

    quantized = round_to_nearest(torch.randn(shape, device="cuda"), bits, group_size)
    tensors = (quantized.codes, quantized.scales_OG, quantized.zeros, bits, group_size, shape, dtype)
    expected_OI = kernels.dequantize_plain(*tensors)
    assert torch.equal(triton_kernels.dequantize(*tensors), expected_OI)
    assert torch.equal(quantized.dequantize(dtype), expected_OI)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_layer_moved_to_a_gpu_computes_the_same(bits: int) -> None:
    pair = (torch.randn(3, 40), torch.randn(48, 3))
    layer = QuantizedLinear(round_to_nearest(torch.randn(48, 40), bits, 8), torch.randn(48), torch.float32, pair)
    x = torch.randn(5, 40, requires_grad=True)
    expected = layer(x)
    expected.sum().backward()
    on_gpu = x.detach().cuda().requires_grad_()
    y = layer.cuda()(on_gpu)
    y.sum().backward()
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(on_gpu.grad.cpu(), x.grad, rtol=1e-3, atol=1e-3)


def test_the_numerics_on_a_gpu_agree_with_the_cpu() -> None:
    x_NI, weight_OI, left = torch.randn(200, 40), torch.randn(48, 40), {}
    for device in ("cpu", "cuda"):
        streamed = Gram(40, device)
        streamed.add(x_NI.to(device))
        gram_II, here_OI = streamed.matrix_II, weight_OI.to(device)
        quantized = optq(magr(here_OI, gram_II, 8), Factor(gram_II), 3, 8)
        residual_OI = here_OI - quantized.dequantize()
        a_RI, b_OR = cloq(residual_OI, gram_II, 4)
        both = (residual_OI, residual_OI - b_OR @ a_RI)
        left[device] = [float(torch.linalg.norm(x_NI.to(device) @ each_OI.T)) for each_OI in both]
    assert left["cuda"] == pytest.approx(left["cpu"], rel=0.05)
