"""The keeper actor: owns a run's workers, so that they outlive a coordinator whose process dies.

Ray ends an actor whose owner dies. The keeper does nothing that could end it: it starts what it is asked for, holds it,
and ends everything when there is no coordinator any more, however that went.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylora import logs
from raylora.actors.worker import Worker
from raylora.placement.plan import Plan
from raylora.spec import PlacementSpec

_LOOK_S = 2.0
_ANSWER_S = 10.0
_MISSES = 2
"""What was asked at the moment of a process's death fails as if there were none to come: it is asked once more."""
_NOBODY_S = 120.0
"""So long a keeper waits for its first coordinator."""
KEEPER_RESTARTS = 3


@dataclass(frozen=True)
class Order:
    """What a worker's processes are started with."""

    plan: Plan
    spec: PlacementSpec
    namespace: str
    name: str
    """What actors' names begin with."""
    arguments: tuple[Any, ...]
    """Of the worker."""

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray is asked for, for one process."""
        gpus = {"GPU": float(self.plan.gpus_per_worker)} if self.plan.gpus_per_worker else {}
        return {"CPU": float(self.plan.cpus_per_worker), **gpus, **self.spec.resources}


@ray.remote(num_cpus=0, max_restarts=KEEPER_RESTARTS)
class Keeper:
    """One per run, where its coordinator is. If its own process dies, the workers go with it, and are started anew."""

    def __init__(self, run: str) -> None:
        """Hold nothing yet, and look from now on whether there is a coordinator."""
        self.run = run
        self._actors: dict[str, list[Any]] = {}
        self._groups: dict[str, Any] = {}
        self._coordinator: Any = None
        self._me = ray.get_runtime_context().current_actor
        self._starts = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def __repr__(self) -> str:
        """Return what Ray's dashboard and log lines call it."""
        return f"raylora:{self.run}:keeper"

    def attend(self, coordinator: Any) -> dict[str, list[Any]]:
        """Work for a coordinator, and for nobody else, and return the workers that there are, by name."""
        self._coordinator = coordinator
        return dict(self._actors)

    def start(self, worker: str, order: Order) -> list[Any]:
        """Start a worker's processes, which exist once there is room for all of them, and return them by rank."""
        plan, self._starts = order.plan, self._starts + 1
        self.leave(worker)
        group = None
        if plan.ranks > 1:
            group = placement_group([order.bundle] * plan.ranks, strategy=order.spec.scheduling)
            self._groups[worker] = group
        self._actors[worker] = [self._actor(worker, rank, group, order) for rank in range(plan.ranks)]
        return self._actors[worker]

    def _actor(self, worker: str, rank: int, group: Any, order: Order) -> Any:
        # A keeper that was restarted may meet the names of its predecessor's workers.
        plan, name = order.plan, f"{order.name}-{worker}-{os.getpid()}-{self._starts}"
        # Equal threads are equal float sums: without this every worker would use all cores.
        environment = {"OMP_NUM_THREADS": str(plan.cpus_per_worker), **logs.environment()}
        if plan.ranks > 1:  # what a block was gathered into goes back to the system, not to the heap
            environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        spread = "SPREAD" if order.spec.scheduling.endswith("SPREAD") else "DEFAULT"
        return Worker.options(  # type: ignore[attr-defined]
            name=name if plan.ranks == 1 else f"{name}-rank-{rank}",
            namespace=order.namespace,
            num_cpus=plan.cpus_per_worker,
            num_gpus=plan.gpus_per_worker,
            resources=order.spec.resources or None,
            scheduling_strategy=spread if group is None else PlacementGroupSchedulingStrategy(group, rank),
            runtime_env={"env_vars": environment},
        ).remote(*order.arguments)

    def leave(self, worker: str) -> None:
        """End a worker's processes and give its place back."""
        _end(self._actors.pop(worker, []))
        group = self._groups.pop(worker, None)
        if group is not None:
            remove_placement_group(group)

    def leave_all(self) -> None:
        """End all workers and give all places back."""
        for worker in [*self._actors, *self._groups]:
            self.leave(worker)

    def _watch(self) -> None:
        """End everything, this too, when there is no coordinator; one that is being restarted is waited for."""
        began, missed = time.monotonic(), 0
        while missed < _MISSES and (self._coordinator is not None or time.monotonic() - began < _NOBODY_S):
            time.sleep(_LOOK_S)
            missed = 0 if self._coordinator is None or _is_there(self._coordinator) else missed + 1
        self.leave_all()
        ray.kill(self._me)


def _is_there(actor: Any) -> bool:
    try:
        ray.get(actor.uri.remote(), timeout=_ANSWER_S)
    except (ActorUnavailableError, GetTimeoutError):
        return True
    except RayActorError:
        return False
    return True


def _end(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)
