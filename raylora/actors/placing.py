"""Where a run's workers are put: each by itself, as soon as the cluster has room for it.

Members are independent, so nobody waits for a place for all workers. What has no room yet is a demand that Ray's
autoscaler sees. Only the ranks of a gang, which share a base or a member, are placed together.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from raylora.actors.calls import WorkerHandle
from raylora.actors.keeper import Order
from raylora.errors import PlacementError
from raylora.placement.plan import Plan
from raylora.spec import PlacementSpec

_AGAIN_S = 0.5
_LEAVE_S = 30.0


@dataclass
class Placing:
    """Has workers' actors started, and knows which of them have a place."""

    plan: Plan
    spec: PlacementSpec
    namespace: str
    keeper: Any
    """Who owns the actors."""
    name: str
    """What actors' names begin with."""
    run: str
    """What people call the run."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Worker -> the nodes that it is on; a worker without a place is not in it."""
    _arriving: dict[Any, str] = field(default_factory=dict)
    _short_since: float | None = None

    def start(self, worker: str, arguments: tuple[Any, ...]) -> WorkerHandle:
        """Start a worker's processes; they exist once there is room for all of them."""
        self.leave(worker)
        order = Order(self.plan, self.spec, self.namespace, self.name, arguments)
        return self.placed(worker, self.kept(lambda keeper: keeper.start.remote(worker, order)))

    def placed(self, worker: str, actors: Sequence[Any]) -> WorkerHandle:
        """Return a worker of these actors, and look from now on where they are."""
        self._arriving.update({actor.node.remote(): worker for actor in actors})
        plan = self.plan
        return WorkerHandle(worker, actors, plan.partners, plan.strategy == "shard", self.run)

    def attend(self, coordinator: Any) -> dict[str, list[Any]]:
        """Return the workers that an earlier process of the coordinator has left, by name."""
        found: dict[str, list[Any]] = self.kept(lambda keeper: keeper.attend.remote(coordinator))
        return found

    def kept(self, ask: Callable[[Any], Any]) -> Any:
        """Return the keeper's answer, of the next one if its process dies meanwhile.

        Raises:
            PlacementError: it has died too often.
        """
        while True:
            try:
                return ray.get(ask(self.keeper))
            except ActorUnavailableError:
                time.sleep(_AGAIN_S)
            except RayActorError as error:
                raise PlacementError(
                    f"the process that keeps the workers of {self.run} is gone: {str(error).splitlines()[0]}",
                    "see whether its node has memory left, then resume the run",
                ) from error

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
            bundle = Order(self.plan, self.spec, self.namespace, self.name, ()).bundle
            free = {k: v for k, v in ray.available_resources().items() if k in bundle}
            processes = wanted * self.plan.ranks
            raise PlacementError(
                f"placement: {processes} x {bundle} were not free within {self.spec.start_timeout_s:.0f} s; "
                f"free now: {free}",
                "wait for other work to end, ask for less, or raise placement.start_timeout_s",
            )

    def leave(self, worker: str) -> None:
        """End a worker's processes and give its place back."""
        self.nodes.pop(worker, None)
        self._arriving = {ref: name for ref, name in self._arriving.items() if name != worker}
        self.keeper.leave.remote(worker)

    def leave_all(self) -> None:
        """End all workers, and who keeps them."""
        for worker in list(self.nodes):
            self.nodes.pop(worker)
        self._arriving.clear()
        with contextlib.suppress(RayError):
            ray.get(self.keeper.leave_all.remote(), timeout=_LEAVE_S)
        ray.kill(self.keeper)
