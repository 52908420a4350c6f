"""Who trains what, where: a pure function of what is needed and what there is, which explains itself.

Memory is estimated in bytes and no torch is imported: a plan can be made on a laptop for a cluster.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raylora.errors import PlacementError
from raylora.spec import PlacementSpec

_USABLE = 0.8
"""Share of a device's memory that a plan fills; the rest is the runtime's."""


@dataclass(frozen=True)
class Demand:
    """What a run needs."""

    groups: tuple[tuple[str, ...], ...]
    """Units that may share a forward, group by group."""
    base_bytes: int
    """The quantized base, once per worker."""
    member_bytes: int
    """A member's float32 tensors, gradients and two moments."""
    activation_bytes: int
    """What one member's micro-batch keeps for its backward pass."""
    runtime_bytes: int = 2_000_000_000
    """The interpreter with torch and transformers."""
    unpackable_reason: str = ""
    """Why the members are groups of their own, if they are."""
    unsplittable_reason: str = ""
    """Why the base cannot be split over several workers, if it cannot."""


@dataclass(frozen=True)
class Inventory:
    """What the machine or cluster has."""

    cpus: int
    gpus: int
    memory_bytes: int
    """Main memory for CPU workers, one device's memory for GPU workers."""
    where: str = "this machine"
    in_process: bool = False
    """Nothing but this process computes: more than one worker would take turns."""


@dataclass(frozen=True)
class Plan:
    """Workers and the packs they train, with the reasons for both."""

    workers: int
    cpus_per_worker: int
    gpus_per_worker: int
    packs: tuple[tuple[str, ...], ...]
    worker_bytes: int
    reasons: tuple[str, ...]
    strategy: str = "replicate"
    ranks: int = 1
    """Processes per worker: a gang that the base is split over, where it is more than one."""

    def jobs(self, first: int = 0) -> dict[str, list[str]]:
        """Return job name -> units; the jobs are numbered from ``first``."""
        return {f"job-{index:02d}": list(pack) for index, pack in enumerate(self.packs, first)}


