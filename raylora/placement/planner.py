"""Makes plans: pure functions of what is needed and what there is, which explain themselves.

Memory is estimated in bytes and no torch is imported: a plan can be made on a laptop for a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from raylora.errors import PlacementError
from raylora.placement.estimate import Parts, activation_bytes, parts_of
from raylora.placement.inventory import Inventory
from raylora.placement.pace import is_much_faster, pace_of, rates_of
from raylora.placement.plan import Demand, Plan, even_parts
from raylora.placement.rooms import (
    Room,
    capacity,
    largest_share,
    network_obstacle,
    room_bytes,
    rooms_of,
    spans_nodes,
)
from raylora.spec import PlacementSpec


class _DoesNotFit(PlacementError):
    """Not even one member fits."""


def make_plan(demand: Demand, inventory: Inventory, spec: PlacementSpec, tflops: float | None = None) -> Plan:
    """Place a run: each worker holds the base, or a part of it, and trains a pack of members at a time.

    Args:
        tflops: what one worker reaches, in 10^12 operations per second, if it is known.

    Raises:
        PlacementError: more is asked for than there is; the message says what there is.
    """
    if spec.strategy == "shard":
        return _sharded(demand, inventory, spec)
    try:
        whole = _Placing(demand, inventory, spec).plan()
        return whole if spec.strategy == "replicate" else _faster(whole, demand, inventory, spec, tflops)
    except _DoesNotFit as error:
        obstacle = "this run has one process" if inventory.in_process else demand.unsplittable_reason
        if spec.strategy == "replicate":
            obstacle = "placement.strategy replicate is asked for"
        if obstacle:
            raise PlacementError(f"{error.message}; the base is not split: {obstacle}", error.hint) from None
        try:
            split = _sharded(demand, inventory, spec)
        except PlacementError as other:
            raise PlacementError(f"{error.message}; nor can the base be split: {other.message}", error.hint) from None
        why = error.message.removeprefix("placement: ")
        return replace(split, reasons=(f"replicate does not fit: {why}", *split.reasons))


def _faster(
    whole: Plan, demand: Demand, inventory: Inventory, spec: PlacementSpec, tflops: float | None
) -> Plan:
    """Return the plan with whole bases, or that with a split one where it takes much less time; it says why."""
    if inventory.in_process or demand.unsplittable_reason or whole.workers * whole.ranks == 1:
        return whole
    try:
        split = _sharded(demand, inventory, spec)
    except PlacementError as error:
        why = f"shard instead: {error.message.removeprefix('placement.').removeprefix('placement: ')}"
        return replace(whole, reasons=(*whole.reasons, why))
    rates = rates_of(whole, tflops)
    ours, others = (pace_of(demand, plan, inventory, rates) for plan in (whole, split))
    is_split, times = is_much_faster(others, ours), others.round_s / max(ours.round_s, 1e-12)
    how = f"(rates {rates.source})"
    if is_split:
        reason = f"replicate instead would take {1 / times:.1f} times as long {how}"
        return replace(split, reasons=(*split.reasons, reason))
    reason = f"shard over {split.ranks} instead would take {times:.1f} times as long {how}"
    return replace(whole, reasons=(*whole.reasons, reason))


def _sharded(demand: Demand, inventory: Inventory, spec: PlacementSpec) -> Plan:
    """Place a run whose base is split, within a node if a gang of one node has room for it."""
    if demand.unsplittable_reason:
        raise PlacementError(
            f"placement.strategy: shard: {demand.unsplittable_reason}", "use placement.strategy replicate"
        )
    if inventory.in_process:
        raise PlacementError(
            "placement.strategy: shard splits the base over several processes, and this run has one",
            "run it on Ray (without --local), or use placement.strategy replicate",
        )
    asked = spec.ranks if isinstance(spec.ranks, int) else spec.workers if isinstance(spec.workers, int) else None
    on_gpu = inventory.gpus > 0 and spec.gpus_per_worker != 0
    slots = [min(len(node.gpus), node.cpus) if on_gpu else node.cpus for node in inventory.nodes]
    if isinstance(spec.workers, int) and isinstance(asked, int) and spec.workers % asked:
        raise PlacementError(
            f"placement.workers: {spec.workers} worker(s) are no whole number of gangs of {asked} placement.ranks",
            f"use {max(1, spec.workers // asked) * asked}, or auto",
        )
    tries = [asked] if asked is not None else sorted({max(slots), sum(slots)})
    if not 2 <= max(tries) <= sum(slots):
        raise PlacementError(
            f"placement.ranks: a base is to be split over {max(tries)} workers, and {inventory.where} has room for "
            f"{sum(slots)}",
            f"use at most {sum(slots)}" if sum(slots) > 1 else "use placement.strategy replicate",
        )
    for ranks in (found := [number for number in tries if number >= 2]):
        try:
            return _Placing(demand, inventory, spec, ranks, "as asked" if asked is not None else "").plan()
        except _DoesNotFit:
            if ranks == found[-1]:
                raise
    raise AssertionError("one of them was tried")


class _Placing:
    """Makes one plan, for one way to hold the base, and notes the reasons on the way."""

    def __init__(
        self, demand: Demand, inventory: Inventory, spec: PlacementSpec, ranks: int = 1, why_ranks: str = ""
    ) -> None:
        self.demand, self.inventory, self.spec, self.ranks = demand, inventory, spec, ranks
        self.size = ranks if ranks > 1 else spec.data_parallel
        """Processes of a gang, whether they split the base or not."""
        self.groups = self.size // spec.data_parallel
        """How many packs a gang trains at a time: partners have one between them."""
        self.gpus_each = (1 if inventory.gpus else 0) if spec.gpus_per_worker == "auto" else spec.gpus_per_worker
        self.reasons = [demand.unpackable_reason] if demand.unpackable_reason else []
        self.reasons += [f"assumed: {what}" for what in inventory.assumed]
        if ranks > 1:
            self.reasons.append(f"the base is split over {ranks} workers" + (f": {why_ranks}" if why_ranks else ""))
            if demand.model.output_in_parts:
                part_mb = demand.model.output_part_bytes / 1e6
                self.reasons.append(f"the output layer is gathered in parts of {part_mb:.1f} MB: as asked")

    def parts(self, members: int) -> Parts:
        """Return what a process with so many members needs."""
        return parts_of(self.demand.model, self.demand.member, members, self.ranks, bool(self.gpus_each))

    def plan(self) -> Plan:
        """Return the plan. Raises: PlacementError."""
        demand, spec, ranks, size = self.demand, self.spec, self.ranks, self.size
        self._check_kinds()
        self._check_partners()
        rooms = self._rooms()
        if spec.workers != "auto":  # whoever asks for a number gets it; the packs are as small as it takes
            rooms = [replace(room, most=len(room.node.gpus) if self.gpus_each else room.node.cpus) for room in rooms]
        gangs = self._gangs(rooms)
        cpus_each = self._cpus(rooms, gangs * size)
        self._check(gangs * size, cpus_each)
        largest = max(self._at_once(group) for group in demand.groups)
        per_pack = self._per_pack(rooms, gangs, cpus_each, largest)
        packs = demand.groups if demand.places is not None else tuple(
            tuple(pack) for group in demand.groups for pack in _split(group, per_pack * self.groups)
        )
        if spec.workers == "auto" and len(packs) < gangs:  # there is nothing for the others to do
            gangs = len(packs)
            cpus_each = self._cpus(rooms, gangs * size)
        biggest = math.ceil(max(map(self._at_once, packs)) / self.groups)
        parts = self.parts(biggest)
        cpus_each, later = self._later(parts, gangs, cpus_each)
        if spec.cpus_per_worker == "auto":
            self.reasons.append(f"{cpus_each} CPU(s) per worker: an even share of {self.inventory.cpus}")
        strategy = "shard" if ranks > 1 else "pack" if gangs == 1 and biggest > 1 else "replicate"
        self.reasons.append(f"about {parts.total / 1e9:.2f} GB per worker with {biggest} member(s) in one forward")
        return Plan(
            gangs, cpus_each, self.gpus_each, packs, parts, tuple(self.reasons), strategy, size, spec.data_parallel,
            later, demand.places,
        )

    def _later(self, parts: Parts, workers: int, cpus_each: int) -> tuple[int, int]:
        """Return the cores of a worker, and how many more of them the jobs have that begin when members are finished.

        On cores a worker of training is not made smaller for them. All workers have as many, since threads decide last
        bits.
        """
        if self.spec.workers != "auto" or self.inventory.in_process or self.size > 1:
            return cpus_each, 0
        rooms = rooms_of(self.inventory, parts, bool(self.gpus_each), False, [])
        least = self.spec.cpus_per_worker if isinstance(self.spec.cpus_per_worker, int) else 1
        in_all = min(self.demand.later_jobs, capacity(rooms, least if self.gpus_each else cpus_each))
        if in_all <= workers:
            return cpus_each, 0
        self.reasons.append(
            f"{in_all - workers} more worker(s) when all members are finished, for {self.demand.later_jobs} shards of "
            "answers"
        )
        return self._cpus(rooms, in_all) if self.gpus_each else cpus_each, in_all - workers

    def _rooms(self) -> list[Room]:
        """Return every node's room for workers with one member each, or with a bracket's places where they fit."""
        def rooms(members: int) -> list[Room]:
            return rooms_of(self.inventory, self.parts(members), bool(self.gpus_each), self.ranks > 1, self.reasons)

        if self.demand.places is not None:
            found = rooms(max(map(self._at_once, self.demand.groups)))
            if any(room.most for room in found):
                return found
        return rooms(1)

    def _at_once(self, units: Sequence[str]) -> int:
        """Return how many of some units train at once."""
        return len(units) if self.demand.places is None else min(len(units), self.demand.places)

    def _check_partners(self) -> None:
        """Refuse several processes per member where they cannot be had."""
        partners, spec, size = self.spec.data_parallel, self.spec, self.size
        if partners == 1:
            return
        if self.inventory.in_process:
            raise PlacementError(
                "placement.data_parallel trains a member on several processes, and this run has one",
                "run it on Ray (without --local), or use placement.data_parallel 1",
            )
        if size % partners or (isinstance(spec.workers, int) and spec.workers % size):
            raise PlacementError(
                f"placement.data_parallel: {partners} workers are to train the same members, which does not divide "
                + (f"{size} placement.ranks" if size % partners else f"{spec.workers} placement.workers"),
                "use a multiple of it",
            )
        self.reasons.append(f"{partners} workers train the same members, each on its part of every batch: as asked")

    def _check_kinds(self) -> None:
        """Refuse a kind of worker that there cannot be one of."""
        cpus = self.spec.cpus_per_worker if isinstance(self.spec.cpus_per_worker, int) else 1
        if self.gpus_each > self.inventory.gpus or cpus > max(node.cpus for node in self.inventory.nodes):
            self._check(1 if self.spec.workers == "auto" else self.spec.workers, cpus)
            raise PlacementError(
                f"placement.cpus_per_worker: {cpus} CPU(s) are more than any node of {self.inventory.where} has",
                "lower placement.cpus_per_worker",
            )

    def _gangs(self, rooms: Sequence[Room]) -> int:
        """Return how many workers there are: processes, or gangs of them."""
        spec, ranks, reasons = self.spec, self.size, self.reasons
        if spec.workers != "auto":
            reasons.append(f"{spec.workers} worker(s): as asked")
            self._note_span(rooms)
            return spec.workers // self.size
        if self.inventory.in_process:
            reasons.append("1 worker: all of the run is in this process")
            return 1
        cpus = spec.cpus_per_worker if isinstance(spec.cpus_per_worker, int) else 1
        slots, unit = capacity(rooms, cpus), "GPU" if self.gpus_each else "CPU"
        if slots < ranks:
            self._refuse_size(room_bytes(self.inventory, bool(self.gpus_each)) // (1 if self.gpus_each else ranks))
        self._note_span(rooms)
        if ranks > 1:
            within = sum(room.workers(cpus) // ranks for room in rooms)
            gangs = max(1, min(within or slots // ranks, math.ceil(self.demand.units / self.groups)))
            reasons.append(f"{gangs * ranks} worker(s) in {gangs} gang(s) of {ranks}: one per {unit}")
            return gangs
        each = "member" if self.demand.places is None else "bracket"
        most = self.demand.units if self.demand.places is None else len(self.demand.groups)
        workers = min(slots, most)
        by_cores = sum((len(room.node.gpus) if self.gpus_each else room.node.cpus // cpus) for room in rooms)
        short = workers == slots < min(by_cores, most) and not self.gpus_each
        why = "more do not fit into memory" if short else f"one per {unit}, at most one per {each}"
        reasons.append(f"{workers} worker(s): {why}")
        return workers

    def _note_span(self, rooms: Sequence[Room]) -> None:
        if self.size > 1 and spans_nodes(rooms, self.size):
            obstacle = network_obstacle(self.inventory)
            if obstacle:
                raise PlacementError(f"placement.ranks: {obstacle}", "use as many ranks as one node has room for")
            self.reasons.append(f"a gang of {self.ranks} is on several nodes: blocks are gathered over the network")

    def _cpus(self, rooms: Sequence[Room], workers: int) -> int:
        """Return the largest even share of the cores with which the nodes hold so many workers."""
        if self.spec.cpus_per_worker != "auto":
            return self.spec.cpus_per_worker
        most = max(node.cpus for node in self.inventory.nodes)
        return next((c for c in range(most, 1, -1) if capacity(rooms, c) >= workers), 1)

    def _check(self, workers: int, cpus_each: int) -> None:
        """Refuse more workers than there are cores and GPUs for."""
        nodes, gpus_each, inventory = self.inventory.nodes, self.gpus_each, self.inventory
        most = sum(min(n.cpus // cpus_each, len(n.gpus) if gpus_each else n.cpus) for n in nodes)
        if workers <= most:
            return
        need = f"{workers} worker(s) of {cpus_each} CPU(s)" + (f" and {gpus_each} GPU" if gpus_each else "")
        lower = "placement.gpus_per_worker" if gpus_each > inventory.gpus else "placement.cpus_per_worker"
        raise PlacementError(
            f"placement: {need} are asked for, but {inventory.where} has "
            f"{inventory.cpus} CPU(s) and {inventory.gpus} GPU(s)",
            f"set placement.workers to at most {most}, or to auto" if most else f"lower {lower}",
        )

    def _per_pack(self, rooms: Sequence[Room], gangs: int, cpus_each: int, largest: int) -> int:
        """Return how many members one process trains in one forward."""
        shared = 0 if self.gpus_each or self.ranks > 1 else self.parts(0).shared
        share = largest_share(rooms, gangs * self.size, cpus_each, shared, bool(self.gpus_each))
        fits = self._most_members(share + shared, largest)
        if self.demand.places is not None:
            if fits < 1:
                self._refuse_size(share + shared)
            if fits < largest:
                raise PlacementError(
                    f"ensemble.pruning.places: {largest} members are to train in one forward, and {fits} fit",
                    f"use {fits}, or more memory: places decide who is pruned, so no plan changes them",
                )
            self.reasons.append(f"{largest} member(s) per forward: the places of a bracket, as asked")
            return largest
        if self.spec.members_per_worker != "auto":
            if fits < self.spec.members_per_worker:
                self.reasons.append(
                    f"warning: {self.spec.members_per_worker} members in one forward may not fit; about {fits} do"
                )
            return self.spec.members_per_worker
        if fits < 1:
            self._refuse_size(share + shared)
        wanted = math.ceil(largest / (gangs * self.groups))
        packed = min(wanted, fits)
        self.reasons.append(
            f"{packed} member(s) per forward: " + ("an even share" if packed == wanted else f"{wanted} do not fit")
        )
        return packed

    def _most_members(self, room_bytes: int, largest: int) -> int:
        """Return how many members fit into so many bytes, at most as many as a group has."""
        low, high = 0, max(largest, self.spec.members_per_worker if self.spec.members_per_worker != "auto" else 0)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.parts(middle).total <= room_bytes else (low, middle - 1)
        return low

    def _gathered_in_parts(self) -> int:
        """Return what would be gathered if the output layer were passed in parts, if it can be."""
        model = replace(self.demand.model, output_in_parts=self.demand.model.output_part_bytes > 0)
        return parts_of(model, self.demand.member, 1, self.ranks, bool(self.gpus_each)).gathered

    def _refuse_size(self, room_bytes: int) -> NoReturn:
        need, unit = self.parts(1), "GPU" if self.gpus_each else "worker"
        where = f" over {self.ranks} ranks" if self.ranks > 1 else ""
        largest = sorted(((size, name) for name, size in need.by_name().items()), reverse=True)[:3]
        named = ", ".join(f"{name} {size / 1e9:.1f}" for size, name in largest)
        model, member = self.demand.model, self.demand.member
        recomputed = activation_bytes(model, member, bool(self.gpus_each), recomputed=True)
        if not member.recomputed and recomputed < need.activations / 2:
            named += f"; activations would be {recomputed / 1e9:.1f} with placement.recompute: true"
        in_parts = self._gathered_in_parts()
        if in_parts < need.gathered:
            named += f"; gathered would be {in_parts / 1e9:.1f} with placement.output_layer: parts"
        raise _DoesNotFit(
            f"placement: one member needs about {need.total / 1e9:.1f} GB{where} ({named}), "
            f"a {unit} has {room_bytes / 1e9:.1f} GB to be filled",
            "lower evaluation.batch or evaluation.generation.max_new_tokens, or quantize the base"
            if need.answers > need.activations + need.logits else
            "lower optimization.micro_batch or task.max_length, or quantize the base",
        )


def _split(group: Sequence[str], per_pack: int) -> list[list[str]]:
    """Split evenly: 5 in packs of at most 3 are 3 + 2, of at most 4 are 3 + 2 too."""
    return even_parts(group, math.ceil(len(group) / per_pack))
