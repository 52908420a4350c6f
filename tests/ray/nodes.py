"""A cluster of several nodes on this machine, for drivers of their own: ``python tests/ray/nodes.py SCENARIO SPEC...``.

A scenario prints one JSON document. It runs in a process of its own, since a process is in one cluster only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util import list_named_actors

from raylora import launch, read_spec
from raylora.control import WorkerState
from raylora.handle import RunHandle

_TRIES = 3


def strangers(spec: str) -> dict[str, Any]:
    """Train on a node with a folder and a cache of its own: what the spec names is only where the driver is."""
    cluster = cluster_of(head_cpus=0)  # its processes start where this one is
    here, there = Path.cwd(), Path(spec).parent / "there"
    there.mkdir()
    os.chdir(there)
    cluster.add_node(num_cpus=2, env_vars={"RAYLORA_CACHE": str(there / "cache")})
    os.chdir(here)
    handle = launch(read_spec(spec))
    news: list[str] = []
    metrics = handle.wait(lambda status: news.extend(text for text in status.news if text not in news))
    copies = [path.relative_to(there).as_posix() for path in (there / "cache/inputs").rglob("*.safetensors")]
    pids = {handle.store.read_json(f"timing/{name}")["pid"] for name in handle.store.storage.list("timing")}
    return {
        "phase": metrics["run"]["phase"], "news": news, "copies": copies, "processes": len(pids), "run": handle.uri,
    }


def cluster_of(head_cpus: int) -> Cluster:
    """Start a head and connect to it; a busy machine can start Ray too slowly for its own time limits."""
    for attempt in range(_TRIES):
        try:
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus, "include_dashboard": False})
            ray.init(address=cluster.address, namespace="raylora", log_to_driver=False, logging_level="ERROR")
            return cluster
        except Exception:
            ray.shutdown()
            if attempt == _TRIES - 1:
                raise
    raise AssertionError


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 150) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited too long until {what}"
        time.sleep(0.1)
    return found


def busy(handle: RunHandle) -> int:
    """Return how many workers train."""
    jobs = [job.progress for job in handle.status().jobs.values() if job.status.value == "running"]
    return sum(progress is not None and progress.done > 0 for progress in jobs)


def nodes_of(handle: RunHandle) -> dict[str, str]:
    return handle.status().nodes


def grow_and_lose(spec: str) -> dict[str, Any]:
    """Begin without a core, on a head that has none; grow to three nodes, lose one while it trains, and finish."""
    cluster = cluster_of(head_cpus=0)
    handle = launch(read_spec(spec))
    wait_for(lambda: handle.status().workers, "the run is under way")
    address = ["--address", cluster.address]
    command = [str(Path(sys.executable).with_name("ray")), "status", *address]
    demand = wait_for(
        lambda: [
            line for line in subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
            if "CPU" in line and "pending" in line
        ],
        "the autoscaler sees what is wanted", 60,
    )
    cluster.add_node(num_cpus=1)
    wait_for(lambda: busy(handle) == 1, "one worker trains on the one node")
    started = {name: state.value for name, state in handle.status().workers.items()}
    added = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    wait_for(lambda: busy(handle) == 3, "three workers train")
    on_three = nodes_of(handle)
    cluster.remove_node(added[0], allow_graceful=False)
    seen: set[str] = set()
    metrics = handle.wait(lambda status: seen.update(state.value for state in status.workers.values()))
    return {
        "demand": demand, "started": started, "on_three": on_three, "phase": metrics["run"]["phase"],
        "seen": sorted(seen), "run": handle.uri,
    }


def gang_over_nodes(spec: str) -> dict[str, Any]:
    """Train with a base that is split over two nodes, kill the node that one rank is on, add another, and finish."""
    cluster = cluster_of(head_cpus=1)
    doomed = cluster.add_node(num_cpus=1)
    handle = launch(read_spec(spec))
    wait_for(lambda: busy(handle) == 1, "the gang trains")
    pids = worker_pids()
    cluster.remove_node(doomed, allow_graceful=False)
    wait_for(lambda: handle.status().workers["worker-0"] is not WorkerState.BUSY, "the loss is noticed")
    cluster.add_node(num_cpus=1)
    metrics = handle.wait(lambda status: None)
    return {"phase": metrics["run"]["phase"], "ranks": len(pids), "run": handle.uri}


def lose_coordinator(spec: str) -> dict[str, Any]:
    """Kill the coordinator while its worker, or gang, trains; the driver only waits."""
    cluster_of(head_cpus=2)
    handle = launch(read_spec(spec))
    wait_for(lambda: busy(handle) == 1, "the worker trains")
    before = workers_of(handle)
    wait_for(lambda: handle.store.storage.list("checkpoints/member-000"), "a checkpoint is committed")
    kill_coordinator()
    after: list[list[float]] = []

    def on_status(status: Any) -> None:
        if not after and len(starts_of(handle)) == 2 and status.workers.get("worker-0") is WorkerState.BUSY:
            after.extend(workers_of(handle))

    metrics = handle.wait(on_status)
    time.sleep(1)
    return {
        "phase": metrics["run"]["phase"], "starts": len(starts_of(handle)), "run": handle.uri, "before": before,
        "after": after, "left": left_behind(),
    }


def kill_coordinator() -> None:
    (pid,) = [pid for pid, title in titles().items() if "coordinator" in title.lower() and ours(title)]
    os.kill(pid, signal.SIGKILL)


def starts_of(handle: RunHandle) -> list[Any]:
    return [event for event in handle.store.read_events() if event["event"] == "RunStarted"]


def workers_of(handle: RunHandle) -> list[list[float]]:
    """Return process and time of loading of the run's workers."""
    names = [actor["name"] for actor in list_named_actors(all_namespaces=True) if "-worker-" in actor["name"]]
    found = [ray.get(ray.get_actor(name, namespace="raylora").facts.remote()) for name in sorted(names)]
    return [[facts.pid, facts.loaded_at] for facts in found]


def left_behind() -> list[str]:
    """Return raylora's actors that are in the cluster, and those of its processes that are there."""
    named = [actor["name"] for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == "raylora"]
    return [*named, *filter(ours, titles().values())]


def ours(title: str) -> bool:
    """Return whether a process is an actor of raylora, at work or idle."""
    names = ("raylora:", "Coordinator", "Keeper", "Worker", "Preparer")
    return title.startswith(tuple(f"ray::{name}" for name in names))


def titles() -> dict[int, str]:
    import psutil

    found = {p.pid: " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])}
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    return {pid: title for pid, title in found.items() if pid in mine}


def worker_pids() -> list[int]:
    return [pid for pid, title in titles().items() if title.startswith("ray::raylora:") and "[member-" in title]


if __name__ == "__main__":
    scenarios = {
        "grow": grow_and_lose, "gang": gang_over_nodes, "coordinator": lose_coordinator, "strangers": strangers,
    }
    scenario = scenarios[sys.argv[1]]
    print(json.dumps(scenario(sys.argv[2])), flush=True)
