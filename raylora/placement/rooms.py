"""How many workers each node has room for, by its cores, its devices and its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raylora.placement.estimate import Parts
from raylora.placement.inventory import Inventory, Node

USABLE = 0.8
"""Share of a memory that a plan fills; the rest is for what is not foreseen."""
_LEAST_NETWORK_GBIT_S = 10.0
"""What a gang on several nodes needs: every block of the base crosses the network twice in a step."""


@dataclass(frozen=True)
class Room:
    """What one node has for workers of a kind."""

    node: Node
    most: int
    """Workers that its memory or its devices hold, each with one member at least."""
    device_bytes: int = 0
    """What the smallest of its devices in use may be filled with; 0 where workers compute on cores."""

    def workers(self, cpus_each: int) -> int:
        """Return how many workers of so many cores it holds."""
        return min(self.most, self.node.cpus // cpus_each)


def capacity(rooms: Sequence[Room], cpus_each: int) -> int:
    """Return how many workers of so many cores there can be in all."""
    return sum(room.workers(cpus_each) for room in rooms)


def rooms_of(inventory: Inventory, one: Parts, on_gpu: bool, is_split: bool, reasons: list[str]) -> list[Room]:
    """Return every node's room for workers that need ``one``, with one member each.

    GPUs that are too small for it are left out, which ``reasons`` then say; a node in which none fits has no room.
    """
    if not on_gpu:
        return [Room(node, _on_cores(node, one, is_split)) for node in inventory.nodes]
    rooms, small = [], []
    for node in inventory.nodes:
        large = [gpu.free_bytes for gpu in node.gpus if gpu.free_bytes * USABLE >= one.total]
        small += [f"{node.name}: {gpu.free_bytes / 1e9:.0f} GB" for gpu in node.gpus if gpu.free_bytes not in large]
        rooms.append(Room(node, len(large), int(min(large, default=0) * USABLE)))
    if small and any(room.most for room in rooms):
        reasons.append(
            f"{len(small)} GPU(s) are left out ({', '.join(small[:4])}): one member needs {one.total / 1e9:.1f} GB. "
            "Keep them out of the cluster: Ray does not tell GPUs apart"
        )
    return rooms


def _on_cores(node: Node, one: Parts, is_split: bool) -> int:
    """Return how many workers a node's main memory holds, which share the pages of a base that is not split."""
    shared = 0 if is_split else one.shared
    return max(0, int((node.memory_bytes * USABLE - shared) // max(1, one.total - shared)))


def largest_share(rooms: Sequence[Room], workers: int, cpus_each: int, shared: int, on_gpu: bool) -> int:
    """Return what every one of so many workers may fill beyond what those of a node share: by the tightest node.

    Nodes are filled one after another, as Ray packs workers.
    """
    shares, left = [], workers
    for room in rooms:
        here = min(left, room.workers(cpus_each))
        if here:
            share = room.device_bytes if on_gpu else (room.node.memory_bytes * USABLE - shared) / here
            shares.append(int(share))
            left -= here
    return min(shares, default=0)


def room_bytes(inventory: Inventory, on_gpu: bool) -> int:
    """Return what the largest device, or the largest main memory, may be filled with."""
    if on_gpu:
        return int(max((gpu.free_bytes for node in inventory.nodes for gpu in node.gpus), default=0) * USABLE)
    return int(max(node.memory_bytes for node in inventory.nodes) * USABLE)


def spans_nodes(rooms: Sequence[Room], ranks: int) -> bool:
    """Return whether no node holds a gang of so many ranks."""
    return max((room.workers(1) for room in rooms), default=0) < ranks


def network_obstacle(inventory: Inventory) -> str:
    """Return why no gang can be on several nodes, or nothing if it can, as far as is known."""
    speed = inventory.network_gbit_s
    if speed is None or speed >= _LEAST_NETWORK_GBIT_S:
        return ""
    return (
        f"a gang would be on several nodes, whose network has {speed:g} Gbit/s; "
        f"gathering blocks needs {_LEAST_NETWORK_GBIT_S:g} at least"
    )
