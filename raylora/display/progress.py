"""How a run looks while it goes on: a live table on a terminal, a bar in a notebook, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
import warnings
from contextlib import suppress
from typing import Any, Protocol

from rich.live import Live

from raylora.control import JobState
from raylora.display.console import err
from raylora.display.status import block_line, headline, job_line, status_table
from raylora.engine.run.run_status import OnStatus, RunStatus
from raylora.progress import BlockDone

LINE_EVERY_S = 10.0
_REDRAW_EVERY_S = 0.5
_MOST_JOBS = 50
"""More than that nobody reads while they change, and drawing ten thousand takes seconds."""


class _View(Protocol):
    """One way to show a run."""

    every_s: float
    """How often it shows a status."""

    def show(self, status: RunStatus) -> None:
        """Show where the run is."""

    def tell(self, news: str) -> None:
        """Show what happened, for good."""

    def close(self) -> None:
        """Leave nothing unfinished on the screen."""


class ShownStatus:
    """Shows every status it is given, and every piece of news once.

    It is the same for a run on a cluster, which is asked twice a second, and for one in this process, which tells of
    every step.
    """

    def __init__(self) -> None:
        self._view: _View
        self._told = 0
        self._last = 0.0

    def __enter__(self) -> OnStatus:
        self._view = _Bar() if err.is_jupyter else _Table() if err.is_terminal else _Lines()
        return self._show

    def __exit__(self, *details: Any) -> None:
        with suppress(Exception):  # how a run is shown must not end it, nor hide what did
            self._view.close()

    def _show(self, status: RunStatus) -> None:
        new = status.news_count - self._told
        if new > 0:
            self._told = status.news_count
            for news in status.news[-new:]:
                self._view.tell(news)
        if time.monotonic() - self._last >= self._view.every_s:
            self._last = time.monotonic()
            self._view.show(status)


class _Table:
    """A table that is drawn again in place; news scroll by above it."""

    every_s = _REDRAW_EVERY_S

    def __init__(self) -> None:
        self._live = Live(console=err, auto_refresh=False, transient=True)
        self._live.start()

    def show(self, status: RunStatus) -> None:
        self._live.update(status_table(status, most=_MOST_JOBS), refresh=True)

    def tell(self, news: str) -> None:
        err.print(news, markup=False)

    def close(self) -> None:
        self._live.stop()


class _Lines:
    """A line per running job and one for the whole, every few seconds: for logs."""

    every_s = LINE_EVERY_S

    def __init__(self) -> None:
        self._printed: list[str] = []

    def show(self, status: RunStatus) -> None:
        jobs = [(name, job) for name, job in status.jobs.items() if job.status is JobState.RUNNING]
        lines = [job_line(name, job) for name, job in jobs[:_MOST_JOBS]]
        lines += [f"and {len(jobs) - _MOST_JOBS} more jobs"] if len(jobs) > _MOST_JOBS else []
        lines.append(headline(status))
        if lines != self._printed:  # a long wait is printed once
            self._printed = lines
            err.print("\n".join(lines), markup=False)

    def tell(self, news: str) -> None:
        err.print(news, markup=False)

    def close(self) -> None:
        pass


class _Bar:
    """One bar over the steps of all jobs, as notebooks show it."""

    every_s = _REDRAW_EVERY_S

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets it is drawn in letters, which serves
            from tqdm.auto import tqdm
        self._bar = tqdm(total=1, file=sys.stderr, bar_format="{l_bar}{bar}| {postfix}")

    def show(self, status: RunStatus) -> None:
        self._bar.n = round(status.share_done, 4)
        self._bar.set_postfix_str(headline(status))

    def tell(self, news: str) -> None:
        self._bar.write(news, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def say_block(done: BlockDone) -> None:
    """Print how far a base's preparation is."""
    err.print(block_line(done), markup=False)
