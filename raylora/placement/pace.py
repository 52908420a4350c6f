"""How fast a plan would be, from what its workers compute in a second: a pure function, as good as that number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raylora.placement.inventory import Inventory
from raylora.placement.plan import Demand, Plan

_FLOP_PER_PARAMETER = 4
"""Per token: two in the forward pass, two for the gradient of the activations; a frozen weight has none."""
_WITHIN_NODE_GBIT_S = 256.0
"""What is supposed between the devices of one node."""


@dataclass(frozen=True)
class Pace:
    """The time of one step of all workers at once, and what it brings."""

    compute_s: float
    gather_s: float
    """Of a split base: every block, once in the forward and once in the backward pass; no overlap is supposed."""
    tokens_per_s: float
    """Of all workers together."""


def pace_of(demand: Demand, plan: Plan, inventory: Inventory, flops: float) -> Pace:
    """Return how fast a plan would be whose processes reach so many floating-point operations per second.

    Only the frozen base's products are counted: adapters, attention's T x T and dequantizing are left out.
    """
    model, member = demand.model, demand.member
    members = math.ceil(max(map(len, plan.packs)) / plan.ranks)
    tokens = members * member.tokens
    parameters = model.block_parameters + (model.head_parameters if member.has_token_logits else 0)
    compute_s = _FLOP_PER_PARAMETER * parameters * tokens / flops
    largest = max(max(len(node.gpus), 0 if plan.gpus_per_worker else node.cpus) for node in inventory.nodes)
    link = _WITHIN_NODE_GBIT_S
    if plan.ranks > largest:
        link = min(link, inventory.network_gbit_s or link)
    moved_bytes = 2 * model.block_bytes * (plan.ranks - 1) / plan.ranks
    gather_s = moved_bytes * 8 / (link * 1e9)
    processes = min(plan.workers, len(plan.packs)) * plan.ranks
    return Pace(compute_s, gather_s, processes * tokens / (compute_s + gather_s))
