"""A worker as the coordinator sees it: one process, or a gang of them that does every job together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from raylora import control
from raylora.actors.names import task_name
from raylora.errors import Interrupted, RayloraError, UnreachableError
from raylora.placement.plan import even_parts
from raylora.progress import Activity, Progress


@dataclass
class WorkerHandle:
    """The actors of one worker, by rank. It takes jobs as one, and is lost as one."""

    name: str
    actors: Sequence[Any]
    partners: int = 1
    """How many of them train the same units."""
    is_split: bool = False
    """Whether the base is split over them."""
    run: str = ""
    """Whose worker it is, for what people are shown."""

    def load(self, coordinator: Any) -> list[Any]:
        """Start loading; of a gang, every rank is told where rank 0 listens."""
        if len(self.actors) == 1:
            return [self.actors[0].load.remote(coordinator)]
        first = self.actors[0].listen.remote(len(self.actors), self.partners, self.is_split)
        return [actor.load.remote(coordinator, rank, first) for rank, actor in enumerate(self.actors)]

    def run_job(self, job: str, units: Sequence[str], coordinator: Any) -> list[Any]:
        """Start a job; the ranks of a gang, or groups of partners among them, train even shares of its units."""
        of_groups = even_parts(units, len(self.actors) // self.partners)
        shares = [of_groups[rank // self.partners] for rank in range(len(self.actors))]
        return [
            actor.run_job.options(name=task_name(self.run, self.name, share)).remote(job, share, coordinator)
            for actor, share in zip(self.actors, shares, strict=True)
        ]

    def aggregate(self, units: Sequence[str], started_at: float) -> list[Any]:
        """Start putting the units together, on one rank."""
        return [self.actors[0].aggregate.remote(units, started_at)]

    def stop(self, signal_number: int) -> None:
        """Ask every rank to commit and stop after its step."""
        for actor in self.actors:
            actor.stop.remote(signal_number)

    def kill(self) -> None:
        """End every rank at once: one that is left waits for the others, and nothing else frees it."""
        for actor in self.actors:
            ray.kill(actor)


def taken_over(workers: Sequence[WorkerHandle], epoch: int | None, timeout_s: float) -> set[str]:
    """Let workers of an earlier coordinator commit for this epoch and end what they are at.

    Returns:
        Those that are ready for other jobs by then, by name: all their ranks are alive, and have the base loaded.
    """
    deadline, ready = time.monotonic() + timeout_s, {worker.name for worker in workers}
    for ask in (lambda actor: actor.serve.remote(epoch), lambda actor: actor.take_over.remote()):
        asked = {ask(actor): worker.name for worker in workers if worker.name in ready for actor in worker.actors}
        done, _ = ray.wait(list(asked), num_returns=max(1, len(asked)), timeout=max(0.0, deadline - time.monotonic()))
        ready -= {name for reference, name in asked.items() if reference not in done or not _is_well(reference)}
    return ready


def _is_well(reference: Any) -> bool:
    try:
        return bool(ray.get(reference))
    except (RayError, RayloraError):  # it died, or its task failed
        return False


@dataclass
class Call:
    """What a worker was asked to do, until all its ranks have answered."""

    worker: WorkerHandle
    command: control.Command
    waiting: set[Any]
    failed: dict[str, str] = field(default_factory=dict)
    error: RayTaskError | None = None
    """The first that was raised on purpose, after which the ranks still return together."""
    interrupted: bool = False

    def take(self, reference: Any) -> control.Event | None:
        """Take one rank's answer; return the event once all have answered, or one is lost."""
        self.waiting.discard(reference)
        try:
            self.failed |= ray.get(reference) or {}
        except RayActorError as error:
            return control.WorkerLost(self.worker.name, first_line(error), by_machine=True)
        except Interrupted:  # before the next: Ray raises what is both
            self.interrupted = True
        except RayTaskError as error:
            if not isinstance(error.cause, RayloraError) and len(self.worker.actors) > 1:
                return control.WorkerLost(self.worker.name, _reason(error))  # the others wait in the pass that it left
            self.error = self.error or error
        return None if self.waiting else self._event()

    def _event(self) -> control.Event:
        command, error = self.command, self.error
        if error is not None:
            return _failure(error, self.worker.name, command)
        if isinstance(command, control.StartWorker):
            return control.WorkerReady(self.worker.name)
        if isinstance(command, control.Aggregate):
            return control.Aggregated()
        assert isinstance(command, control.RunJob)
        if self.interrupted:
            return control.JobInterrupted(command.job, command.attempt)
        return control.JobFinished(command.job, command.attempt, self.failed)


def _failure(error: RayTaskError, worker: str, command: control.Command) -> control.Event:
    """Errors raised on purpose would be raised again; the machine's and the network's may be gone: they are retried."""
    reason = _reason(error)
    if isinstance(command, control.RunJob):
        fatal = isinstance(error.cause, RayloraError) and not isinstance(error.cause, UnreachableError)
        return control.JobFailed(command.job, command.attempt, reason, fatal=fatal)
    if isinstance(command, control.Aggregate):
        return control.AggregationFailed(reason)
    return control.WorkerLost(worker, reason)


def _reason(error: RayTaskError) -> str:
    return str(error.cause) if isinstance(error.cause, RayloraError) else f"{first_line(error.cause)}\n{error}"


def first_line(error: BaseException) -> str:
    """Return an error's kind and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


class GangProgress:
    """Makes one report of those of a job's ranks: how far the slowest is, and what is new on any."""

    def __init__(self) -> None:
        self._latest: dict[str, dict[int, Progress]] = {}

    def merged(self, job: str, rank: int, progress: Progress) -> Progress:
        """Return the job's progress after a rank's report."""
        ranks = self._latest.setdefault(job, {})
        ranks[rank] = progress
        slowest = min(
            ranks.values(), key=lambda each: (each.activity is Activity.EVALUATING, each.done / max(1, each.total))
        )
        return replace(
            slowest, news=progress.news, losses={**slowest.losses, **progress.losses},
            grad_norms={**slowest.grad_norms, **progress.grad_norms}, validations=progress.validations,
        )
