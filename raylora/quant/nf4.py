"""NF4: 4-bit NormalFloat weights through bitsandbytes (QLoRA, arXiv 2305.14314, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raylora.quant.base import DenseLayers, dense_weight
from raylora.spec import QuantizationSpec

_BLOCK, _OUTER_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one of their own."""


class Spec(QuantizationSpec):
    """4-bit weights, dequantized as they are multiplied; works on CPU and GPU."""

    kind: Literal["nf4"] = "nf4"
    double_quant: bool = True
    """Quantize the block scales too: 0.37 bits less per weight."""


class NF4(DenseLayers):
    """Two codes a byte, and a scale per block of 64 weights."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """Return the packed codes and, by bitsandbytes' own names, the scales, tables and facts beside them."""
        import bitsandbytes.functional as F

        codes, state = F.quantize_4bit(
            weight_OI, blocksize=_BLOCK, compress_statistics=self.spec.double_quant, quant_type="nf4",
            quant_storage=torch.uint8,
        )
        return {"weight": codes, **state.as_dict(packed=True)}

    def bits_per_weight(self, shape: tuple[int, int], dense_bits: int) -> float:
        """Return 4 bits, the weight's share of the scales, and of the tables that every layer holds for itself."""
        weights = shape[0] * shape[1]
        blocks = -(-weights // _BLOCK)
        table_bits = 16 * 32  # what the 16 codes stand for
        if not self.spec.double_quant:
            return 4 + (32 * blocks + table_bits) / weights
        outer_bits = 32 * -(-blocks // _OUTER_BLOCK) + 256 * 32 + 32  # their scales, their table and their mean
        return 4 + (8 * blocks + outer_bits + table_bits) / weights

    def dequantize(self, linear: Any) -> Tensor:
        """Return what the codes stand for, O x I."""
        state = getattr(linear.weight, "quant_state", None)
        if state is None:
            return dense_weight(linear)
        import bitsandbytes.functional as F

        return F.dequantize_4bit(linear.weight.data, state)

    def from_tensors(
        self, shape: tuple[int, int], tensors: Mapping[str, Tensor], compute_dtype: torch.dtype
    ) -> nn.Module:
        """Return bitsandbytes' layer over these codes."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        codes, bias = tensors["weight"], tensors.get("bias")
        beside = {key: tensor for key, tensor in tensors.items() if key not in ("weight", "bias")}
        linear = Linear4bit(
            shape[1], shape[0], bias is not None, compute_dtype, compress_statistics=self.spec.double_quant,
            quant_type="nf4", quant_storage=torch.uint8, device="meta",
        )
        linear.weight = Params4bit.from_prequantized(codes, beside, device=codes.device, module=linear)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear.train()  # in eval mode it would be repacked for a CPU kernel that has no backward pass

    def held(self, linear: Any) -> dict[str, Tensor]:
        """Return codes, scales and bias; the tables are too small to be worth it."""
        state = getattr(linear.weight, "quant_state", None)
        if state is None:
            return super().held(linear)
        outer = {"outer_absmax": state.state2.absmax} if state.nested else {}
        bias = {} if linear.bias is None else {"bias": linear.bias}
        return {"weight": linear.weight.data, "absmax": state.absmax, **outer, **bias}

    def hold(self, linear: Any, tensors: Mapping[str, Tensor]) -> None:
        """Put them in place."""
        state = getattr(linear.weight, "quant_state", None)
        if state is None:
            return super().hold(linear, tensors)
        linear.weight.data, state.absmax = tensors["weight"], tensors["absmax"]
        state.code = state.code.to(state.absmax.device)
        if state.nested:
            state.offset, state.state2.code = (t.to(state.absmax.device) for t in (state.offset, state.state2.code))
            state.state2.absmax = tensors["outer_absmax"]
        if linear.bias is not None:
            linear.bias = nn.Parameter(tensors["bias"], requires_grad=False)

    def input_gradient(self, linear: Any, grad: Tensor) -> Tensor:
        """Return grad times the weight."""
        if getattr(linear.weight, "quant_state", None) is None:
            return super().input_gradient(linear, grad)
        grad = grad.to(linear.compute_dtype)
        return torch.matmul(grad, self.dequantize(linear).to(grad.dtype))


def build(spec: Spec) -> NF4:
    """Return the quantizer for a spec."""
    return NF4(spec)


def logical_size(parameter: nn.Parameter) -> int:
    """Return how many weights a parameter stands for, counted before two of them were packed into a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()
