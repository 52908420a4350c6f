"""What a run needs, and who trains what, where: no torch is imported, and nothing is decided here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from raylora.placement.estimate import MemberShape, ModelShape, Parts


@dataclass(frozen=True)
class Demand:
    """What a run needs."""

    groups: tuple[tuple[str, ...], ...]
    """Units that may share a forward, group by group."""
    model: ModelShape
    """The frozen base."""
    member: MemberShape
    """What one unit trains."""
    unpackable_reason: str = ""
    """Why the members are groups of their own, if they are."""
    unsplittable_reason: str = ""
    """Why the base cannot be split over several workers, if it cannot."""
    places: int | None = None
    """How many units of a group train at once, in one forward, where the others wait for their places."""
    later_jobs: int = 0
    """How many jobs begin when all members are finished, each of which any worker does alone."""

    @property
    def units(self) -> int:
        """All that is to be trained."""
        return sum(map(len, self.groups))


@dataclass(frozen=True)
class Plan:
    """Workers and the packs they train, with the reasons for both."""

    workers: int
    cpus_per_worker: int
    gpus_per_worker: int
    packs: tuple[tuple[str, ...], ...]
    parts: Parts
    """What a process with the largest pack needs."""
    reasons: tuple[str, ...]
    strategy: str = "replicate"
    ranks: int = 1
    """Processes per worker: a gang, where it is more than one."""
    partners: int = 1
    """How many ranks of a gang train the same members."""
    later_workers: int = 0
    """Further workers for the jobs that begin when all members are finished."""
    places: int | None = None
    """How many units of a pack train at once, where the others wait for their places."""

    def at_once(self, pack: Sequence[str]) -> int:
        """Return how many units of a pack train at once."""
        return len(pack) if self.places is None else min(len(pack), self.places)

    @property
    def workers_in_all(self) -> int:
        """How many workers there are at one time or another."""
        return self.workers + self.later_workers

    @property
    def worker_bytes(self) -> int:
        """What a process needs in all."""
        return self.parts.total

    def jobs(self, first: int = 0) -> dict[str, list[str]]:
        """Return job name -> units; the jobs are numbered from ``first``."""
        return {f"job-{index:02d}": list(pack) for index, pack in enumerate(self.packs, first)}

    def summary(self) -> str:
        """Return the plan in one line."""
        members = math.ceil(max(map(self.at_once, self.packs), default=0) / self.ranks)
        unit = "GPU" if self.gpus_per_worker else "worker"
        how = f"shard over {self.ranks}" if self.ranks > 1 else self.strategy
        return f"{how}: {self.workers} worker(s), {members} member(s) per {unit}, {self.worker_bytes / 1e9:.1f} GB each"


def even_parts(units: Sequence[str], parts: int) -> list[list[str]]:
    """Return so many parts of the units, in order and within one unit of each other: 5 in 2 parts are 3 + 2."""
    sizes = [len(units) // parts + (index < len(units) % parts) for index in range(parts)]
    ends = list(itertools.accumulate(sizes, initial=0))
    return [list(units[start:end]) for start, end in itertools.pairwise(ends)]
