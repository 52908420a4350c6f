"""How a run looks while it goes on: a live table on a terminal, elsewhere a plain line per job now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from raylora.cli.console import err
from raylora.cli.tables import activity, block_line, status_table

LINE_EVERY_S = 10.0


class LocalLines:
    """One plain line per job of a run in this process."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, job: str, progress: Any) -> None:
        """Print how far a job is, unless that was just done."""
        if time.monotonic() - self._last < LINE_EVERY_S and progress.step < progress.total_steps:
            return
        self._last = time.monotonic()
        left_s = (progress.total_steps - progress.step) * progress.step_s
        err.print(f"{job} step {progress.step}/{progress.total_steps} {losses_of(progress.losses)} eta {left_s:.0f} s")


def losses_of(losses: dict[str, float]) -> str:
    """Return the losses of a pack's members in few words."""
    values = list(losses.values())
    if len(values) < 2:
        return f"loss {values[0]:.3f}" if values else "loss n/a"
    return f"loss {sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} members)"


class LiveProgress:
    """A live table on a terminal; elsewhere one plain line per job every few seconds."""

    def __init__(self) -> None:
        self._live: Any = None
        self._last = 0.0
        self._said = ""

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        if err.is_terminal:
            from rich.live import Live

            self._live = Live(console=err, refresh_per_second=2, transient=True)
            self._live.__enter__()
            return lambda found: self._live.update(status_table(found))
        return self._lines

    def __exit__(self, *details: Any) -> None:
        if self._live is not None:
            with suppress(Exception):
                self._live.__exit__(*details)

    def _lines(self, found: dict[str, Any]) -> None:
        if time.monotonic() - self._last < LINE_EVERY_S:
            return
        self._last = time.monotonic()
        lines = [
            f"{name} step {job['step']}/{job['total_steps']} {losses_of(job['losses'])} "
            f"{job['tokens_per_s']:.0f} tokens/s"
            for name, job in found["jobs"].items()
            if job["status"] == "running" and job.get("step", 0) < job.get("total_steps", 0)
        ]
        training = bool(lines)
        quiet = training or found["phase"] not in ("training", "preparing")
        doing = found["phase"] if quiet else activity(found)
        eta = found.get("eta_s")
        lines.append(doing + (f"; training ends in about {eta:.0f} s" if training and eta else ""))
        if "\n".join(lines) != self._said:  # a long wait is said once
            self._said = "\n".join(lines)
            err.print(self._said, markup=False)


def say_block(done: Any) -> None:
    """Print how far a base's preparation is."""
    err.print(block_line(vars(done)), markup=False)
