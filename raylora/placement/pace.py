"""How fast a plan would be, from what its workers compute and move in a second: a pure function, as good as those."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raylora.placement.inventory import Inventory
from raylora.placement.plan import Demand, Plan

_FLOP_PER_PARAMETER = 4
"""Per token: two in the forward pass, two for the gradient of the activations; a frozen weight has none."""
_TURNS = 2
"""Through the parts of an output layer, for each chunk of positions: its logits, and the gradient of its states."""
_MUCH_FASTER = 0.9
"""Another way to hold the base has to take less than this part of the time: rates are not better known than that."""


@dataclass(frozen=True)
class Rates:
    """What one worker reaches on average, not at best."""

    flops: float
    """Floating-point operations in a second."""
    bytes_per_s: float
    """Of its memory."""
    link_gbit_s: float = 256.0
    """Between two devices of a node: what PCIe 4 has."""
    source: str = "supposed"
    """Where the numbers come from, in a word or two."""


GPU_RATES = Rates(flops=150e12, bytes_per_s=1.5e12)
"""A data-center GPU in bfloat16; what an H100 was measured at is in docs/benchmarks.md."""
CORE_RATES = Rates(flops=50e9, bytes_per_s=5e9)
"""One core of a processor."""


@dataclass(frozen=True)
class Pace:
    """The time of one step of the largest pack, and of one step of every unit."""

    compute_s: float
    """Products with the frozen base's weights."""
    weights_s: float
    """Reading the weights, and dequantizing those that are quantized; the same for one member as for many."""
    gather_s: float
    """Of a split base: every block, once in the forward and once in the backward pass, and the parts of an output layer
    that is passed in parts; no overlap is supposed."""
    tokens_per_s: float
    """Of all workers together."""
    round_s: float
    """Until every unit has taken one step, pack after pack where there are more packs than workers."""

    @property
    def step_s(self) -> float:
        """One step of the largest pack."""
        return self.compute_s + self.weights_s + self.gather_s


def rates_of(plan: Plan, tflops: float | None = None) -> Rates:
    """Return the rates of a plan's workers: supposed ones, or those with a given number of 10^12 operations."""
    own = GPU_RATES if plan.gpus_per_worker else Rates(
        CORE_RATES.flops * plan.cpus_per_worker, CORE_RATES.bytes_per_s * plan.cpus_per_worker
    )
    if tflops is None:
        return own
    return Rates(tflops * 1e12, own.bytes_per_s, own.link_gbit_s, "as given")


def pace_of(demand: Demand, plan: Plan, inventory: Inventory, rates: Rates) -> Pace:
    """Return how fast a plan would be whose processes reach such rates.

    Only the frozen base counts: adapters, attention's T x T and the update are left out.
    """
    model, groups = demand.model, plan.ranks // plan.partners
    members = [math.ceil(plan.at_once(pack) / groups) for pack in plan.packs]
    parameters = model.block_parameters + (model.head_parameters if demand.member.has_token_logits else 0)
    passes = 3 if demand.member.recomputed else 2
    per_member_s = _FLOP_PER_PARAMETER * passes / 2 * parameters * demand.member.tokens / plan.partners / rates.flops
    moved = model.block_bytes + model.embedding_bytes
    if model.workspace_bytes:  # quantized: written once as numbers, and read again
        moved += 2 * model.compute_bytes * model.block_parameters
    weights_s = passes * moved / rates.bytes_per_s
    most = max(members, default=0)
    gather_s = _gather_s(demand, plan, inventory, rates, passes, most) if plan.strategy == "shard" else 0.0
    steps = sorted((per_member_s * count + weights_s + gather_s for count in members), reverse=True)
    ends = [0.0] * max(1, plan.workers)
    for step_s in steps:  # the longest first, to whoever is free
        ends[ends.index(min(ends))] += step_s
    round_s = max(ends)
    tokens = demand.units * demand.member.tokens
    return Pace(
        per_member_s * most, weights_s, gather_s, tokens / round_s if round_s else 0.0, round_s
    )


def _gather_s(
    demand: Demand, plan: Plan, inventory: Inventory, rates: Rates, passes: int, members: int
) -> float:
    largest = max(len(node.gpus) if plan.gpus_per_worker else node.cpus for node in inventory.nodes)
    link = rates.link_gbit_s
    if plan.ranks > largest:
        link = min(link, inventory.network_gbit_s or link)
    gathered = passes * demand.model.block_bytes
    if demand.model.output_in_parts and demand.member.logit_chunk:
        chunks = math.ceil(members * demand.member.tokens / plan.partners / demand.member.logit_chunk)
        gathered += _TURNS * chunks * demand.model.output_bytes
    moved_bytes = gathered * (plan.ranks - 1) / plan.ranks
    return moved_bytes * 8 / (link * 1e9)


def is_much_faster(one: Pace, other: Pace) -> bool:
    """Return whether the first takes so much less time that the rates' error does not decide it."""
    return one.round_s < _MUCH_FASTER * other.round_s
