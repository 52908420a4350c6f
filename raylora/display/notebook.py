"""How a run looks in a notebook: a bar for each member, and its loss as a curve, in plain HTML and SVG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from raylora.engine.run.roster import read_state
from raylora.engine.run.run_status import JobStatus, RunStatus, StatusBoard
from raylora.store.run_store import RunStore

_CURVE = (120, 24)
"""Width and height of a member's curve, in pixels."""
_MOST_MEMBERS = 40


def run_html(store: RunStore) -> str:
    """Return a run's phase, members, bars and curves, from its directory alone."""
    state = read_state(store)
    written = store.read_json("status.json")
    status = RunStatus.from_record(written) if written else StatusBoard(store.read_spec().run_name()).status(state)
    done = set(state.finished_units())
    jobs = {unit: job for job in status.jobs.values() for unit in job.units}
    required = list(state.required) or list(jobs)
    rows = [_row(unit, jobs.get(unit), unit in done, _losses(store, unit)) for unit in required[:_MOST_MEMBERS]]
    more = len(required) - len(rows)
    rows += [f"<tr><td colspan=4>and {more} more</td></tr>"] if more > 0 else []
    finished = len(done.intersection(required))
    return (
        f"<div><b>{escape(status.run)}</b>: {escape(state.phase.value)}, {finished} of {len(required)} members finished"
        f"<br><small>{escape(store.uri)}</small>"
        "<table><tr><th>member</th><th>steps</th><th></th><th>loss</th></tr>" + "".join(rows) + "</table></div>"
    )


def _row(unit: str, job: JobStatus | None, is_done: bool, losses: Sequence[float]) -> str:
    progress = job.progress if job is not None else None
    share = 1.0 if is_done else job.share_done if job is not None else 0.0
    steps = f"{progress.done} of {progress.total}" if progress is not None else "done" if is_done else "waits"
    bar = (
        f'<svg width=100 height=10><rect width=100 height=10 fill="#ddd"/>'
        f'<rect width={100 * share:.0f} height=10 fill="#4477aa"/></svg>'
    )
    last = losses[-1] if losses else progress.losses.get(unit) if progress is not None else None
    shown = f"{last:.3f}" if last is not None else ""
    return f"<tr><td>{escape(unit)}</td><td>{steps}</td><td>{bar}</td><td>{shown} {_curve(losses)}</td></tr>"


def _losses(store: RunStore, unit: str) -> list[float]:
    """Return a finished member's training losses as its history records them; none of one that still trains."""
    place = f"members/{unit}/member.json"
    if not store.storage.exists(place):
        return []
    history: list[dict[str, Any]] = json.loads(store.storage.read(place)).get("history", [])
    return [float(entry["loss"]) for entry in history if "loss" in entry]


def _curve(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    width, height = _CURVE
    low, high = min(values), max(values)
    points = " ".join(
        f"{width * n / (len(values) - 1):.1f},{height - 1 - (height - 2) * (v - low) / ((high - low) or 1):.1f}"
        for n, v in enumerate(values)
    )
    return (
        f"<svg width={width} height={height}>"
        f'<polyline fill="none" stroke="#4477aa" stroke-width="1.5" points="{points}"/></svg>'
    )
