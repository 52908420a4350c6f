"""The pairs of all quantized layers, tuned together through the whole model.

Shapes: B rows, T tokens, D the width between blocks, V vocabulary, O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raylora.engine.model.blocks import Block
from raylora.engine.quantization.block_activations import Stream
from raylora.engine.quantization.layer_solver import compact
from raylora.errors import BaseError, Interrupted
from raylora.init.rilq import Spec, discrepancy
from raylora.quant.linear import QuantizedLinear

Pairs = dict[str, tuple[Tensor, Tensor]]
"""A layer's name -> (A R x I, B O x R), as they are stored."""


def tune_pairs(
    model: Any, blocks: Sequence[Block], batches: Sequence[Mapping[str, Tensor]], reference: Stream, spec: Spec,
    is_causal: bool, should_stop: Callable[[], int] = lambda: 0,
) -> Pairs:
    """Return the pairs after so many steps of Adam, each on the next batch.

    Args:
        model: with quantized layers, whose pairs are where tuning starts; it has them again afterwards.
        reference: the same batches behind the last block of the full model.
        is_causal: whether the model gives logits of the next token.

    Raises:
        Interrupted: a signal came; tuning begins again next time.
        BaseError: the loss is not finite.
    """
    layers = {name: layer for block in blocks for name in block.linears
              if isinstance(layer := model.get_submodule(name), QuantizedLinear)}
    model.requires_grad_(False)
    tuned = {name: (nn.Parameter(_buffer(layer.pair_A_RI)), nn.Parameter(_buffer(layer.pair_B_OR)))
             for name, layer in layers.items()}
    optimizer = torch.optim.Adam([factor for pair in tuned.values() for factor in pair], lr=spec.lr)
    with torch.enable_grad(), _tunable(layers, tuned), _watching(blocks[-1].module) as seen:
        for step in range(spec.steps):
            number = should_stop()
            if number:
                raise Interrupted(f"stopped at step {step} of {spec.steps} in which pairs are tuned; the blocks are "
                                  "committed, and tuning begins again", signal_number=number)
            index = step % len(batches)
            optimizer.zero_grad()
            loss = _loss(model, batches[index], reference, index, seen, spec.lm_weight if is_causal else 0.0)
            if not bool(torch.isfinite(loss)):
                raise BaseError(f"base.compensation.lr: the loss of all pairs is {loss.item()} at step {step + 1}",
                                f"use less than {spec.lr:g}")
            loss.backward()
            optimizer.step()
    return {name: (compact(a_RI.detach()), compact(b_OR.detach())) for name, (a_RI, b_OR) in tuned.items()}


def _loss(
    model: Any, batch: Mapping[str, Tensor], reference: Stream, index: int, seen: list[Tensor], lm_weight: float
) -> Tensor:
    """Return the loss of one batch (arXiv 2412.01129, section 4)."""
    seen.clear()
    output = model(**batch, use_cache=False) if lm_weight else model(**batch)
    real_BT = reference.masks_BT[index]
    loss = (1 - lm_weight) * discrepancy(seen[0][real_BT], reference.hidden[index][real_BT])
    if lm_weight:
        real_BT = batch["attention_mask"][:, 1:].bool()
        logits_NV = output.logits[:, :-1][real_BT].float()
        loss = loss + lm_weight * F.cross_entropy(logits_NV, batch["input_ids"][:, 1:][real_BT])
    return loss


@contextmanager
def _tunable(
    layers: Mapping[str, QuantizedLinear], tuned: Mapping[str, tuple[nn.Parameter, nn.Parameter]]
) -> Iterator[None]:
    """Let layers multiply with pairs that have gradients, in place of their own."""
    own = {name: (layer.pair_A_RI, layer.pair_B_OR) for name, layer in layers.items()}
    handles = []
    try:
        for name, layer in layers.items():
            layer.pair_A_RI = layer.pair_B_OR = None
            handles.append(layer.register_forward_hook(_adding(*tuned[name], layer.compute_dtype)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.pair_A_RI, layer.pair_B_OR = own[name]


def _adding(a_RI: Tensor, b_OR: Tensor, dtype: torch.dtype) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def add(module: nn.Module, arguments: Any, y: Tensor) -> Tensor:
        x = arguments[0].to(dtype)
        return y + F.linear(F.linear(x, a_RI.to(dtype)), b_OR.to(dtype)).to(y.dtype)

    return add


@contextmanager
def _watching(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list into which a block's output is put, B x T x D, at each forward pass."""
    seen: list[Tensor] = []

    def note(block: nn.Module, arguments: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _buffer(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.detach().float().clone()
