"""A frozen linear layer whose tensors may be elsewhere between its forward and its backward pass.

Where a base is split over several ranks, a layer is whole only while it is passed. So it may keep nothing between
passes: autograd would keep every weight of the model alive from the forward pass to the backward one. This layer asks
for its tensors anew in each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raylora.quant.base import Quantizer


class SplitLinear(nn.Module):
    """Computes what a frozen layer computes, bit for bit, from parameters that others may take away and bring back."""

    def __init__(self, linear: nn.Module, quantizer: Quantizer) -> None:
        """Take a layer's tensors over; the layer itself is empty from now on while nobody passes it."""
        super().__init__()
        self.quantizer = quantizer
        self._inner = [linear]  # in a list: it is no submodule, or its tensors would be found twice
        self._names = []
        for name, tensor in quantizer.held(linear).items():
            parameter = tensor if type(tensor) is nn.Parameter else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, parameter)  # a tied one stays the same parameter
            self._names.append(name)
        self.emptied()

    def filled(self) -> nn.Module:
        """Return the layer with its tensors, as they lie now."""
        self.quantizer.hold(self._inner[0], {name: getattr(self, name).data for name in self._names})
        return self._inner[0]

    def emptied(self) -> None:
        """Let the layer go of its tensors."""
        self.quantizer.hold(
            self._inner[0], {name: torch.empty(0, dtype=getattr(self, name).dtype) for name in self._names}
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return what the layer makes of an input (... x I)."""
        return _Pass.apply(input, self)


class _Pass(torch.autograd.Function):
    """y = layer(x), with no gradient to anything but x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: SplitLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        try:
            return layer.filled()(x)
        finally:
            layer.emptied()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        layer: SplitLinear = ctx.layer
        try:
            return layer.quantizer.input_gradient(layer.filled(), grads[0]).to(ctx.dtype), None
        finally:
            layer.emptied()
