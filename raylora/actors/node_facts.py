"""What every node of a cluster has and sees, asked on the node itself."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass, field

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylora.actors.worker import this_node
from raylora.store.probe import Sighting, look_for_probe

PACKAGES = ("raylora", "ray", "torch", "transformers", "deepspeed", "bitsandbytes", "peft")


@dataclass(frozen=True)
class NodeFacts:
    """One node's answer."""

    node: str
    versions: dict[str, str] = field(default_factory=dict)
    """``python`` and the packages; one that is missing is not in it."""
    gpus: tuple[str, ...] = ()
    """Name and memory of each device."""
    sighting: Sighting | None = None
    """What it finds where the storage path should be, if it was asked."""
    silence: str = ""
    """Why it did not answer, if it did not."""


def versions_here() -> dict[str, str]:
    """Return what is installed in this process's environment."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def ask_nodes(uri: str, nonce: str, timeout_s: float) -> list[NodeFacts]:
    """Ask every living node of the connected cluster, those without cores too.

    Args:
        uri: a storage path in which the nonce lies, or nothing.
    """
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            reference = _facts.options(scheduling_strategy=there).remote(uri, nonce)
            asked[reference] = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    return [_answer(reference, name, reference in done, timeout_s) for reference, name in asked.items()]


def _answer(reference: ray.ObjectRef, name: str, is_done: bool, timeout_s: float) -> NodeFacts:
    if not is_done:
        ray.cancel(reference, force=True)
        return NodeFacts(name, silence=f"it has not answered within {timeout_s:.0f} s")
    try:
        found: NodeFacts = ray.get(reference)
        return found
    except ray.exceptions.RayError as error:
        return NodeFacts(name, silence=str(error).strip().splitlines()[-1])


@ray.remote(num_cpus=0, max_retries=0)
def _facts(uri: str, nonce: str) -> NodeFacts:
    import torch

    devices = range(torch.cuda.device_count())
    gpus = tuple(
        f"{torch.cuda.get_device_name(n)}, {torch.cuda.get_device_properties(n).total_memory / 1e9:.0f} GB"
        for n in devices
    )
    sighting = look_for_probe(uri, nonce, this_node()) if uri else None
    return NodeFacts(this_node(), versions_here(), gpus, sighting)
