"""A model as a chain of blocks: calibration runs through them one after another, never through the whole model at once.

Shapes: B rows of a batch, T tokens, D the width between blocks, N = real tokens of a batch, I inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raylora.engine.model.blocks import Block, Enough
from raylora.errors import BaseError

_HIDDEN = "hidden_states"


@dataclass
class Stream:
    """Where calibration stands: every batch's activations before one block, and what else that block is given.

    Only one block's activations exist at a time; running a block replaces them.
    """

    hidden: list[Tensor]
    """Per batch, B x T x D."""
    arguments: list[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]]
    """Per batch, by block name: the positional and keyword arguments after the activations."""
    masks_BT: list[Tensor]
    """Per batch, true where a token is real."""
    tokens: int = 0


@torch.no_grad()
def open_stream(
    model: nn.Module, blocks: Sequence[Block], batches: Sequence[Mapping[str, Tensor]], dtype: torch.dtype
) -> Stream:
    """Run everything before the first block and return the activations that it would read, in ``dtype``.

    The first batch goes through the whole model, to see whether every block gets the same masks and positions. Most
    models say so; where they differ (sliding and full attention in turn), every batch goes through once.
    """
    stream = Stream([], [], [])
    kept = _Kept()
    alike = False
    for index, batch in enumerate(batches):
        seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        first: list[Tensor] = []
        wanted = blocks if not alike else blocks[:1]
        with _watching(wanted, seen, first, stop=alike):
            model(**batch, **({"use_cache": False} if _caches(model) else {}))
        if index == 0:
            alike = all(_same(seen[block.name], seen[blocks[0].name]) for block in blocks)
        own = {name: kept.cast(arguments, dtype) for name, arguments in seen.items()}
        stream.arguments.append({block.name: own[blocks[0].name if alike else block.name] for block in blocks})
        stream.hidden.append(first[0].to(dtype))
        mask_BT = batch["attention_mask"].bool()
        stream.masks_BT.append(mask_BT)
        stream.tokens += int(mask_BT.sum())
    return stream


@torch.no_grad()
def advance(block: Block, stream: Stream) -> None:
    """Replace the activations before a block by those after it."""
    for index in range(len(stream.hidden)):
        stream.hidden[index] = _run(block, stream, index)


@torch.no_grad()
def observe(
    block: Block, stream: Stream, take: Callable[[tuple[str, ...], Tensor, Tensor | None], None],
    reference: Stream | None = None,
) -> list[tuple[str, ...]]:
    """Run a block once over all batches, and hand on what its linears read.

    Linears that are given one and the same tensor (query, key and value; gate and up) are a group and are handed on
    together.

    Args:
        take: called with a group's names, its real tokens, N x I, and what the same tokens are in the reference.
        reference: where the same batches stand in the full model.

    Returns:
        The groups, in the order they are computed.
    """
    groups: list[tuple[str, ...]] = []
    for index in range(len(stream.hidden)):
        inputs = _inputs(block, stream, index)
        others = [None] * len(inputs) if reference is None else [x for x, _ in _inputs(block, reference, index)]
        found = [tuple(names) for _, names in inputs]
        if groups and found != groups:
            raise BaseError(
                f"base.source: {block.name} routes its tokens differently from batch to batch",
                "a mixture of experts is not calibrated yet: use quantization nf4, int8 or none",
            )
        groups = found
        mask_N = stream.masks_BT[index].flatten()
        for (x, names), other in zip(inputs, others, strict=True):
            take(tuple(names), _real(x, mask_N), None if other is None else _real(other, mask_N))
    return groups


def _inputs(block: Block, stream: Stream, index: int) -> list[tuple[Tensor, list[str]]]:
    """Return what a block's linears read of one batch, each tensor with the names of those that read it."""
    inputs: list[tuple[Tensor, list[str]]] = []
    handles = [
        block.module.get_submodule(name.removeprefix(block.name + ".")).register_forward_pre_hook(
            _noter(name, inputs)
        ) for name in block.linears
    ]
    try:
        _run(block, stream, index)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _real(x: Tensor, mask_N: Tensor) -> Tensor:
    rows_NI = x.reshape(-1, x.shape[-1])
    return rows_NI[mask_N] if len(rows_NI) == len(mask_N) else rows_NI


def _run(block: Block, stream: Stream, index: int) -> Tensor:
    positional, named = stream.arguments[index][block.name]
    result = block.module(stream.hidden[index], *positional, **named)
    return result[0] if isinstance(result, tuple) else result


def _noter(name: str, inputs: list[tuple[Tensor, list[str]]]) -> Callable[[nn.Module, Any], None]:
    def note(module: nn.Module, arguments: Any) -> None:
        x = arguments[0]
        for other, names in inputs:
            if other is x:
                names.append(name)
                return
        inputs.append((x, [name]))

    return note


@contextmanager
def _watching(
    blocks: Sequence[Block], seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]], first: list[Tensor], stop: bool
) -> Iterator[None]:
    def watch(block: Block) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def note(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            rest = {key: value for key, value in named.items() if key != _HIDDEN}
            hidden = named[_HIDDEN] if _HIDDEN in named else positional[0]
            seen[block.name] = (positional if _HIDDEN in named else positional[1:]), rest
            if not first:
                first.append(hidden)
            if stop or block is blocks[-1]:
                raise Enough

        return note

    handles = [block.module.register_forward_pre_hook(watch(block), with_kwargs=True) for block in blocks]
    try:
        yield
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Kept:
    """Masks and positions of all batches, each distinct one once: full-length samples share theirs."""

    tensors: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """Return a value with its floating tensors in a type and equal tensors shared."""
        if isinstance(value, Tensor):
            x = value.to(dtype) if value.is_floating_point() else value
            key = (x.dtype, tuple(x.shape), hash(x.detach().cpu().float().numpy().tobytes()))
            return self.tensors.setdefault(key, x)
        if isinstance(value, tuple | list):
            return type(value)(self.cast(item, dtype) for item in value)
        if isinstance(value, dict):
            return {key: self.cast(item, dtype) for key, item in value.items()}
        return value


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one is two or (one.shape == two.shape and torch.equal(one, two))
    if isinstance(one, tuple | list):
        return type(one) is type(two) and len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    return bool(one is two or one == two)


def _caches(model: Any) -> bool:
    return getattr(model.config, "use_cache", None) is not None
