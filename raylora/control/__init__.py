"""A run as a state machine: ``transition(state, event) -> (state, commands)`` decides, others carry out.

Pure: no clock, no files, no Ray, no torch. The event log is durable, and replaying it is recovery.
"""

from raylora.control.commands import (
    Aggregate,
    Command,
    Finish,
    PrepareBase,
    ReleaseWorker,
    RunJob,
    StartWorker,
    StopJobs,
)
from raylora.control.events import (
    Aggregated,
    AggregationFailed,
    BaseFailed,
    BasePrepared,
    Event,
    InterruptRequested,
    JobFailed,
    JobFinished,
    JobInterrupted,
    PreparationInterrupted,
    RunStarted,
    WorkerLost,
    WorkerReady,
    from_record,
    to_record,
)
from raylora.control.machine import replay, transition
from raylora.control.splitting import is_piece
from raylora.control.state import Job, JobState, Phase, State, WorkerState

__all__ = [
    "Aggregate", "Aggregated", "AggregationFailed", "BaseFailed", "BasePrepared", "Command", "Event", "Finish",
    "InterruptRequested", "Job", "JobFailed", "JobFinished", "JobInterrupted", "JobState", "Phase",
    "PreparationInterrupted", "PrepareBase", "ReleaseWorker", "RunJob", "RunStarted", "StartWorker", "State",
    "StopJobs", "WorkerLost", "WorkerReady", "WorkerState", "from_record", "is_piece", "replay", "to_record",
    "transition",
]
