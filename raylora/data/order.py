"""The order in which a member sees its rows: a pure function of (seed, step), so that it can resume anywhere."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


def derive_seed(*parts: int | str) -> int:
    """Return 63 bits that depend on every part: independent streams from one seed, equal on every machine."""
    text = json.dumps(list(parts))  # json keeps ("1", 2) apart from ("12",) and from (1, 2)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Sample:
    """Which rows a member learns from, where it is not given each of them once: so many, drawn by a seed."""

    size: int
    seed: int
    with_replacement: bool
    """A bootstrap sample (Breiman, 1996) instead of a part of the rows."""

    def of(self, rows: int) -> NDArray[np.int64]:
        """Return the indices of the sample, among so many rows."""
        if self.with_replacement:
            return np.random.default_rng(derive_seed("bootstrap", self.seed)).integers(rows, size=self.size)
        return np.random.default_rng(derive_seed("part", self.seed)).permutation(rows)[: self.size]


@dataclass(frozen=True)
class Order:
    """A seeded data order over ``rows`` examples in micro-batches of ``batch``.

    With a ``sample``, which stays the same in every epoch, the order is that of its rows. An epoch has as many
    micro-batches as without one: of a smaller sample it holds several passes, each in an order of its own, the last one
    cut off where the epoch ends. So members of one pack keep in step whatever their samples are.

    With ``lengths`` the rows of a batch have like lengths, so that little is padding: the shuffled epoch is cut
    into stretches of a few batches and each is sorted. Which rank of a stretch comes when is the same for every
    seed, so that members that step together have like lengths too; which rows those are is the seed's own.
    """

    rows: int
    batch: int
    seed: int
    sample: Sample | None = None
    lengths: tuple[int, ...] | None = None
    begins: int = 0
    """The micro-batch of a pack that is this order's first."""
    _grouped: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.rows < 1 or self.batch < 1:
            raise ValueError(f"an order needs at least one row and one per batch, got {self.rows} and {self.batch}")
        if self.sample is not None and not 1 <= self.sample.size <= self.rows:
            raise ValueError(f"a sample has from one to all {self.rows} rows, got {self.sample.size}")

    @property
    def steps_per_epoch(self) -> int:
        """Micro-batches in one pass over the rows; the last one may be short."""
        return -(-self.rows // self.batch)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the rows of a pack's micro-batch ``step``, at most ``batch``; the first epoch begins at ``begins``."""
        epoch, position = divmod(step - self.begins, self.steps_per_epoch)
        order = _epoch_order(self.rows, self.seed, epoch, self.sample)
        if self.lengths is not None:
            if self._grouped.get("epoch") != epoch:  # sorting an epoch once is enough
                self._grouped.update(epoch=epoch, order=_by_length(order, np.asarray(self.lengths), self.batch, epoch))
            order = self._grouped["order"]
        return order[position * self.batch : (position + 1) * self.batch]


@functools.lru_cache(maxsize=64)
def _epoch_order(rows: int, seed: int, epoch: int, sample: Sample | None) -> NDArray[np.int64]:
    generator = np.random.default_rng(derive_seed("order", seed, epoch))
    size = rows if sample is None else sample.size
    order = np.concatenate([generator.permutation(size) for _ in range(-(-rows // size))])[:rows]
    if sample is not None:
        order = sample.of(rows)[order]
    order.setflags(write=False)  # the array is shared by every step of the epoch
    return order


_STRETCH = 16
"""Batches sorted together: enough that their lengths are alike, few enough that the order stays random."""


def _by_length(order: NDArray[np.int64], length_N: NDArray[np.int64], batch: int, epoch: int) -> NDArray[np.int64]:
    batches = []
    for start in range(0, len(order), _STRETCH * batch):
        stretch = order[start : start + _STRETCH * batch]
        stretch = stretch[np.argsort(length_N[stretch], kind="stable")]
        batches += [stretch[i : i + batch] for i in range(0, len(stretch), batch)]
    full, short = [b for b in batches if len(b) == batch], [b for b in batches if len(b) < batch]
    # Seeded by the epoch alone: every member meets long and short batches at the same steps.
    ranks = np.random.default_rng(derive_seed("lengths", epoch)).permutation(len(full))
    return np.concatenate([*(full[rank] for rank in ranks), *short])
