"""What a quantizer answers: how a base is loaded with it, what its weights take and lie as, and what they stand for.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from raylora.quant.gram import Factor
from raylora.quant.quantized import Quantized


class Quantizer(Protocol):
    """How the weights of a base are stored."""

    def loading_config(self, compute_dtype: torch.dtype | str, skip_modules: list[str]) -> Any:
        """Return the quantization config that ``from_pretrained`` takes, or None for weights as they are."""

    def bits_per_weight(self, shape: tuple[int, int], dense_bits: int) -> float:
        """Return what a loaded O x I layer takes for each weight, scales and tables included.

        ``dense_bits`` are those of a weight in the compute type.
        """

    def dequantize(self, linear: nn.Module) -> Tensor:
        """Return what a loaded linear layer multiplies by, O x I; layers that were left as they are too."""

    def to_tensors(self, linear: nn.Module) -> dict[str, Tensor] | None:
        """Return all that a loaded layer is made of, or None for one that was left as it is."""

    def from_tensors(
        self, shape: tuple[int, int], tensors: Mapping[str, Tensor], compute_dtype: torch.dtype
    ) -> nn.Module:
        """Return an O x I layer over what :meth:`to_tensors` gave, wherever it lies now; nothing is copied."""


@runtime_checkable
class PreparedQuantizer(Quantizer, Protocol):
    """A quantizer whose layers are made once per base, before it is loaded."""

    def quantize(self, weight_OI: Tensor, factor: Factor | None, name: str) -> Quantized:
        """Return the codes of a weight; ``factor`` is what calibration knows of its inputs. Raises: BaseError."""


def dense_weight(linear: Any) -> Tensor:
    """Return the weight of a layer that is not quantized, O x I, also where it is stored the other way round."""
    return linear.weight.data if isinstance(linear, nn.Linear) else linear.weight.data.T
