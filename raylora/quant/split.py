"""Frozen layers whose tensors may be elsewhere between two passes, or between a forward pass and its backward one.

Where a base is split over several ranks, a layer is whole only while it is passed. So it may keep nothing between
passes: autograd would keep every weight of the model alive from the forward pass to the backward one. A linear layer
asks for its tensors anew in each, and a table is passed part by part, so that it is never whole anywhere.
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


class SplitEmbedding(nn.Module):
    """Looks up what a frozen table holds, bit for bit, in one part of its rows after another."""

    def __init__(self, table_VD: Tensor, rows: int) -> None:
        """Take a table over, so many rows to a part."""
        super().__init__()
        self.width, self.dtype, self.parts = table_VD.shape[1], table_VD.dtype, range(0, len(table_VD), rows)
        for first in self.parts:  # not in a list of modules: the longest of those is the model's blocks
            self.add_module(f"from_{first}", _Rows(table_VD[first : first + rows], first))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of some ids (...), ... x D."""
        found = torch.empty((*ids.shape, self.width), dtype=self.dtype, device=ids.device)
        for first in self.parts:
            here, rows_ND = getattr(self, f"from_{first}")(ids)
            found[here] = rows_ND
        return found


class _Rows(nn.Module):
    """Some rows of a table, as bytes: what is counted of a split base are bytes, too."""

    def __init__(self, rows_RD: Tensor, first: int) -> None:
        super().__init__()
        self.first, self.dtype = first, rows_RD.dtype
        self.bytes_RB = nn.Parameter(rows_RD.detach().view(torch.uint8), requires_grad=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows_RD = self.bytes_RB.view(self.dtype)
        here = (ids >= self.first) & (ids < self.first + len(rows_RD))
        return here, rows_RD[ids[here] - self.first]
