"""What people read of a run in Ray's dashboard, in log lines and in a list of processes.

An actor's own name has to be unique in the cluster and finds it again; these only have to be understood.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORKER = re.compile(r"worker-\d+")
_RANK = re.compile(r"-rank-\d+$")
_MOST_UNITS = 6


def actor_title(run: str, actor_name: str) -> str:
    """Return what a worker's actor is called: ``raylora:reviews:worker-3``, with its rank if it has one."""
    worker, rank = _WORKER.findall(actor_name), _RANK.search(actor_name)
    return f"raylora:{run}:{worker[-1] if worker else 'worker'}{rank[0] if rank else ''}"


def task_name(run: str, worker: str, units: Sequence[str]) -> str:
    """Return what a job is called: ``raylora:reviews:worker-3 [member-006, member-007]``."""
    more = [f"and {len(units) - _MOST_UNITS} more"] if len(units) > _MOST_UNITS else []
    return f"raylora:{run}:{worker} [{', '.join([*units[:_MOST_UNITS], *more])}]"
