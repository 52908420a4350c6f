"""A run's status in words: a table, a headline, a line per job."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from raylora.control import JobState, Phase, WorkerState
from raylora.engine.run.run_status import JobStatus, RunStatus
from raylora.progress import Activity, BlockDone


def status_table(status: RunStatus, lost: Mapping[str, str] | None = None, most: int | None = None) -> Table:
    """Return where every member of a run, or every shard of targets, is; ``lost`` are those that were and are not.

    Args:
        most: of more jobs than that, only those at work are shown, and no more of them.
    """
    table = Table("member", "state", "done", "loss", "tokens/s", title=headline(status))
    jobs = list(status.jobs.values())
    if most is not None and len(jobs) > most:
        jobs = [job for job in jobs if job.status is JobState.RUNNING][:most]
        table.caption = f"{len(jobs)} of {len(status.jobs)} jobs"
    for job in jobs:
        progress = job.progress
        trains = progress is not None and progress.activity is Activity.TRAINING
        for unit in job.units:
            loss = progress.losses.get(unit) if progress is not None else None
            table.add_row(
                unit, _state(unit, job, status, lost or {}),
                f"{progress.activity.value} {progress.done}/{progress.total}" if progress is not None else "",
                f"{loss:.3f}" if loss is not None else "",
                f"{progress.tokens / max(progress.seconds, 1e-9):.0f}" if progress is not None and trains else "",
            )
    return table


def _state(unit: str, job: JobStatus, status: RunStatus, lost: Mapping[str, str]) -> str:
    if unit in lost:
        return "damaged"
    return (JobState.FAILED if unit in status.failed else job.status).value


def headline(status: RunStatus) -> str:
    """Return in one line what a run is doing, how much of it is done and how long the rest will take."""
    jobs = [job for job in status.jobs.values() if job.units]
    done = sum(len(job.units) for job in jobs if job.status is JobState.FINISHED)
    of = f", {done} of {sum(len(job.units) for job in jobs)} done" if jobs and not status.phase.terminal else ""
    eta = f"{left(status.eta_s)} in all" if status.eta_s and not status.phase.terminal else ""
    return f"{status.run} {activity(status)}{of}{eta}"


def left(eta_s: float | None) -> str:
    """Return how long something will still take, or nothing where nobody knows."""
    return f", about {duration(eta_s)} left" if eta_s else ""


def duration(seconds: float) -> str:
    """Return a time as a person says it: to two digits or so."""
    whole = max(1, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def activity(status: RunStatus) -> str:
    """Return what a run is doing."""
    if status.phase is Phase.PREPARING:
        done = status.preparation
        return block_line(done) if done else "preparing the base: reading calibration text"
    starting = [worker for worker, state in status.workers.items() if state is WorkerState.STARTING]
    if starting and not status.phase.terminal:
        return "loading the base in " + (", ".join(starting) if len(starting) <= 8 else f"{len(starting)} workers")
    at_work = [job.progress.activity for job in status.jobs.values() if job.status is JobState.RUNNING and job.progress]
    return at_work[0].value if status.phase is Phase.TRAINING and at_work else status.phase.value


def block_line(done: BlockDone) -> str:
    """Return how far the preparation of a base is."""
    lost = f", {100 * done.error:.1f} % of the outputs' norm lost" if done.error is not None else ""
    return f"preparing the base: block {done.block}/{done.blocks}{lost}{left(done.eta_s)}"


def job_line(name: str, job: JobStatus) -> str:
    """Return how far a running job is, in one line."""
    progress = job.progress
    if progress is None:
        return f"{name} begins"
    if progress.activity is not Activity.TRAINING:
        return f"{name} {progress.activity.value} {progress.done}/{progress.total} rows{left(job.left_s)}"
    pace = f"{progress.tokens / max(progress.seconds, 1e-9):.0f} tokens/s"
    return f"{name} step {progress.done}/{progress.total} {losses_of(progress.losses)} {pace}{left(job.left_s)}"


def losses_of(losses: Mapping[str, float]) -> str:
    """Return the losses of a pack's members in few words."""
    values = list(losses.values())
    if len(values) < 2:
        return f"loss {values[0]:.3f}" if values else "loss n/a"
    return f"loss {sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} members)"
