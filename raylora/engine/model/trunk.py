"""The blocks below the first adapted one: the same for all members, so that a row passes through them once for all.

The model's own forward does both halves. To compute the trunk it is left after the trunk's last block; to compute the
rest, the trunk's blocks return what was computed before. Nothing of an architecture is written again here.

Shapes: B rows of a pack, U distinct ones of them, T tokens, D the width between blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raylora.adapters.base import Site
from raylora.data.task import Batch
from raylora.engine.model.blocks import Block, Enough, find_blocks, standing_in
from raylora.errors import BaseError

logger = logging.getLogger(__name__)

_FEWEST_TOKENS, _TOKENS_PER_THREAD = 64, 8
"""Below either, a CPU's matrix library takes another kernel, whose sums differ in their last bits: up to 11 rows of a
matrix with 2 threads and 27 with 16. So few tokens are computed as often as members read them, as without a trunk."""
_WORTH = 0.9
"""The share of distinct rows up to which leaving out the others is worth a second pass through the embeddings."""


class Trunk:
    """Everything before the first adapted block of a model."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], in_tuples: bool) -> None:
        """Take the frozen model and the blocks that come before the first adapted one.

        Args:
            in_tuples: whether a block of this architecture returns its activations as a tuple of one.
        """
        self.model, self.blocks, self.in_tuples = model, tuple(blocks), in_tuples

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return what the trunk makes of some rows, hidden_UTD, in the base's type; the model's forward ends there."""
        found: list[Tensor] = []

        def leave(module: nn.Module, arguments: Any, output: Any) -> None:
            found.append(output[0] if self.in_tuples else output)
            raise Enough

        handle = self.blocks[-1].module.register_forward_hook(leave)
        try:
            self.model(**inputs)
        except Enough:
            pass
        finally:
            handle.remove()
        return found[0]

    @contextmanager
    def replaced(self, hidden_BTD: Tensor) -> Iterator[None]:
        """Run forwards in which the trunk's blocks compute nothing and give ``hidden_BTD``."""
        output = (hidden_BTD,) if self.in_tuples else hidden_BTD
        with standing_in([block.module for block in self.blocks], lambda *positional, **named: output):
            yield


@dataclass(frozen=True)
class DistinctRows:
    """Which rows of a batch are the same tokens, padded in the same way."""

    first_U: Tensor
    """Where each distinct row comes first."""
    of_B: Tensor
    """Which distinct row every row is."""

    @classmethod
    def of(cls, batch: Batch) -> DistinctRows:
        """Find them by their content, which is compared on the CPU."""
        columns = [tensor.cpu().numpy() for tensor in batch.model_inputs().values()]
        seen: dict[bytes, int] = {}
        first: list[int] = []
        of: list[int] = []
        for row in range(len(batch.input_ids_BT)):
            content = b"".join(column[row].tobytes() for column in columns)
            if content not in seen:
                seen[content] = len(first)
                first.append(row)
            of.append(seen[content])
        return cls(torch.tensor(first), torch.tensor(of))

    def save_work(self, tokens: int) -> bool:
        """Return whether computing each once, of this many tokens per row, is worth it and gives the same bits."""
        return len(self.first_U) <= _WORTH * len(self.of_B) and enough_tokens(len(self.first_U) * tokens)


def enough_tokens(tokens: int) -> bool:
    """Return whether a matrix of so many rows is multiplied as one with more of them is, to the last bit."""
    return tokens >= max(_FEWEST_TOKENS, _TOKENS_PER_THREAD * torch.get_num_threads())


def trunk_blocks(model: nn.Module, sites: Sequence[Site]) -> list[Block]:
    """Return the blocks before the first adapted one; none where a site is in no block, or there is no site at all."""
    try:
        blocks = find_blocks(model)
    except BaseError:
        return []
    holding = [next((n for n, block in enumerate(blocks) if site.name.startswith(f"{block.name}.")), 0)
               for site in sites]
    return blocks[: min(holding, default=0)]


def find_trunk(model: nn.Module, sites: Sequence[Site], options: Mapping[str, Any]) -> Trunk | None:
    """Return a loaded model's trunk, or None if it has none, or one that cannot be taken out of its forward.

    A few made-up rows show whether it can: with and without a trunk they must come out alike.

    Args:
        options: what this model's forward is always given.
    """
    blocks = trunk_blocks(model, sites)
    if not blocks:
        return None
    inputs = {**made_up_rows(model), **options}
    outputs: list[tuple[nn.Module, Any]] = []
    handles = [
        block.module.register_forward_hook(lambda module, arguments, output: outputs.append((module, output)))
        for block in blocks
    ]
    try:
        with torch.no_grad():
            expected = model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    in_order = [module for module, _ in outputs] == [block.module for block in blocks]
    if not in_order or any(_activations(output) is None for _, output in outputs):
        _warn(model, "they are not one chain of activations")
        return None
    trunk = Trunk(model, blocks, isinstance(outputs[0][1], tuple))
    with torch.no_grad(), trunk.replaced(trunk.run(inputs)):
        found = model(**inputs).logits
    # Another row's or block's activations are off by far more than two runs of one and the same thing.
    scale = float(expected.float().abs().max())
    if found.shape != expected.shape or float((found - expected).float().abs().max()) > 1e-2 * scale:
        _warn(model, "what they are given is read elsewhere, too")
        return None
    return trunk


def _activations(output: Any) -> Tensor | None:
    if isinstance(output, tuple) and len(output) == 1:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _warn(model: nn.Module, reason: str) -> None:
    logger.warning("%s: the blocks below the adapters are computed for every member: %s", type(model).__name__, reason)


def made_up_rows(model: Any) -> dict[str, Tensor]:
    """Return four rows of eight tokens, padded differently."""
    device = model.get_input_embeddings().weight.device
    tokens_BT = torch.arange(32, device=device).view(4, 8) * 7 % int(model.config.get_text_config().vocab_size)
    mask_BT = (torch.arange(8, device=device)[None] >= torch.arange(4, device=device)[:, None]).long()
    return {"input_ids": tokens_BT, "attention_mask": mask_BT}
