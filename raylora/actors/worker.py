"""The worker actor: owns one GPU, or a share of the CPUs, and does jobs on its session."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray

from raylora import logs
from raylora.actors.inputs import spec_here
from raylora.actors.names import actor_title
from raylora.actors.sealed import Sealed
from raylora.actors.telemetry import Telemetry
from raylora.progress import Progress, Throttle
from raylora.spec import RunSpec
from raylora.store.probe import opened_where_seen

if TYPE_CHECKING:
    from raylora.engine.model.gang import GangPlace
    from raylora.engine.run.work import Assignment, Session
    from raylora.store.run_store import RunStore


def this_node() -> str:
    """Return what the node that this process runs on is called."""
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


@dataclass(frozen=True)
class WorkerFacts:
    """Which process a worker is."""

    pid: int
    loaded_at: float | None
    """When it had loaded its base; None before."""


@ray.remote(max_restarts=0, concurrency_groups={"control": 1})  # type: ignore[call-overload]
class Worker:
    """Loads the base once and trains packs on it.

    It is never restarted by Ray: the coordinator starts a new one, which loads the last commit.
    """

    def __init__(
        self, run: str, spec: Sealed[RunSpec], store_uri: str, cpus: int, gpus: int, assignment: Sealed[Assignment],
        epoch: int | None = None, nonce: str = "",
    ) -> None:
        """Take what is to be done: to train the run of a spec, or what else its members are asked for.

        Args:
            run: what people call the run.
            epoch: of the coordinator that this worker commits for.
            nonce: what it has to find in the run directory.
        """
        self.run, self.spec, self.store_uri, self.assignment = run, spec, store_uri, assignment
        self.epoch, self.nonce = epoch, nonce
        self.cpus, self.gpus = cpus, gpus
        self.signal_number = 0
        self.place: Any = None
        self.store: RunStore | None = None
        self.session: Session | None = None
        """Once it is loaded."""
        self.loaded_at: float | None = None

    def __repr__(self) -> str:
        """Return what Ray's dashboard and log lines call this worker."""
        return actor_title(self.run, ray.get_runtime_context().get_actor_name() or "")

    def node(self) -> str:
        """Return the node that this process runs on, as soon as there is this process."""
        return this_node()

    def listen(self, size: int, partners: int, is_split: bool) -> GangPlace:
        """Become rank 0 of a gang and return its place, by whose address the other ranks find it."""
        from raylora.engine.model.gang import GangPlace

        self.place = GangPlace.listening(ray.util.get_node_ip_address(), size, partners, is_split)
        return replace(self.place, store=None)

    def load(self, coordinator: Any = None, rank: int = 0, first: GangPlace | None = None) -> None:
        """Import the libraries and load base and data; the slow part of a start.

        Args:
            coordinator: who publishes what this node does not have.
            rank: this worker's number in a gang.
            first: the place of its rank 0, or None for a worker of its own.

        Raises:
            PlacementError: this node does not see the run directory.
            StoreError: this node cannot get the files of a model.
        """
        self.store = store = opened_where_seen(self.store_uri, self.epoch, self.nonce, this_node())
        logs.configure()
        self.telemetry = Telemetry(self.run)
        if first is not None and rank:
            self.place = replace(first, rank=rank)
        spec = spec_here(self.spec.open(), store, coordinator)
        session = self.assignment.open().make_session(spec, store, self.cpus, self.gpus, self.place)
        session.span = self.telemetry.span
        session.load()
        self.session, self.loaded_at = session, time.time()
        self.telemetry.loaded(session.base_bytes)

    def run_job(self, job: str, units: Sequence[str], coordinator: Any) -> dict[str, str]:
        """Train, evaluate and commit a pack, or make targets; return the units that failed with their reasons.

        Raises:
            Interrupted: what is done so far is committed.
        """
        throttle = Throttle()
        self.telemetry.begin_job()
        rank = 0 if self.place is None else self.place.rank
        own = job if self.place is None else f"{job}-rank-{rank}"

        def report(progress: Progress) -> None:
            self.telemetry.record(progress)
            merged = throttle.merged(progress)
            if merged is not None:
                self.telemetry.measure_memory()
                coordinator.report.remote(job, merged, rank)

        assert self.session is not None
        return self.session.run_job(own, units, report, lambda: self.signal_number)

    def aggregate(self, units: Sequence[str], started_at: float) -> None:
        """Write what the committed units come to: the run's metrics, or that the targets are complete."""
        assert self.session is not None
        self.session.aggregate(units, started_at)

    @ray.method(concurrency_group="control")
    def serve(self, epoch: int | None) -> bool:
        """Commit for another holder of the run from now on; what the one before has asked for ends after its step."""
        self.epoch = epoch
        if self.store is not None:
            self.store.write_for(epoch)
        self.signal_number = signal.SIGTERM
        return True

    def take_over(self) -> bool:
        """Be ready for the jobs of a coordinator that was told by :meth:`serve`, and return whether the base is loaded.

        It is answered when everything that was asked for before has ended.
        """
        self.signal_number = 0
        if self.store is None or self.session is None:
            return False
        self.store.write_for(self.epoch)
        return True

    @ray.method(concurrency_group="control")
    def facts(self) -> WorkerFacts:
        """Return which process this is, and since when it has a base loaded."""
        return WorkerFacts(os.getpid(), self.loaded_at)

    @ray.method(concurrency_group="control")
    def stop(self, signal_number: int) -> None:
        """Ask the running job to commit and stop after its step."""
        self.signal_number = signal_number
