"""What there is to compute with: nodes, their cores and memory, and each GPU by itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One device, or the part of it that a run may fill."""

    memory_bytes: int
    share: float = 1.0
    """What part of the memory is this run's."""

    @property
    def free_bytes(self) -> int:
        """The memory that this run may count on."""
        return int(self.memory_bytes * self.share)


@dataclass(frozen=True)
class Node:
    """One machine."""

    name: str
    cpus: int
    memory_bytes: int
    """Main memory."""
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Inventory:
    """The nodes that a run may use."""

    nodes: tuple[Node, ...]
    where: str = "this machine"
    in_process: bool = False
    """Nothing but this process computes: more than one worker would take turns."""
    network_gbit_s: float | None = None
    """What the nodes are joined by; None where it is not known."""
    assumed: tuple[str, ...] = ()
    """What was not known and had to be supposed."""

    @property
    def cpus(self) -> int:
        """All cores."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return sum(len(node.gpus) for node in self.nodes)


def one_node(
    cpus: int, gpus: int, memory_bytes: int, gpu_bytes: int = 0, where: str = "this machine", in_process: bool = False
) -> Inventory:
    """Return a machine of its own, whose GPUs are all alike."""
    node = Node(where, cpus, memory_bytes, (Gpu(gpu_bytes),) * gpus)
    return Inventory((node,), where, in_process)
