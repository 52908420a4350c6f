"""A cluster that is only simulated: what happens when, and to whom, for the real planner and the real state machine.

Time is counted in the time that one member of mean length takes alone. A pack of K takes (1 + K) / 2 of that: what
``benchmarks.packing`` measured (K = 2, 4 and 8 are 1.3, 1.6 and 1.8 times as fast as one after another).
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raylora import control
from raylora.placement.estimate import MemberShape, ModelShape
from raylora.placement.inventory import one_node
from raylora.placement.plan import Demand
from raylora.placement.planner import make_plan
from raylora.spec import PlacementSpec


@dataclass(frozen=True)
class Load:
    """What is to be trained, on what kind of cluster."""

    members: int
    workers: int
    pack: int | str = 1
    """``placement.members_per_worker``; ``auto`` is an even share."""
    spread: float = 0.2
    """Sigma of the log-normal lengths of jobs, whose mean is 1."""
    known: bool = False
    """Whether the lengths are known beforehand; else a job's cost is how many members it has."""
    slow: float = 0.0
    """Share of workers that are 3 to 10 times slower, which nobody knows."""
    lifetime: float = 0.0
    """Mean time until a worker dies, exponentially distributed; 0: never."""
    commit: float = 1.0
    """Share of a job after which its state is committed; 1: a job that is lost begins again."""
    split: bool = False
    """Whether the last jobs may be split."""
    restart: float = 0.2
    """How long a worker takes that starts again."""


@dataclass
class Outcome:
    """What a simulated run measured; real times are in seconds of the processor, since others share the machine."""

    plan_s: float = 0.0
    start_s: float = 0.0
    events_s: float = 0.0
    """In ``transition``, all events but the start."""
    log: list[control.Event] = field(default_factory=list)
    makespan: float = 0.0
    bound: float = 0.0
    lost_work: float = 0.0
    down: float = 0.0
    """Work that could have been done while workers started again."""
    jobs: int = 0
    pieces: int = 0


class Cluster:
    """Carries commands out in simulated time."""

    def __init__(self, load: Load, seed: int, on_state: Callable[[Any], None] = lambda state: None) -> None:
        self.load, self.random, self.on_state = load, random.Random(seed), on_state
        self.heap: list[tuple[float, int, str, int, Any]] = []
        self.now, self.count = 0.0, 0
        self.result = Outcome()
        started = time.process_time()
        self.start = self._start_event()
        self.result.plan_s = time.process_time() - started
        draw = self.random
        mean = -load.spread**2 / 2  # of the logarithm, for a mean length of 1
        self.length = {job: draw.lognormvariate(mean, load.spread) for job in self.start.jobs}
        self.speed = {
            worker: 1 / draw.uniform(3, 10) if draw.random() < load.slow else 1.0 for worker in self.start.workers
        }
        self.life = dict.fromkeys(self.start.workers, 0)
        self.at_work: dict[str, tuple[str, float, float]] = {}
        self.done: dict[str, float] = {}

    def _start_event(self) -> control.RunStarted:
        load = self.load
        names = tuple(f"member-{m:03d}" for m in range(load.members))
        plan = make_plan(
            Demand((names,), ModelShape(), MemberShape()),
            one_node(load.workers, 0, 10**15),
            PlacementSpec(workers=load.workers, members_per_worker=load.pack),
        )
        workers = [f"worker-{n}" for n in range(load.workers)]
        return control.RunStarted(plan.jobs(), workers, list(names), load.members, max_failures=1000)

    # --- the run ------------------------------------------------------------------------------------
    def run(self, limit_s: float = math.inf) -> Outcome:
        """Fold events until the run has ended, or ``transition`` has taken so long."""
        load, result = self.load, self.result
        jobs = self.start.jobs
        options: dict[str, Any] = {"may_split": list(jobs)} if load.split else {}
        if load.known:
            options["costs"] = {job: self.length[job] * len(units) for job, units in jobs.items()}
        elif options:
            options["costs"] = {job: float(len(units)) for job, units in jobs.items()}
        self.start = control.RunStarted(**{**vars(self.start), **options})
        state = self._fold(control.State(), self.start)
        result.start_s, result.events_s, result.jobs = result.events_s, 0.0, len(jobs)
        while not state.phase.terminal and result.events_s < limit_s:
            self.now, _, worker, life, event = heapq.heappop(self.heap)
            if worker and self.life[worker] != life:
                continue  # what a worker would have said that has died
            if isinstance(event, control.WorkerLost):
                self._die(worker)
            elif worker in self.at_work and isinstance(event, control.JobFinished):
                del self.at_work[worker]
            state = self._fold(state, event)
        assert state.phase is control.Phase.SUCCEEDED or result.events_s >= limit_s, state.reason
        result.pieces = sum("." in name for name in state.jobs)
        result.bound = self._bound()
        return result

    def _fold(self, state: control.State, event: control.Event) -> control.State:
        started = time.process_time()
        state, commands = control.transition(state, event)
        self.result.events_s += time.process_time() - started
        self.result.log.append(event)
        self.on_state(state)
        for command in commands:
            self._carry_out(command)
        return state

    def _carry_out(self, command: control.Command) -> None:
        if isinstance(command, control.StartWorker):
            again = self.life[command.worker] > 0
            self._later(self.load.restart if again else 0.0, command.worker, control.WorkerReady(command.worker))
            if self.load.lifetime:
                life = self.random.expovariate(1 / self.load.lifetime) + self.load.restart * again
                self._later(life, command.worker, control.WorkerLost(command.worker, "killed"))
        elif isinstance(command, control.RunJob):
            work = self._work(command.job, len(command.units))
            self.at_work[command.worker] = (command.job, self.now, work)
            left = work - self.done.get(command.job, 0.0)
            finished = control.JobFinished(command.job, command.attempt)
            self._later(left / self.speed[command.worker], command.worker, finished)
        elif isinstance(command, control.Aggregate):
            self.result.makespan = self.now
            self._later(0.0, "", control.Aggregated())

    def _later(self, after: float, worker: str, event: control.Event) -> None:
        self.count += 1  # equal times: what was said first comes first
        life = self.life.get(worker, 0)
        heapq.heappush(self.heap, (self.now + after, self.count, worker, life, event))

    def _die(self, worker: str) -> None:
        """Take back what the worker had done since its last commit."""
        self.life[worker] += 1
        self.result.down += self.load.restart * self.speed[worker]
        if worker not in self.at_work:
            return
        job, since, work = self.at_work.pop(worker)
        before = self.done.get(job, 0.0)
        done = before + (self.now - since) * self.speed[worker]
        step = self.load.commit * work
        self.done[job] = max(before, done // step * step)
        self.result.lost_work += done - self.done[job]

    def _work(self, job: str, units: int) -> float:
        return self.length[job.partition(".")[0]] * (1 + units) / 2

    def _bound(self) -> float:
        """Return what no scheduler that knew everything could stay below: see docs/benchmarks.md."""
        packs = {job: self._work(job, len(units)) for job, units in self.start.jobs.items()}
        whole = sum(packs.values()) + self.result.lost_work + self.result.down
        longest = max(self._work(job, 1) if self.load.split else work for job, work in packs.items())
        return max(whole / sum(self.speed.values()), longest / max(self.speed.values()))
