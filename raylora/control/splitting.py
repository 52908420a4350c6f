"""The last jobs are cut into smaller packs, so that none of the workers is left without a share.

A member's last bits depend on who shares its pack, so only jobs that a run allows it for are cut, and only before they
have begun. It is decided here and nowhere else, from the state alone: the log replays to the same pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from raylora.control.state import Job, State


def is_piece(job: str) -> bool:
    """Return whether a job is a piece of one that was split: ``job-07.1`` is one of ``job-07``."""
    return "." in job


def split_last(state: State) -> State:
    """Return the state in which the last jobs are split, if it is time for it.

    It is when fewer jobs wait than there are workers to take them, idle ones and those that will be: an even share of
    the waiting units is then ``ceil(units / workers)``, and no pack that may be split stays larger. This is guided
    self-scheduling (Polychronopoulos and Kuck, 1987) but for that a piece is not split again: small packs train slower.
    """
    if not state.can_split or len(state.pending) >= state.in_service:
        return state
    share = math.ceil(state.pending_units / state.in_service)
    if share >= state.order.largest:
        return state
    splittable = (state.order.jobs[rank] for rank in state.can_split)
    chosen = {name for name in splittable if len(state.jobs[name].units) > share}
    if not chosen:
        return state
    jobs: dict[str, Job] = {}
    for name, job in state.jobs.items():
        jobs |= dict(_pieces(name, job, share)) if name in chosen else {name: job}
    return state.with_jobs(jobs)


def _pieces(name: str, job: Job, share: int) -> Iterator[tuple[str, Job]]:
    """Yield a job's pieces, none larger than a share and all within one unit of each other."""
    count, start = math.ceil(len(job.units) / share), 0
    for index in range(count):
        end = start + len(job.units) // count + (index < len(job.units) % count)
        units = job.units[start:end]
        yield f"{name}.{index}", replace(job, units=units, cost=job.cost * len(units) / len(job.units), may_split=False)
        start = end
