"""What the state machine asks for; a driver carries it out and answers with events."""

from __future__ import annotations

from dataclasses import dataclass

from raylora.control.state import Phase


@dataclass(frozen=True)
class PrepareBase:
    """Quantize the base on its calibration text; answered by BasePrepared, BaseFailed or PreparationInterrupted."""


@dataclass(frozen=True)
class StartWorker:
    """Start a worker; it answers WorkerReady or WorkerLost."""

    worker: str


@dataclass(frozen=True)
class RunJob:
    """Train, evaluate and commit a job's units on a worker."""

    job: str
    attempt: int
    worker: str
    units: tuple[str, ...]


@dataclass(frozen=True)
class ReleaseWorker:
    """Let a worker go that nothing is left for."""

    worker: str


@dataclass(frozen=True)
class StopJobs:
    """Ask every running job to commit and stop after its step, and a preparation after its block."""


@dataclass(frozen=True)
class Aggregate:
    """Compute metrics and report from the finished units, on a worker."""

    worker: str
    units: tuple[str, ...]


@dataclass(frozen=True)
class Finish:
    """Stop the workers and end with this phase."""

    phase: Phase
    reason: str = ""


Command = PrepareBase | StartWorker | RunJob | ReleaseWorker | StopJobs | Aggregate | Finish
