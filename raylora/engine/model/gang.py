"""A gang: ranks that share one base and agree, before every pass through it, what kind of pass that is.

The members on different ranks have nothing to do with each other: other data, other numbers of steps, other failures.
But a base that is split over the ranks can only be passed by all of them together, since each holds a part of every
layer. So nobody starts a pass alone: the ranks agree on a round, those who asked for it compute, and the others join
with an idle pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
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
    partners: int = 1
    """How many ranks train the same members, each on its part of every batch: 0 to partners - 1, and so on."""
    is_split: bool = True
    """Whether the base is split over all ranks; else each has all of it."""
    timeout_s: float = 1800.0
    """How long ranks wait for one another, in a round or between two."""
    store: Any = field(default=None, compare=False)
    """Where rank 0 listens already, if it does: torch's ``TCPStore``."""
    backend: str = ""
    """What carries their tensors; by default NCCL between GPUs, which wants one per rank, and gloo between CPUs."""

    @classmethod
    def listening(cls, host: str, size: int, partners: int = 1, is_split: bool = True) -> GangPlace:
        """Return the place of rank 0, at a free port of this machine, where it listens from now on."""
        from torch import distributed

        store = distributed.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        return cls(0, size, f"{host}:{store.port}", partners, is_split, store=store)


def backend_for(device: torch.device) -> str:
    """Return what torch carries tensors of a device by; on a GPU also those of the CPU, on which it may be next."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


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
            place.backend or backend_for(device), store=store, rank=place.rank, world_size=place.size, timeout=timeout
        )
        # Every rank makes all of them: that is a collective, too.
        groups = [list(range(first, first + place.partners)) for first in range(0, place.size, place.partners)]
        made = [distributed.new_group(ranks, timeout=timeout) for ranks in groups]
        alone = made if place.partners == 1 else [distributed.new_group([rank]) for rank in range(place.size)]
        own = place.rank // place.partners
        self.partners = Partners(made[own], alone[place.rank], groups[own], place.rank % place.partners, device)
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


class Partners:
    """The ranks that train the same members; often one alone. To DeepSpeed they are a member's data-parallel group.

    Without it an engine would average a member's gradients with those of strangers.
    """

    def __init__(self, group: Any, alone: Any, ranks: Sequence[int], index: int, device: torch.device) -> None:
        self.group, self.alone, self.ranks, self.index, self.device = group, alone, ranks, index, device

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that predicts, commits and reports for all."""
        return self.index == 0

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the mean over the partners, of each value."""
        if self.size == 1:
            return list(values)
        return [float(value) / self.size for value in self._reduced(values, "SUM")]

    def greatest(self, value: int) -> int:
        """Return the greatest of the partners' values."""
        return value if self.size == 1 else int(self._reduced([value], "MAX")[0])

    def gathered(self, part: torch.Tensor) -> torch.Tensor:
        """Return all partners' equal parts of a flat tensor, one after another."""
        from torch import distributed

        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in self.ranks]
        distributed.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts)

    def _reduced(self, values: Sequence[float], how: str) -> list[float]:
        from torch import distributed

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor, op=getattr(distributed.ReduceOp, how), group=self.group)
        return [float(value) for value in tensor]

    # --- what DeepSpeed asks of a model-parallel unit; no member is split, so that part is one rank's -----
    def get_data_parallel_group(self) -> Any:
        """Return the partners' group."""
        return self.group

    def get_data_parallel_world_size(self) -> int:
        """Return how many they are."""
        return self.size

    def get_data_parallel_rank(self) -> int:
        """Return which of them this is."""
        return self.index

    def get_model_parallel_group(self) -> Any:
        """Return the group of this rank alone."""
        return self.alone

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
        """Return the first partner's rank."""
        return self.ranks[0]
