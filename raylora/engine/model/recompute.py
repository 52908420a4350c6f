"""Blocks that are run again in the backward pass, instead of keeping their activations until then.

What is kept is each block's input: memory for about a third more time (Chen et al., arXiv 1604.06174). Nothing that a
block does is random but the adapters' dropout, which is drawn from seeds, so that the second run is the first, bit for
bit. Whoever takes gradients keeps the pack in the slot until they are there: the second run reads it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raylora.engine.model.blocks import find_blocks


def recompute_blocks(model: nn.Module) -> None:
    """Have a model's blocks run again in every backward pass from now on.

    A block's hooks are left alone: a split base gathers it before its backward pass, and so before its second run.

    Raises:
        BaseError: it is not a chain of blocks.
    """
    for block in find_blocks(model):
        block.module.forward = _again(block.module.forward)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*positional: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*positional, **named)
        return checkpoint(forward, *positional, use_reentrant=False, preserve_rng_state=False, **named)

    return run
