"""The frozen output layer passed in parts of the vocabulary, so that the whole of its table is needed nowhere at once.

Of some positions the logits over all parts are there; of the table one part after another, once for the logits and once
for the gradient of the hidden states. So the table may lie apart, a share of each part on every rank of a gang. Where a
part begins depends on the model alone, and each is multiplied in the same way wherever it lies: what comes out is
bit-equal for a base that is split, over however many ranks, and for one that is not. The layer in one piece gives other
last bits, because here the gradient is summed part by part.

Shapes: V vocabulary, D hidden width, N positions, R rows of a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylora.adapters.base import is_linear
from raylora.engine.model.blocks import find_blocks
from raylora.engine.model.gang import Gang
from raylora.engine.model.split_table import SplitLookup, SplitTable
from raylora.errors import BaseError
from raylora.placement.estimate import output_part_rows
from raylora.quant.base import Quantizer


class OutputInParts(nn.Module):
    """Computes what a frozen output layer computes, to float tolerance, from some rows of its table at a time."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        """Take a layer's tensors over, so many rows to a part; a tied table stays the same parameter."""
        super().__init__()
        self.vocabulary, self.width, self.rows = *linear.weight.shape, rows
        self.weight, self.bias = linear.weight, linear.bias
        self.table: SplitTable | None = None
        """Where the rows are in a base that is split; else they are the weight's."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits (... x V) of states (... x D), as a part of the model's own forward; of none, none."""
        if not hidden.numel():
            return hidden.new_empty(*hidden.shape[:-1], self.vocabulary)
        with self.visit():
            return self.product(hidden)

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Ask for products within, any number of times; of a split base this is a part of every pass of every rank.

        It ends when no rank has anything left to ask.
        """
        if self.table is not None:
            self.table.enter()
        yield
        if self.table is not None:
            self.table.leave()

    def product(self, hidden: Tensor) -> Tensor:
        """Return the logits (... x V) of states (... x D), within a visit."""
        return _Product.apply(hidden, self)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield which rows come next, and the rows, R x D, which are there until the next are asked for."""
        if self.table is not None:
            yield from self.table.parts()
            return
        for first in range(0, self.vocabulary, self.rows):
            chosen = slice(first, min(first + self.rows, self.vocabulary))
            yield chosen, self.weight.data[chosen]

    def split_over(self, gang: Gang, device: torch.device) -> SplitTable:
        """Leave every rank its share of each part and return where they are; all ranks do this together."""
        self.table = table = SplitTable(self.weight.data, self.rows, gang, device)
        del self.weight
        if self.bias is not None:  # a number per row: every rank has all
            bias_V = self.bias.data.to(device, copy=True)
            table.from_first_rank(bias_V)
            del self.bias
            self.register_buffer("bias", bias_V, persistent=False)
        return table

    def as_linear(self) -> nn.Linear:
        """Return a layer in one piece over the same tensors, where the base is not split."""
        linear = nn.Linear(self.width, self.vocabulary, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.eval()


class _Product(torch.autograd.Function):
    """logits = states W^T + bias, with a gradient for the states alone."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: OutputInParts) -> Tensor:
        ctx.layer, ctx.shape = layer, states.shape
        states_ND = states.reshape(-1, layer.width)
        logits_NV = states_ND.new_empty(len(states_ND), layer.vocabulary)
        for chosen, part_RD in layer.parts():
            bias_R = None if layer.bias is None else layer.bias[chosen]
            logits_NV[:, chosen] = F.linear(states_ND, part_RD, bias_R)
        return logits_NV.view(*states.shape[:-1], layer.vocabulary)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        layer: OutputInParts = ctx.layer
        grad_NV = grads[0].reshape(-1, layer.vocabulary)
        # In float32 at least: of a sum of dozens of parts bfloat16 would lose more than of a single product.
        found_ND = grad_NV.new_zeros(
            len(grad_NV), layer.width, dtype=torch.promote_types(grad_NV.dtype, torch.float32)
        )
        for chosen, part_RD in layer.parts():
            found_ND += grad_NV[:, chosen] @ part_RD
        return found_ND.to(grad_NV.dtype).view(ctx.shape), None


def part_rows_of(model: Any, quantizer: Quantizer) -> int:
    """Return the rows of a part of a loaded model's output layer, before adapters are attached.

    Raises:
        BaseError: it has no output layer that is one dense linear layer.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or type(layer).__name__ not in ("Linear", "NonDynamicallyQuantizableLinear"):
        raise BaseError(
            f"placement.output_layer: parts: {type(model).__name__} has no output layer that is one dense linear layer",
            "use placement.output_layer whole",
        )
    weight_VD = layer.weight
    return output_part_rows(len(weight_VD), weight_VD.nbytes // len(weight_VD), _largest_block_bytes(model, quantizer))


def pass_in_parts(model: Any, rows: int) -> None:
    """Put a layer that is passed in parts of so many rows in the place of a model's output layer."""
    layer = model.get_output_embeddings()
    _replace(model, layer, OutputInParts(layer, rows).eval())


def split_output(model: Any, gang: Gang, device: torch.device) -> None:
    """Split an output layer that is passed in parts over a gang, and the input embedding if it is the same table.

    All ranks do this together. Any other output layer is left alone.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, OutputInParts):
        return
    weight = layer.weight
    holders = [m for m in model.modules() if m is not layer and any(p is weight for p in m._parameters.values())]
    for holder in holders:
        if not isinstance(holder, nn.Embedding) or holder.max_norm is not None:
            raise BaseError(
                f"placement.output_layer: parts: a {type(holder).__name__} of {type(model).__name__} has the same "
                "table as its output layer, and needs it whole", "use placement.output_layer whole",
            )
    table = layer.split_over(gang, device)
    for holder in holders:
        _replace(model, holder, SplitLookup(holder, table, device).eval())


def _largest_block_bytes(model: nn.Module, quantizer: Quantizer) -> int:
    """Return what the largest block takes as it is stored; of a model without a chain of blocks, all of it."""
    try:
        blocks = [block.module for block in find_blocks(model)]
    except BaseError:
        blocks = [model]
    return max(_stored_bytes(block, quantizer) for block in blocks)


def _stored_bytes(block: nn.Module, quantizer: Quantizer) -> int:
    linears = [module for module in block.modules() if is_linear(module)]
    within = {id(p) for linear in linears for p in linear.parameters()}
    return sum(tensor.nbytes for linear in linears for tensor in quantizer.held(linear).values()) + sum(
        p.nbytes for p in block.parameters() if id(p) not in within
    )


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module into every place where another is."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
