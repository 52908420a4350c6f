"""A frozen linear layer that keeps its weight as codes, with an optional frozen low-rank pair beside them.

Shapes: O outputs, I inputs, R rank of the pair, G groups per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raylora.errors import BaseError
from raylora.quant.quantized import Quantized


class QuantizedLinear(nn.Linear):
    """y = x Q^T + (x A^T) B^T + bias, where Q exists only while it is multiplied with.

    It is an ``nn.Linear`` to whoever looks for one, but has no parameters, only buffers. Raise BaseError for a pair or
    bias that does not fit.
    """

    codes: Tensor
    scale_bits: Tensor
    """The float16 scales seen as int16: ``model.to(bfloat16)`` would round what looks like a float."""
    zeros: Tensor
    pair_A_RI: Tensor | None
    pair_B_OR: Tensor | None

    def __init__(
        self, quantized: Quantized, bias: Tensor | None, compute_dtype: torch.dtype,
        pair: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.out_features, self.in_features = quantized.shape
        self.bits, self.group_size, self.compute_dtype = quantized.bits, quantized.group_size, compute_dtype
        self._check_fit(bias, pair)
        self.register_buffer("codes", quantized.codes)
        self.register_buffer("scale_bits", quantized.scales_OG.view(torch.int16))
        self.register_buffer("zeros", quantized.zeros)
        a_RI, b_OR = pair if pair is not None else (None, None)
        for key, tensor in (("pair_A_RI", a_RI), ("pair_B_OR", b_OR), ("bias", bias)):
            self.register_buffer(key, None if tensor is None else tensor.detach().to(compute_dtype).contiguous())

    @property
    def quantized(self) -> Quantized:
        """The codes, wherever the layer is now."""
        shape = (self.out_features, self.in_features)
        scales_OG = self.scale_bits.view(torch.float16)
        return Quantized(self.bits, self.group_size, shape, self.codes, scales_OG, self.zeros)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The quantized weight in the compute type, WITHOUT the pair; dequantized anew each time it is asked for."""
        return self.quantized.dequantize(self.compute_dtype)

    def dense_weight(self) -> Tensor:
        """Return all that the layer multiplies with, Q + B A, O x I in float32."""
        weight_OI = self.quantized.dequantize()
        if self.pair_A_RI is not None and self.pair_B_OR is not None:
            weight_OI += self.pair_B_OR.float() @ self.pair_A_RI.float()
        return weight_OI

    @property
    def size_bytes(self) -> int:
        """What the layer's tensors take, pair and bias included."""
        return sum(tensor.nbytes for tensor in self.buffers())

    def forward(self, input: Tensor) -> Tensor:
        """Return y (... x O) in the input's type, computed in the compute type."""
        with torch.autocast(input.device.type, enabled=False):  # the compute type is this layer's own
            x = input.to(self.compute_dtype)
            y = _Multiply.apply(x, self)
            if self.bias is not None:
                y = y + self.bias.to(x.dtype)
            return y.to(input.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Return x Q^T + (x A^T) B^T for an input of the compute type."""
        y = F.linear(x, self.weight)
        if self.pair_A_RI is not None and self.pair_B_OR is not None:
            y = y + F.linear(F.linear(x, self.pair_A_RI.to(x.dtype)), self.pair_B_OR.to(x.dtype))
        return y

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Return g Q + (g B) A, the gradient of :meth:`product` for its input."""
        found = grad @ self.weight
        if self.pair_A_RI is not None and self.pair_B_OR is not None:
            found = found + (grad @ self.pair_B_OR.to(grad.dtype)) @ self.pair_A_RI.to(grad.dtype)
        return found

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        rank = 0 if self.pair_A_RI is None else len(self.pair_A_RI)
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}, pair_rank={rank}"

    def _check_fit(self, bias: Tensor | None, pair: tuple[Tensor, Tensor] | None) -> None:
        shape = f"{self.out_features} x {self.in_features}"
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise BaseError(f"a bias of {tuple(bias.shape)} for a layer of {shape}")
        if pair is not None:
            (rank, inputs), (outputs, rank_B) = pair[0].shape, pair[1].shape
            if (outputs, inputs, rank_B) != (self.out_features, self.in_features, rank):
                raise BaseError(f"a pair of {tuple(pair[0].shape)} and {tuple(pair[1].shape)} for a layer of {shape}")


class _Multiply(torch.autograd.Function):
    """The product, with no gradient to Q, which is dequantized again in the backward pass rather than kept until then.

    F.linear would keep the dense weight of every layer alive from its forward to its backward pass: the very memory
    that quantizing saves.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_gradient(grads[0]), None
