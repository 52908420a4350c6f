"""The order in which a member sees its rows: a pure function of (seed, step), so that it can resume anywhere."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def derive_seed(*parts: int | str) -> int:
    """Return 63 bits that depend on every part: independent streams from one seed, equal on every machine."""
    text = json.dumps(list(parts))  # json keeps ("1", 2) apart from ("12",) and from (1, 2)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Order:
    """A seeded data order over ``rows`` examples in micro-batches of ``batch``.

    With ``bootstrap`` the seed also draws one sample of the rows with replacement, which stays the same in
    every epoch (Breiman, 1996); only its order changes.
    """

    rows: int
    batch: int
    seed: int
    bootstrap: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1 or self.batch < 1:
            raise ValueError(f"an order needs at least one row and one per batch, got {self.rows} and {self.batch}")

    @property
    def steps_per_epoch(self) -> int:
        """Micro-batches in one pass over the rows; the last one may be short."""
        return -(-self.rows // self.batch)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the rows of global micro-batch ``step`` (0 is the first of the first epoch), at most ``batch``."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.rows, self.seed, epoch, self.bootstrap)
        return order[position * self.batch : (position + 1) * self.batch]


@functools.lru_cache(maxsize=64)
def _epoch_order(rows: int, seed: int, epoch: int, bootstrap: bool) -> NDArray[np.int64]:
    order = np.random.default_rng(derive_seed("order", seed, epoch)).permutation(rows)
    if bootstrap:
        order = np.random.default_rng(derive_seed("bootstrap", seed)).integers(rows, size=rows)[order]
    order.setflags(write=False)  # the array is shared by every step of the epoch
    return order
