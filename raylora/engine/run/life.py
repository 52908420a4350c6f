"""Whether anybody is still at work on a run that has not ended."""

from __future__ import annotations

import time

from raylora import control
from raylora.store.run_store import STALE_S, RunStore

RAY_DASHBOARD = "ray_dashboard"
"""Under this name the holder of a run directory says where its cluster's dashboard is."""


def lifelessness(store: RunStore, state: control.State) -> str:
    """Return since when a run that has not ended shows no sign of life, and what to do; nothing if all is well."""
    if state.phase.terminal or state.phase is control.Phase.PENDING:
        return ""
    resume = f"resume with: raylora resume {store.uri}"
    holder = store.holder()
    if holder is None:
        last = max((record.get("at", 0.0) for record in store.read_events()), default=0.0)
        return f"no sign of life since {clock(last)}; {resume}"
    if not holder.is_alive:
        return f"no sign of life since {clock(holder.heartbeat)}; {resume}"
    if time.time() - holder.heartbeat > STALE_S:
        return (
            f"no sign of life since {clock(holder.heartbeat)}, though process {holder.pid} on {holder.host} is there: "
            f"is it stopped? End it, then {resume}"
        )
    return ""


def clock(at: float) -> str:
    """Return a time as a person says it: the hour today, the date too on other days."""
    moment, today = time.localtime(at), time.localtime()
    return time.strftime("%H:%M" if moment[:3] == today[:3] else "%Y-%m-%d %H:%M", moment)
