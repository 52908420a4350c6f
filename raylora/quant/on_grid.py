"""What the quantizers have in common that put weights on an evenly spaced grid: their layers are QuantizedLinear.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from raylora.quant.base import DenseLayers, dense_weight
from raylora.quant.grid import group_count
from raylora.quant.linear import QuantizedLinear
from raylora.quant.packing import packed_bytes
from raylora.quant.quantized import Quantized
from raylora.spec import GridSpec

AnyGridSpec = TypeVar("AnyGridSpec", bound=GridSpec)


class OnGrid(DenseLayers, Generic[AnyGridSpec]):
    """All of a prepared quantizer but how it rounds."""

    def __init__(self, spec: AnyGridSpec) -> None:
        self.spec = spec

    def encode(self, weight_OI: Tensor) -> None:
        """Return None: the layers are made beforehand."""
        return None

    def bits_per_weight(self, shape: tuple[int, int], dense_bits: int) -> float:
        """Return the weight's share of the packed codes and of its group's float16 scale and zero point."""
        outputs, inputs = shape
        grids = outputs * group_count(inputs, self.spec.group_of(inputs))
        size_bytes = outputs * packed_bytes(inputs, self.spec.bits) + 2 * grids + packed_bytes(grids, self.spec.bits)
        return 8 * size_bytes / (outputs * inputs)

    def dequantize(self, linear: nn.Module) -> Tensor:
        """Return Q + B A, O x I in float32: the base multiplies by a frozen pair as well."""
        return linear.dense_weight() if isinstance(linear, QuantizedLinear) else dense_weight(linear)

    def from_tensors(
        self, shape: tuple[int, int], tensors: Mapping[str, Tensor], compute_dtype: torch.dtype
    ) -> QuantizedLinear:
        """Return the layer over codes, scales and zero points, with pair and bias where there are any."""
        quantized = Quantized.from_tensors(tensors, self.spec.bits, self.spec.group_of(shape[1]), shape)
        pair = (tensors["pair_A"], tensors["pair_B"]) if "pair_A" in tensors else None
        return QuantizedLinear(quantized, tensors.get("bias"), compute_dtype, pair)

    def held(self, linear: Any) -> dict[str, Tensor]:
        """Return codes, scales (as bytes: no collective knows float16's neighbor int16), zero points, pair and bias."""
        if not isinstance(linear, QuantizedLinear):
            return super().held(linear)
        found = {**dict(linear.named_buffers()), "scale_bits": linear.scale_bits.view(torch.uint8)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def hold(self, linear: Any, tensors: Mapping[str, Tensor]) -> None:
        """Put them in place."""
        if not isinstance(linear, QuantizedLinear):
            return super().hold(linear, tensors)
        for name, tensor in tensors.items():
            setattr(linear, name, tensor.view(torch.int16) if name == "scale_bits" else tensor)

    def input_gradient(self, linear: Any, grad: Tensor) -> Tensor:
        """Return grad times Q, and times B and A where there is a pair."""
        if not isinstance(linear, QuantizedLinear):
            return super().input_gradient(linear, grad)
        return linear.input_gradient(grad.to(linear.compute_dtype))
