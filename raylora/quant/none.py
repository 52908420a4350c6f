"""The base as it comes: weights in the compute type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from raylora.quant.base import DenseLayers, dense_weight
from raylora.spec import QuantizationSpec


class Spec(QuantizationSpec):
    """No quantization."""

    is_dense: ClassVar[bool] = True

    kind: Literal["none"] = "none"


class Dense(DenseLayers):
    """Weights in the compute type."""

    def encode(self, weight_OI: Tensor) -> None:
        """Return None: every layer is left as it is."""
        return None

    def bits_per_weight(self, shape: tuple[int, int], dense_bits: int) -> float:
        """Return the compute type's bits."""
        return float(dense_bits)

    def dequantize(self, linear: nn.Module) -> Tensor:
        """Return the weight, O x I."""
        return dense_weight(linear)

    def from_tensors(
        self, shape: tuple[int, int], tensors: Mapping[str, Tensor], compute_dtype: torch.dtype
    ) -> nn.Module:
        """Never called: no layer has been taken apart."""
        raise AssertionError("a dense layer is not taken apart")


def build(spec: Spec) -> Dense:
    """Return the quantizer for a spec."""
    return Dense()
