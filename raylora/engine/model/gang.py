"""A gang: ranks that share one base and agree, before every pass through it, what kind of pass that is.

The members on different ranks have nothing to do with each other: other data, other numbers of steps, other failures.
But a base that is split over the ranks can only be passed by all of them together, since each holds a part of every
layer. So nobody starts a pass alone: the ranks agree on a round, those who asked for it compute, and the others join
with an idle pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch


class Round(IntEnum):
    """What the ranks do together next: the greatest of what they ask for."""

    IDLE = 0
    FORWARD = 1
    """A forward pass without gradients: validation, prediction, a reference."""
    TRAIN = 2
    """A forward and a backward pass."""


@dataclass(frozen=True)
class GangPlace:
    """One rank's place in a gang."""

    rank: int
    size: int
    address: str
    """``host:port`` at which the ranks meet; rank 0 listens there."""
    timeout_s: float = 1800.0
    """How long ranks wait for one another, in a round or between two."""
    store: Any = field(default=None, compare=False)
    """Where rank 0 listens already, if it does: torch's ``TCPStore``."""

    @classmethod
    def listening(cls, host: str, size: int) -> GangPlace:
        """Return the place of rank 0, at a free port of this machine, where it listens from now on."""
        from torch import distributed

        store = distributed.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        return cls(0, size, f"{host}:{store.port}", store=store)


class Gang:
    """One process's membership of a gang; there is at most one gang per process."""

    def __init__(self, place: GangPlace, device: torch.device) -> None:
        """Meet the other ranks; returns when all are there."""
        from torch import distributed

        self.place = place
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed's calls, at every gather
        host, _, port = place.address.rpartition(":")
        timeout = timedelta(seconds=place.timeout_s)
        store = place.store
        if store is None:
            store = distributed.TCPStore(host, int(port), place.size, is_master=place.rank == 0, timeout=timeout)
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=place.rank, world_size=place.size,
            timeout=timeout,
        )
        # Every rank makes all of them: that is a collective, too.
        alone = [distributed.new_group([rank]) for rank in range(place.size)]
        self.alone = OneRank(alone[place.rank], place.rank)
        self.broken = False
        """A pass was left half way: the others wait in it, and no round can be agreed on any more."""
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._join: Callable[[Round], None] = lambda agreed: None
        self._after: Callable[[Round], None] = lambda agreed: None

    def passed_by(self, join: Callable[[Round], None], after: Callable[[Round], None]) -> None:
        """Take what makes an idle pass of a round, and what ends every pass."""
        self._join, self._after = join, after

    @contextmanager
    def round(self, wanted: Round) -> Iterator[None]:
        """Agree with the others until what is agreed on is wanted here, then leave the pass to the caller.

        Other rounds that come before are joined.
        """
        with self._whole():
            while self._agree(wanted) is not wanted:
                pass
            yield
            self._after(wanted)

    def leave(self) -> None:
        """Join the others' rounds until nobody has anything left to do; all ranks leave together."""
        with self._whole():
            while self._agree(Round.IDLE) is not Round.IDLE:
                pass

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Remember it if what is done together was left half way."""
        try:
            yield
        except BaseException:
            self.broken = True
            raise

    def _agree(self, wanted: Round) -> Round:
        """Return the round of all ranks, after joining it if it is another than wanted."""
        from torch import distributed

        self._flag.fill_(int(wanted))
        distributed.all_reduce(self._flag, op=distributed.ReduceOp.MAX)
        agreed = Round(int(self._flag))
        if agreed is not wanted:
            self._join(agreed)
            self._after(agreed)
        return agreed


class OneRank:
    """What DeepSpeed asks of a model-parallel unit, for a member that lives on one rank of a gang.

    Without it an engine would average the member's gradients with those of strangers.
    """

    def __init__(self, group: Any, rank: int) -> None:
        self.group, self.rank = group, rank

    def get_data_parallel_group(self) -> Any:
        """Return the group of this rank alone."""
        return self.group

    def get_data_parallel_world_size(self) -> int:
        """Return 1."""
        return 1

    def get_data_parallel_rank(self) -> int:
        """Return 0."""
        return 0

    def get_model_parallel_group(self) -> Any:
        """Return the group of this rank alone."""
        return self.group

    get_tensor_model_parallel_group = get_model_parallel_group

    def get_model_parallel_world_size(self) -> int:
        """Return 1."""
        return 1

    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_model_parallel_rank(self) -> int:
        """Return 0."""
        return 0

    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_data_parallel_src_rank(self) -> int:
        """Return this rank."""
        return self.rank
