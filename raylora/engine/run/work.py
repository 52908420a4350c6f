"""What can be driven, in this process or on a cluster: a run, a teacher's targets, answers to rows.

It imports no torch: the coordinator carries a job to its workers and never does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from raylora import control
from raylora.placement.plan import Plan
from raylora.progress import OnProgress, Span
from raylora.spec.run import RunSpec
from raylora.store.run_store import RunStore

if TYPE_CHECKING:
    from raylora.engine.model.gang import GangPlace
    from raylora.engine.quantization.quantize_base import PreparedBase

StopSignal = Callable[[], int]


class Session(Protocol):
    """What a worker does its jobs on."""

    span: Span
    """Marks what takes time, such as steps and checkpoints, on a timeline."""

    @property
    def base_bytes(self) -> int:
        """How much of the base is held, once it is loaded."""

    def load(self) -> None:
        """Load what all jobs need. Raises: UsageError for bad input."""

    def run_job(
        self, job: str, unit_names: Sequence[str], report: OnProgress, should_stop: StopSignal
    ) -> dict[str, str]:
        """Do and commit the units of a job; return those that failed. Raises: Interrupted."""

    def aggregate(self, units: Sequence[str], started_at: float) -> Mapping[str, Any]:
        """Put the finished units together. Raises: StoreError for a damaged one."""


class Assignment(Protocol):
    """All that a worker must know of its work beside the spec: small, and the same for all workers."""

    def make_session(
        self, spec: RunSpec, store: RunStore, cpus: int, gpus: int, place: GangPlace | None = None
    ) -> Session:
        """Return what a worker does it on, as one of a gang if it has a place in one; nothing is loaded yet."""


@dataclass(frozen=True)
class TrainingAssignment:
    """To train and evaluate a run's units; what they are stands in the spec."""

    def make_session(
        self, spec: RunSpec, store: RunStore, cpus: int, gpus: int, place: GangPlace | None = None
    ) -> Session:
        """Return what a worker trains its packs on."""
        from raylora.engine.run.session import TrainingSession

        return TrainingSession(spec, store, cpus, gpus, place)


class Work(Protocol):
    """What is driven: checked, planned, and ready to be begun."""

    @property
    def spec(self) -> RunSpec:
        """The spec of the run, or of the one whose members are asked."""

    @property
    def store(self) -> RunStore:
        """Where the results are committed."""

    @property
    def plan(self) -> Plan:
        """Who does what."""

    @property
    def base(self) -> PreparedBase | None:
        """The base that has to be prepared first, if any."""

    @property
    def assignment(self) -> Assignment:
        """What its workers are told."""

    def begin(self) -> None:
        """Write what the work begins with; the first thing that touches the disk."""

    def start_event(self, workers: list[str]) -> control.RunStarted:
        """Return the event that begins the work, or takes it up again; the plan's later workers stand last."""
