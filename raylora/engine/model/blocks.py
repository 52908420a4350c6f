"""A model's transformer blocks: the chain that calibration walks, and that adapters stand in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from raylora.adapters.base import is_linear
from raylora.errors import BaseError


@dataclass(frozen=True)
class Block:
    """One transformer block and its linear layers."""

    name: str
    module: nn.Module
    linears: tuple[str, ...]
    """Full names, in the model's order."""


class Enough(Exception):
    """Raised inside a forward pass when all that was wanted from it has been seen."""


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the model's transformer blocks: the longest list of like modules that hold linear layers.

    Raises:
        BaseError: there is none, as in a model that is not a chain of blocks.
    """
    lists = [
        (name, module) for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_linears(child) for child in module)
        and len({type(child) for child in module}) == 1
    ]
    if not lists:
        raise BaseError(
            f"base.source: {type(model).__name__} is not a chain of blocks, which calibration needs",
            "use quantization nf4, int8 or none for it",
        )
    # The outermost: the experts of one block may be more than the blocks are.
    name, blocks = min(lists, key=lambda found: (found[0].count("."), -len(found[1])))
    return [
        Block(f"{name}.{index}", module, tuple(f"{name}.{index}.{inner}" for inner in _linears(module)))
        for index, module in enumerate(blocks)
    ]


def base_linears(model: nn.Module) -> list[str]:
    """Return the linear layers that are prepared: all within the blocks, and none beside them."""
    return [name for block in find_blocks(model) for name in block.linears]


@contextmanager
def standing_in(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Have a function in the place of some modules' forward; they are themselves again afterwards."""
    own = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            if before is None:
                del module.forward
            else:  # what accelerate or others have put there
                module.forward = before


def _linears(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if name and is_linear(child)]
