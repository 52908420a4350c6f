"""Several short rows in one sequence, none of which sees another: what was padding is text.

Nothing tells a model where a row ends but its positions, which begin anew at every row and at the padding behind the
last one. Where it is given no mask, transformers makes one of them for every kind of layer.

Shapes: K members, N examples of all of them, B sequences, T tokens, P the real ones among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raylora.data.task import Batch


def bins_of(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return which rows share a sequence of at most ``size`` tokens; a longer row has one for itself.

    First-fit decreasing says how many sequences it takes. As many are then filled evenly, each row into the one that
    is emptiest, if that keeps within the size: a batch is as wide as its longest sequence.
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    bins: list[list[int]] = []
    filled: list[int] = []
    for row in longest_first:
        found = next((b for b, tokens in enumerate(filled) if tokens + lengths[row] <= size), len(bins))
        if found == len(bins):
            bins.append([])
            filled.append(0)
        bins[found].append(row)
        filled[found] += lengths[row]
    even: list[list[int]] = [[] for _ in bins]
    tokens = [0] * len(bins)
    for row in longest_first:
        found = tokens.index(min(tokens))
        even[found].append(row)
        tokens[found] += lengths[row]
    return even if max(tokens) < max(filled) else bins


def pack_rows(batch: Batch, size: int) -> Batch:
    """Return a batch of one row per example with the rows in sequences of at most ``size`` tokens.

    Which of a member's rows are together, and where, depends on no other member. All have as many sequences as the one
    with the most; those beyond a member's own are padding and come last, so that its dropout is what it is alone.
    Examples come in the order in which they lie.

    Args:
        batch: of one member, or of several as :func:`raylora.data.task.collate_pack` puts them together.
    """
    assert batch.rows_per_example == 1 and batch.target_mask_BT is not None
    lengths_N, of_member = batch.attention_mask_BT.sum(-1), len(batch) // len(batch.lengths_K)
    bins_K = [bins_of(lengths.tolist(), size) for lengths in lengths_N.split(of_member)]
    most = max(map(len, bins_K))
    sequences = [
        [k * of_member + row for row in rows]
        for k, bins in enumerate(bins_K) for rows in (*bins, *[[]] * (most - len(bins)))
    ]
    order_N = [row for rows in sequences for row in rows]
    filled_B = torch.tensor([int(lengths_N[rows].sum()) for rows in sequences])
    lengths_K = tuple(filled_B.view(-1, most).amax(1).tolist())
    at_T = torch.arange(max(lengths_K))
    is_real_BT = at_T < filled_B[:, None]
    real_NT = batch.attention_mask_BT.bool()

    def laid(x_NT: Tensor, fill_BT: Tensor) -> Tensor:
        """Return the examples' tokens where they lie in the sequences."""
        return fill_BT.to(x_NT.dtype).masked_scatter(is_real_BT, torch.cat([x_NT[n, real_NT[n]] for n in order_N]))

    positions_NT = real_NT.cumsum(-1) - 1
    none_BT = torch.zeros(is_real_BT.shape, dtype=torch.int64)
    position_ids_BT = laid(positions_NT, (at_T - filled_B[:, None]).clamp(min=0))
    rank_N = torch.empty(len(order_N), dtype=torch.int64)
    rank_N[order_N] = torch.arange(len(order_N))
    types_BT = batch.token_type_ids_BT
    of_examples: dict[str, Any] = {
        name: value[order_N] for name, value in vars(batch).items() if isinstance(value, Tensor) and name.endswith("_N")
    }
    return replace(
        batch,
        **of_examples,
        ids=[batch.ids[n] for n in order_N],
        # Not padding tokens: of those some models warn, where they are given no mask.
        input_ids_BT=laid(batch.input_ids_BT, none_BT + batch.input_ids_BT[real_NT][0]),
        attention_mask_BT=is_real_BT.long(),
        position_ids_BT=position_ids_BT,
        token_type_ids_BT=None if types_BT is None else laid(types_BT, none_BT),
        # Nothing stands before an example's first token, so nothing predicts it.
        target_mask_BT=laid(batch.target_mask_BT, none_BT) & (position_ids_BT > 0),
        segments_BT=laid(rank_N[:, None].expand(real_NT.shape), none_BT - 1),
        lengths_K=lengths_K,
    )


@dataclass(frozen=True)
class Packing:
    """What packing saves in some micro-batches of one member."""

    rows: int
    tokens: int
    """Real ones."""
    sequences: int
    places: int
    """Tokens with padding."""
    places_unpacked: int
    most_sequences: int
    """Of one micro-batch."""
    longest: int
    """Tokens of the longest sequence."""

    @classmethod
    def of(cls, batches: Iterable[Sequence[int]], size: int) -> Packing:
        """Count it from the lengths of each micro-batch's rows."""
        rows = tokens = sequences = places = unpacked = most = longest = 0
        for lengths in batches:
            bins = bins_of(lengths, size)
            width = max(sum(lengths[row] for row in found) for found in bins)
            rows, tokens, sequences = rows + len(lengths), tokens + sum(lengths), sequences + len(bins)
            places, unpacked = places + len(bins) * width, unpacked + len(lengths) * max(lengths)
            most, longest = max(most, len(bins)), max(longest, width)
        return cls(rows, tokens, sequences, places, unpacked, most, longest)

    def __str__(self) -> str:
        before, after = (1 - self.tokens / places for places in (self.places_unpacked, self.places))
        return f"rows packed: {self.rows:,} rows in {self.sequences:,} sequences; padding {before:.1%} -> {after:.1%}"