def make_plan(demand: Demand, inventory: Inventory, spec: PlacementSpec) -> Plan:
    """Place a run: each worker holds the base once and trains a pack of members at a time.

    Raises:
        PlacementError: more is asked for than there is; the message says what there is.
    """
    reasons: list[str] = [demand.unpackable_reason] if demand.unpackable_reason else []
    gpus_each = (1 if inventory.gpus else 0) if spec.gpus_per_worker == "auto" else spec.gpus_per_worker
    units = sum(len(group) for group in demand.groups)
    largest = max(len(group) for group in demand.groups)
    slots = min(inventory.gpus, inventory.cpus) if gpus_each else inventory.cpus
    ranks = _ranks(spec, demand, inventory, slots, reasons)
    demand = replace(demand, base_bytes=math.ceil(demand.base_bytes / ranks))
    processes = _workers(spec, demand, inventory, gpus_each, min(slots, ranks * math.ceil(units / ranks)), reasons)
    workers = max(1, processes // ranks)
    processes = workers * ranks
    cpus_each = _cpus(spec, inventory, processes, reasons)
    _check(processes, cpus_each, gpus_each, inventory)
    per_pack = _per_pack(spec, demand, inventory, gpus_each, processes, largest, reasons)
    packs = tuple(tuple(pack) for group in demand.groups for pack in _split(group, per_pack * ranks))
    biggest = math.ceil(max(map(len, packs)) / ranks)
    worker_bytes = _worker_bytes(demand, biggest, gpus_each)
    strategy = "shard" if ranks > 1 else "pack" if workers == 1 and biggest > 1 else "replicate"
    reasons.append(f"about {worker_bytes / 1e9:.2f} GB per worker with {biggest} member(s) in one forward")
    return Plan(workers, cpus_each, gpus_each, packs, worker_bytes, tuple(reasons), strategy, ranks)


def _ranks(spec: PlacementSpec, demand: Demand, inventory: Inventory, slots: int, reasons: list[str]) -> int:
    """Return over how many workers a base is split; 1 where each has all of it."""
    if spec.strategy != "shard":
        return 1
    if demand.unsplittable_reason:
        raise PlacementError(
            f"placement.strategy: shard: {demand.unsplittable_reason}", "use placement.strategy replicate"
        )
    if inventory.in_process:
        raise PlacementError(
            "placement.strategy: shard splits the base over several processes, and this run has one",
            "run it on Ray (without --local), or use placement.strategy replicate",
        )
    ranks = slots if spec.ranks == "auto" else spec.ranks
    if isinstance(spec.workers, int):
        if spec.ranks == "auto":
            ranks = spec.workers
        elif spec.workers % ranks:
            raise PlacementError(
                f"placement.workers: {spec.workers} worker(s) are no whole number of gangs of {ranks} placement.ranks",
                f"use {max(1, spec.workers // ranks) * ranks}, or auto",
            )
    if not 2 <= ranks <= slots:
        raise PlacementError(
            f"placement.ranks: a base is to be split over {ranks} workers, and {inventory.where} has room for {slots}",
            f"use at most {slots}" if slots > 1 else "use placement.strategy replicate",
        )
    reasons.append(f"the base is split over {ranks} workers: as asked")
    return ranks


def _workers(
    spec: PlacementSpec, demand: Demand, inventory: Inventory, gpus_each: int, most: int, reasons: list[str]
) -> int:
    if spec.workers != "auto":
        reasons.append(f"{spec.workers} worker(s): as asked")
        return spec.workers
    if inventory.in_process:
        reasons.append("1 worker: all of the run is in this process")
        return 1
    unit = "GPU" if gpus_each else "CPU"
    workers = max(1, most)
    if isinstance(spec.cpus_per_worker, int):
        workers = max(1, min(workers, inventory.cpus // spec.cpus_per_worker))
    if not gpus_each:
        fits = int(inventory.memory_bytes * _USABLE // _worker_bytes(demand, 1, 0))
        if fits < workers:
            workers = max(1, fits)
            reasons.append(f"{workers} worker(s): more copies of the base do not fit into memory")
            return workers
    reasons.append(f"{workers} worker(s): one per {unit}, at most one per member")
    return workers


def _cpus(spec: PlacementSpec, inventory: Inventory, workers: int, reasons: list[str]) -> int:
    if spec.cpus_per_worker != "auto":
        return spec.cpus_per_worker
    share = max(1, inventory.cpus // workers)
    reasons.append(f"{share} CPU(s) per worker: an even share of {inventory.cpus}")
    return share


def _check(workers: int, cpus_each: int, gpus_each: int, inventory: Inventory) -> None:
    if workers * cpus_each > inventory.cpus or workers * gpus_each > inventory.gpus:
        need = f"{workers} worker(s) of {cpus_each} CPU(s)" + (f" and {gpus_each} GPU" if gpus_each else "")
        most = inventory.cpus // cpus_each
        most = min(most, inventory.gpus) if gpus_each else most
        lower = "placement.gpus_per_worker" if gpus_each > inventory.gpus else "placement.cpus_per_worker"
        raise PlacementError(
            f"placement: {need} are asked for, but {inventory.where} has "
            f"{inventory.cpus} CPU(s) and {inventory.gpus} GPU(s)",
            f"set placement.workers to at most {most}, or to auto" if most else f"lower {lower}",
        )


def _per_pack(
    spec: PlacementSpec, demand: Demand, inventory: Inventory, gpus_each: int, workers: int, largest: int,
    reasons: list[str],
) -> int:
    share = inventory.memory_bytes * _USABLE / (1 if gpus_each else workers)
    room = share - _worker_bytes(demand, 0, gpus_each)
    fits = int(room // max(1, demand.member_bytes + demand.activation_bytes))
    if spec.members_per_worker != "auto":
        if fits < spec.members_per_worker:
            reasons.append(f"warning: {spec.members_per_worker} members in one forward may not fit; about {fits} do")
        return spec.members_per_worker
    if fits < 1:
        raise PlacementError(
            f"placement: one member needs about {_worker_bytes(demand, 1, gpus_each) / 1e9:.1f} GB, "
            f"a worker has {share / 1e9:.1f} GB",
            "lower optimization.micro_batch or task.max_length, or quantize the base",
        )
    wanted = math.ceil(largest / workers)
    packed = min(wanted, fits)
    reasons.append(
        f"{packed} member(s) per forward: " + ("an even share" if packed == wanted else f"{wanted} do not fit")
    )
    return packed


def _split(group: Sequence[str], per_pack: int) -> list[list[str]]:
    """Split evenly: 5 in packs of at most 3 are 3 + 2, of at most 4 are 3 + 2 too."""
    packs = math.ceil(len(group) / per_pack)
    sizes = [len(group) // packs + (index < len(group) % packs) for index in range(packs)]
    ends = list(itertools.accumulate(sizes))
    return [list(group[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def _worker_bytes(demand: Demand, members: int, gpus_each: int) -> int:
    runtime = 0 if gpus_each else demand.runtime_bytes
    return demand.base_bytes + runtime + members * (demand.member_bytes + demand.activation_bytes)
