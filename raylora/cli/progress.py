"""How a run looks while it goes on: a live table on a terminal, elsewhere a plain line per job now and then."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from raylora.cli.console import err
from raylora.cli.tables import block_line, headline, job_line, status_table
from raylora.control import JobState
from raylora.engine.run.run_status import OnStatus, RunStatus
from raylora.progress import BlockDone

LINE_EVERY_S = 10.0
_REDRAW_EVERY_S = 0.5


class ShownStatus:
    """Shows every status it is given: on a terminal a live table, elsewhere at most one line per job every few seconds.

    It is the same for a run on a cluster, which is asked twice a second, and for one in this process, which tells of
    every step.
    """

    def __init__(self) -> None:
        self._live: Any = None
        self._last = 0.0
        self._printed: list[str] = []

    def __enter__(self) -> OnStatus:
        if err.is_terminal:
            from rich.live import Live

            self._live = Live(console=err, auto_refresh=False, transient=True)
            self._live.__enter__()
            return self._table
        return self._lines

    def __exit__(self, *details: Any) -> None:
        if self._live is not None:
            with suppress(Exception):
                self._live.__exit__(*details)

    def _is_due(self, every_s: float) -> bool:
        due = time.monotonic() - self._last >= every_s
        if due:
            self._last = time.monotonic()
        return due

    def _table(self, status: RunStatus) -> None:
        if self._is_due(_REDRAW_EVERY_S):
            self._live.update(status_table(status), refresh=True)

    def _lines(self, status: RunStatus) -> None:
        if not self._is_due(LINE_EVERY_S):
            return
        jobs = [job_line(name, job) for name, job in status.jobs.items() if job.status is JobState.RUNNING]
        lines = [*jobs, headline(status)]
        if lines != self._printed:  # a long wait is printed once
            self._printed = lines
            err.print("\n".join(lines), markup=False)


def say_block(done: BlockDone) -> None:
    """Print how far a base's preparation is."""
    err.print(block_line(done), markup=False)
