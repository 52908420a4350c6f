"""INT8: 8-bit weights with outlier columns kept in 16 bits, through bitsandbytes (arXiv 2208.07339).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raylora.quant.base import dense_weight
from raylora.spec import QuantizationSpec


class Spec(QuantizationSpec):
    """8-bit weights; activations are quantized row by row as they are multiplied."""

    kind: Literal["int8"] = "int8"
    threshold: float = 6.0
    """Activations beyond this stay in 16 bits."""


class Int8:
    """A signed byte per weight and a float32 scale per row, the largest weight of the row."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def loading_config(self, compute_dtype: torch.dtype | str, skip_modules: list[str]) -> Any:
        """Return the quantization config that ``from_pretrained`` takes."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=self.spec.threshold, llm_int8_skip_modules=skip_modules
        )

    def bits_per_weight(self, shape: tuple[int, int], dense_bits: int) -> float:
        """Return 8 bits and the weight's share of its row's scale."""
        return 8 + 32 / shape[1]

    def dequantize(self, linear: Any) -> Tensor:
        """Return ``code * scale / 127``, O x I."""
        scales_O = _scales(linear)
        if scales_O is None:
            return dense_weight(linear)
        return linear.weight.data.float() * scales_O.float()[:, None] / 127.0

    def to_tensors(self, linear: Any) -> dict[str, Tensor] | None:
        """Return the codes and their scales."""
        scales_O = _scales(linear)
        if scales_O is None:
            return None
        bias = {} if linear.bias is None else {"bias": linear.bias}
        return {"weight": linear.weight.data, "SCB": scales_O, **bias}

    def from_tensors(
        self, shape: tuple[int, int], tensors: Mapping[str, Tensor], compute_dtype: torch.dtype
    ) -> nn.Module:
        """Return the layer that multiplies by them."""
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        codes_OI, bias = tensors["weight"], tensors.get("bias")
        linear = Linear8bitLt(
            shape[1], shape[0], bias is not None, has_fp16_weights=False, threshold=self.spec.threshold, device="meta"
        )
        linear.weight = Int8Params(codes_OI, requires_grad=False, CB=codes_OI, SCB=tensors["SCB"])
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear


def _scales(linear: Any) -> Tensor | None:
    """Return a quantized layer's scales, wherever bitsandbytes keeps them; the first forward moves them."""
    scales_O = getattr(linear.weight, "SCB", None)
    if scales_O is None and hasattr(linear, "state"):
        scales_O = linear.state.SCB
    return scales_O


def build(spec: Spec) -> Int8:
    """Return the quantizer for a spec."""
    return Int8(spec)
