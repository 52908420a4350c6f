"""Tables and lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def predictions_table(predictions: Sequence[Any]) -> Table:
    """Return what an ensemble says, a row each, in the columns of its output."""
    table = Table("row", *predictions[0].heads)
    for one in predictions:
        table.add_row(one.id, *one.cells())
    return table


def status_table(found: dict[str, Any]) -> Table:
    """Return where every member of a run is."""
    eta = found.get("eta_s")
    title = f"{found.get('run', '')} {found['phase']}" + (f", about {eta:.0f} s of training left" if eta else "")
    if found["phase"] == "preparing":
        title = f"{found.get('run', '')} {activity(found)}"
    table = Table("member", "state", "step", "loss", "tokens/s", title=title)
    for job in found.get("jobs", {}).values():
        for unit in job["units"]:
            state = "failed" if unit in found.get("failed", {}) else job["status"]
            losses = job.get("losses", {})
            table.add_row(
                unit, state,
                f"{job['step']}/{job['total_steps']}" if "step" in job else "",
                f"{losses[unit]:.3f}" if unit in losses else "",
                f"{job['tokens_per_s']:.0f}" if "tokens_per_s" in job else "",
            )
    return table


def activity(found: dict[str, Any]) -> str:
    """Return what a run is doing while no member trains."""
    if found["phase"] == "preparing":
        done = found.get("preparation")
        return block_line(done) if done else "preparing the base: reading calibration text"
    if "starting" in found["workers"].values():
        return "loading the base in " + ", ".join(w for w, s in found["workers"].items() if s == "starting")
    return "evaluating"


def block_line(done: dict[str, Any]) -> str:
    """Return how far the preparation of a base is."""
    left = f", {100 * done['error']:.1f} % of the outputs' norm lost" if done["error"] is not None else ""
    return f"preparing the base: block {done['block']}/{done['blocks']}{left}, about {done['eta_s']:.0f} s left"
