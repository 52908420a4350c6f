"""The way into a Ray cluster: which one, what it has, and the coordinators that are in it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError
from ray.util import list_named_actors

from raylora.actors.coordinator import NAMESPACE, RAY_ADDRESS, coordinator_name
from raylora.engine.run.plan_run import local_inventory
from raylora.errors import PlacementError, RunDirectoryError
from raylora.placement.inventory import Gpu, Inventory, Node
from raylora.store.run_store import RunStore

_ACCELERATOR = "accelerator_type:"
"""What Ray calls a resource that every node with GPUs of a kind has."""
_RAYLET = re.compile(r"raylet .*--gcs-address=(\S+)")


def find_run(run: str) -> str:
    """Join the cluster that a run is in, and return the name of its coordinator.

    Raises:
        RunDirectoryError: no such run is running in any cluster that can be found, or several are.
    """
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        connect()
        found = _coordinators_of(run)
    else:
        found = _search(run)
    if len(found) != 1:
        raise RunDirectoryError(
            f"{len(found)} runs are called {run!r}" if found else f"no run {run!r} is running in this cluster",
            "give its directory, as `raylora status DIRECTORY` takes it; that reads what a run has written",
        )
    return found[0]


def _search(run: str) -> list[str]:
    """Look for a run in the cluster that its directory names, else in every one on this machine; stay in the last."""
    holder = RunStore(run).holder()
    named = holder.facts.get(RAY_ADDRESS) if holder is not None else None
    addresses = [named] if named else _local_clusters()
    for address in addresses:
        ray.shutdown()
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError):
            continue
        found = _coordinators_of(run)
        if found:
            return found
    if ray.is_initialized():
        return []
    raise RunDirectoryError(
        f"no run {run!r} is running: there is no Ray cluster on this machine, and RAY_ADDRESS names none",
        f"`raylora status {run}` reads what a run has written; `raylora resume {run}` goes on",
    )


def _local_clusters() -> list[str]:
    """Return the addresses of the clusters on this machine, as their processes' command lines say."""
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    found = [match[1] for command in commands if (match := _RAYLET.search(command))]
    return sorted(set(found))


def _coordinators_of(run: str) -> list[str]:
    wanted = {coordinator_name(run), coordinator_name(RunStore(run).uri)}
    going_on = [a["name"] for a in list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
    return [name for name in going_on if name in wanted or name.rpartition("-")[0] == f"coordinator-{run}"]


def connect(dashboard: bool = False) -> None:
    """Join the cluster of ``RAY_ADDRESS``, or start a local one; do nothing if already connected."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    if address:
        ray.init(address=address, **options)
        return
    inventory = local_inventory()
    ray.init(
        address="local", num_cpus=inventory.cpus, num_gpus=inventory.gpus, include_dashboard=dashboard, **options
    )


def connect_to_running() -> None:
    """Join the cluster of ``RAY_ADDRESS``, unless this process is in one. Raises: PlacementError if there is none."""
    if ray.is_initialized():
        return
    hint = "set RAY_ADDRESS to the cluster's address, such as 10.0.0.1:6379"
    if not os.environ.get("RAY_ADDRESS"):
        raise PlacementError("no cluster: RAY_ADDRESS names none", hint)
    try:
        connect()
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise PlacementError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: {first}", hint) from error


def cluster_inventory() -> Inventory:
    """Return what the connected cluster has in all, node by node, whoever uses it now."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes, assumed = nodes_of(alive, lambda kind: int(ray.get(_device_memory(kind))))
    return Inventory(nodes, "the cluster", assumed=assumed)


def nodes_of(
    alive: Sequence[Mapping[str, Any]], memory_of: Callable[[str | None], int]
) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """Return the nodes that Ray tells of, and what had to be assumed of their GPUs.

    Args:
        memory_of: looks up a device's bytes on a node with GPUs of a kind, or of no known kind.
    """
    found: dict[str | None, int] = {}
    nodes, assumed = [], []
    for node in alive:
        has = node["Resources"]
        kind = next((name for name in has if name.startswith(_ACCELERATOR)), None)
        gpus = int(has.get("GPU", 0))
        if gpus and kind not in found:
            found[kind] = memory_of(kind)
            if kind is None:
                assumed.append(f"all GPUs whose kind Ray does not know have {found[kind] / 1e9:.0f} GB, as the first")
        if has.get("CPU", 0) >= 1:
            devices = (Gpu(found[kind]),) * gpus if gpus else ()
            nodes.append(Node(str(node["NodeManagerAddress"]), int(has["CPU"]), int(has.get("memory", 0)), devices))
    return tuple(nodes) or (Node("the cluster", 0, 0),), tuple(assumed)


def _device_memory(kind: str | None) -> Any:
    """Ask a node with such GPUs what one of them holds."""
    needed = {kind: 0.001} if kind is not None else {}
    return _first_device_bytes.options(resources=needed).remote()


@ray.remote(num_cpus=0, num_gpus=1)
def _first_device_bytes() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def inventory_of_cluster() -> Inventory | None:
    """Return what the cluster has that would be used; None for a local one, which is not started yet."""
    if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
        return None
    connect()
    return cluster_inventory()


def clear_name(name: str, run: str) -> None:
    """Make sure no coordinator of that name is at work; one that has finished is put away."""
    with contextlib.suppress(ValueError, RayActorError):  # no such actor, or it is just going
        coordinator = ray.get_actor(name, namespace=NAMESPACE)
        status: Any = ray.get(coordinator.status.remote())
        if not status.phase.terminal:
            raise RunDirectoryError(f"run {run!r} is already running in this cluster", "follow it: raylora status")
        put_away(coordinator, name)


def put_away(coordinator: Any, name: str) -> None:
    """Kill a finished coordinator and wait until its name is free."""
    ray.kill(coordinator)
    with contextlib.suppress(ValueError):
        for _ in range(100):
            ray.get_actor(name, namespace=NAMESPACE)
            time.sleep(0.1)
