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

    def encode(self, weight_OI: Tensor) -> dict[str, Tensor] | None:
        """Return what a layer with this weight is made of, or None to leave it as it is.

        The prepared kinds leave all layers: theirs are made beforehand.
        """

    def bits_per_weight(self, shape: tuple[int, int], dense_bits: int) -> float:
        """Return what a loaded O x I layer takes for each weight, scales and tables included.

        ``dense_bits`` are those of a weight in the compute type.
        """

    def dequantize(self, linear: nn.Module) -> Tensor:
        """Return what a loaded linear layer multiplies by, O x I; layers that were left as they are too."""

    def from_tensors(
        self, shape: tuple[int, int], tensors: Mapping[str, Tensor], compute_dtype: torch.dtype
    ) -> nn.Module:
        """Return an O x I layer over what it is made of, wherever that lies now; nothing is copied.

        That is what :meth:`encode` gave or, for the prepared kinds, ``Quantized.to_tensors`` with ``pair_A`` and
        ``pair_B``; ``bias`` is beside it where there is one.
        """


    # --- for layers whose tensors come and go, in a base that is split over several ranks ---------------
    def held(self, linear: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a loaded layer that can be taken away between two passes."""

    def hold(self, linear: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Give a layer the tensors that it computes with, as :meth:`held` named them."""

    def input_gradient(self, linear: nn.Module, grad: Tensor) -> Tensor:
        """Return the gradient (... x I) of a layer's input from that of its output (... x O).

        Bit for bit it is what autograd gives for the layer's own forward pass.
        """


@runtime_checkable
class PreparedQuantizer(Quantizer, Protocol):
    """A quantizer whose layers are made once per base, before it is loaded."""

    def quantize(self, weight_OI: Tensor, factor: Factor | None, name: str) -> Quantized:
        """Return the codes of a weight; ``factor`` is what calibration knows of its inputs. Raises: BaseError."""


class DenseLayers:
    """What all quantizers do with layers that are left as they are."""

    def held(self, linear: Any) -> dict[str, Tensor]:
        """Return weight and bias."""
        return {"weight": linear.weight, **({} if linear.bias is None else {"bias": linear.bias})}

    def hold(self, linear: Any, tensors: Mapping[str, Tensor]) -> None:
        """Put weight and bias in place."""
        for name, tensor in tensors.items():
            setattr(linear, name, nn.Parameter(tensor, requires_grad=False))

    def input_gradient(self, linear: Any, grad: Tensor) -> Tensor:
        """Return grad times the weight."""
        return grad.matmul(dense_weight(linear))


def dense_weight(linear: Any) -> Tensor:
    """Return the weight of a layer that is not quantized, O x I, also where it is stored the other way round."""
    return linear.weight.data if isinstance(linear, nn.Linear) else linear.weight.data.T
