"""Nodes that are not there yet: an autoscaler brings them when workers ask for them."""

from __future__ import annotations

import math
from dataclasses import replace

from raylora.placement.inventory import Gpu, Inventory, Node
from raylora.spec import PlacementSpec

_ANY_BYTES = 2**60
"""The memory of a node that nobody has seen: whatever a worker needs."""


def with_expected_nodes(inventory: Inventory, spec: PlacementSpec) -> Inventory:
    """Return an inventory with room for all workers that a run is to have, where it may begin with fewer.

    Nodes to come are taken to be like the largest that has room for a worker.
    """
    if spec.min_workers is None or not isinstance(spec.workers, int) or inventory.in_process:
        return inventory
    cpus = spec.cpus_per_worker if isinstance(spec.cpus_per_worker, int) else 1
    gpus = (1 if inventory.gpus else 0) if spec.gpus_per_worker == "auto" else spec.gpus_per_worker

    def room(node: Node) -> int:
        return min(node.cpus // cpus, len(node.gpus) if gpus else node.cpus)

    missing = spec.workers - sum(map(room, inventory.nodes))
    if missing <= 0:
        return inventory
    like = max(inventory.nodes, key=room, default=None)
    if like is None or not room(like):
        like = Node("", cpus, _ANY_BYTES, (Gpu(_ANY_BYTES),) * gpus)
        taken = "have whatever memory a worker needs, since none is there to be looked at"
    else:
        taken = f"be like {like.name}"
    count = math.ceil(missing / room(like))
    found = tuple(node for node in inventory.nodes if node.cpus)
    note = f"{missing} worker(s) wait for nodes that are not there yet, which are taken to {taken}"
    nodes = (*found, *(replace(like, name=f"to come {number}") for number in range(count)))
    return replace(inventory, nodes=nodes, assumed=(*inventory.assumed, note))
