"""Where a run's workers are put: each by itself, as soon as the cluster has room for it.

Members are independent, so nobody waits for a place for all workers. What has no room yet is a demand that Ray's
autoscaler sees. Only the ranks of a gang, which share a base or a member, are placed together.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylora import logs
from raylora.actors.calls import WorkerHandle
from raylora.errors import PlacementError
from raylora.placement.plan import Plan
from raylora.spec import PlacementSpec


@dataclass
class Placing:
    """Starts workers' actors, and knows which of them have a place."""

    plan: Plan
    spec: PlacementSpec
    namespace: str
    worker_class: Any
    name: str
    """What actors' names begin with."""
    run: str
    """What people call the run."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Worker -> the nodes that it is on; a worker without a place is not in it."""
    _groups: dict[str, Any] = field(default_factory=dict)
    _arriving: dict[Any, str] = field(default_factory=dict)
    _starts: int = 0
    _short_since: float | None = None

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray is asked for, for one process."""
        gpus = {"GPU": float(self.plan.gpus_per_worker)} if self.plan.gpus_per_worker else {}
        return {"CPU": float(self.plan.cpus_per_worker), **gpus, **self.spec.resources}

    def start(self, worker: str, arguments: tuple[Any, ...]) -> WorkerHandle:
        """Start a worker's processes; they exist once there is room for all of them."""
        plan, self._starts = self.plan, self._starts + 1
        self.leave(worker)
        group = None
        if plan.ranks > 1:
            group = placement_group([self.bundle] * plan.ranks, strategy=self.spec.scheduling)
            self._groups[worker] = group
        actors = [self._actor(worker, rank, group, arguments) for rank in range(plan.ranks)]
        handle = WorkerHandle(worker, actors, plan.partners, plan.strategy == "shard", self.run)
        self._arriving.update({actor.node.remote(): worker for actor in actors})
        return handle

    def _actor(self, worker: str, rank: int, group: Any, arguments: tuple[Any, ...]) -> Any:
        # A coordinator that was restarted may meet the names of its predecessor's workers.
        plan, name = self.plan, f"{self.name}-{worker}-{os.getpid()}-{self._starts}"
        # Equal threads are equal float sums: without this every worker would use all cores.
        environment = {"OMP_NUM_THREADS": str(plan.cpus_per_worker), **logs.environment()}
        if plan.ranks > 1:  # what a block was gathered into goes back to the system, not to the heap
            environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        spread = "SPREAD" if self.spec.scheduling.endswith("SPREAD") else "DEFAULT"
        return self.worker_class.options(
            name=name if plan.ranks == 1 else f"{name}-rank-{rank}",
            namespace=self.namespace,
            num_cpus=plan.cpus_per_worker,
            num_gpus=plan.gpus_per_worker,
            resources=self.spec.resources or None,
            scheduling_strategy=spread if group is None else PlacementGroupSchedulingStrategy(group, rank),
            runtime_env={"env_vars": environment},
        ).remote(*arguments)

    def look(self) -> None:
        """Take note of the workers that have got a place since.

        Raises:
            PlacementError: there have been too few for too long.
        """
        if self._arriving:
            done, _ = ray.wait(list(self._arriving), num_returns=len(self._arriving), timeout=0)
            for reference in done:
                worker = self._arriving.pop(reference)
                try:
                    node = ray.get(reference)
                except ray.exceptions.RayError:  # lost before it said a word: its load says the same
                    continue
                known = self.nodes.get(worker)
                self.nodes[worker] = node if known in (None, node) else f"{known}, {node}"
        self._check_patience()

    def _check_patience(self) -> None:
        """Give up where fewer workers have a place than the run is to begin with, or none is left, for too long."""
        waiting = set(self._arriving.values())
        wanted = self.spec.min_workers or 1
        if len(self.nodes) >= wanted or not waiting:
            self._short_since = None
            return
        now = time.monotonic()
        self._short_since = self._short_since or now
        if now - self._short_since > self.spec.start_timeout_s:
            free = {k: v for k, v in ray.available_resources().items() if k in self.bundle}
            processes = wanted * self.plan.ranks
            raise PlacementError(
                f"placement: {processes} x {self.bundle} were not free within {self.spec.start_timeout_s:.0f} s; "
                f"free now: {free}",
                "wait for other work to end, ask for less, or raise placement.start_timeout_s",
            )

    def leave(self, worker: str) -> None:
        """Give a worker's place back; its processes are ended already."""
        self.nodes.pop(worker, None)
        self._arriving = {ref: name for ref, name in self._arriving.items() if name != worker}
        group = self._groups.pop(worker, None)
        if group is not None:
            remove_placement_group(group)

    def leave_all(self) -> None:
        """Give all places back."""
        for worker in [*self.nodes, *self._groups]:
            self.leave(worker)
