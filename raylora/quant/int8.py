"""INT8: 8-bit weights with outlier columns kept in 16 bits, through bitsandbytes (arXiv 2208.07339).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raylora.quant.base import DenseLayers, dense_weight
from raylora.spec import QuantizationSpec


class Spec(QuantizationSpec):
    """8-bit weights; activations are quantized row by row as they are multiplied."""

    kind: Literal["int8"] = "int8"
    threshold: float = 6.0
    """Activations beyond this stay in 16 bits."""


class Int8(DenseLayers):
    """A signed byte per weight and a float32 scale per row, the largest weight of the row."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """Return the codes and their scales."""
        import bitsandbytes.functional as F

        codes_OI, scales_O, _ = F.int8_vectorwise_quant(weight_OI.to(torch.float16))
        return {"weight": codes_OI, "SCB": scales_O}

    def bits_per_weight(self, shape: tuple[int, int], dense_bits: int) -> float:
        """Return 8 bits and the weight's share of its row's scale."""
        return 8 + 32 / shape[1]

    def dequantize(self, linear: Any) -> Tensor:
        """Return ``code * scale / 127``, O x I."""
        scales_O = getattr(linear.weight, "SCB", None)
        if scales_O is None and hasattr(linear, "state"):  # the first forward moves them there
            scales_O = linear.state.SCB
        if scales_O is None:
            return dense_weight(linear)
        return linear.weight.data.float() * scales_O.float()[:, None] / 127.0

    def from_tensors(
        self, shape: tuple[int, int], tensors: Mapping[str, Tensor], compute_dtype: torch.dtype
    ) -> nn.Module:
        """Return bitsandbytes' layer over these codes."""
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        codes_OI, bias = tensors["weight"], tensors.get("bias")
        linear = Linear8bitLt(
            shape[1], shape[0], bias is not None, has_fp16_weights=False, threshold=self.spec.threshold, device="meta"
        )
        linear.weight = Int8Params(codes_OI, requires_grad=False, CB=codes_OI, SCB=tensors["SCB"])
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear

    def held(self, linear: Any) -> dict[str, Tensor]:
        """Return codes, scales and bias."""
        if not hasattr(linear, "state"):
            return super().held(linear)
        scales_O = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
        return {"weight": linear.weight.data, "SCB": scales_O, **({} if linear.bias is None else {"bias": linear.bias})}

    def hold(self, linear: Any, tensors: Mapping[str, Tensor]) -> None:
        """Put them in place, where bitsandbytes has them after its first forward."""
        if not hasattr(linear, "state"):
            return super().hold(linear, tensors)
        linear.weight.data = linear.state.CB = tensors["weight"]
        linear.state.SCB, linear.weight.CB, linear.weight.SCB = tensors["SCB"], None, None
        if linear.bias is not None:
            linear.bias = nn.Parameter(tensors["bias"], requires_grad=False)

    def input_gradient(self, linear: Any, grad: Tensor) -> Tensor:
        """Return grad times the weight, as bitsandbytes rounds it."""
        if not hasattr(linear, "state"):
            return super().input_gradient(linear, grad)
        scales_O = linear.state.SCB
        weight_OI = linear.state.CB.to(grad.dtype, copy=True).mul_(scales_O.unsqueeze(1).mul(1.0 / 127.0))
        return torch.matmul(grad.reshape(-1, grad.shape[-1]).contiguous(), weight_OI).view(*grad.shape[:-1], -1)


def build(spec: Spec) -> Int8:
    """Return the quantizer for a spec."""
    return Int8(spec)
