"""NF4: 4-bit NormalFloat weights through bitsandbytes (QLoRA, arXiv 2305.14314, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raylora.quant.base import dense_weight
from raylora.spec import QuantizationSpec

_BLOCK, _OUTER_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one of their own."""


class Spec(QuantizationSpec):
    """4-bit weights, dequantized as they are multiplied; works on CPU and GPU."""

    kind: Literal["nf4"] = "nf4"
    double_quant: bool = True
    """Quantize the block scales too: 0.37 bits less per weight."""


class NF4:
    """Two codes a byte, and a scale per block of 64 weights."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def loading_config(self, compute_dtype: torch.dtype | str, skip_modules: list[str]) -> Any:
        """Return the quantization config that ``from_pretrained`` takes."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.spec.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage="uint8",
            llm_int8_skip_modules=skip_modules,
        )

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

    def to_tensors(self, linear: Any) -> dict[str, Tensor] | None:
        """Return the packed codes and, by bitsandbytes' own names, the scales, tables and facts beside them."""
        state = getattr(linear.weight, "quant_state", None)
        if state is None:
            return None
        bias = {} if linear.bias is None else {"bias": linear.bias}
        return {"weight": linear.weight.data, **state.as_dict(packed=True), **bias}

    def from_tensors(
        self, shape: tuple[int, int], tensors: Mapping[str, Tensor], compute_dtype: torch.dtype
    ) -> nn.Module:
        """Return the layer that multiplies by them."""
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


def build(spec: Spec) -> NF4:
    """Return the quantizer for a spec."""
    return NF4(spec)


def logical_size(parameter: nn.Parameter) -> int:
    """Return how many weights a parameter stands for, counted before two of them were packed into a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()
