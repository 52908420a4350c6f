"""Where the time of a step goes: a trace of a few steps of each job, by torch's profiler.

It only listens: a member is bit for bit the same with and without it.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from raylora.spec import ProfileSpec
from raylora.store.run_store import RunStore

logger = logging.getLogger(__name__)

_ROWS = 25
"""Of the table of operations."""


class StepProfiler:
    """Records some steps of one job, then writes ``profile/JOB.json.gz`` and ``profile/JOB.txt``.

    :meth:`after_step` is called after each step; leaving the ``with`` block writes what a job that ended earlier
    has recorded. Without a spec nothing happens.
    """

    def __init__(self, spec: ProfileSpec | None, store: RunStore, job: str, steps_left: int) -> None:
        """Shift the window forward for a job that has fewer steps left than are to be skipped and recorded."""
        self.store, self.job = store, job
        self.start = min(spec.skip, max(0, steps_left - spec.steps)) if spec else -1
        self.end = self.start + spec.steps if spec else -1
        self.taken = 0
        self._profiler: Any = None

    def __enter__(self) -> StepProfiler:
        self._start_if_due()
        return self

    def __exit__(self, *error: object) -> None:
        self._finish()

    def after_step(self) -> None:
        """Count a step; begin or end recording if it is time."""
        self.taken += 1
        if self.taken == self.end:
            self._finish()
        self._start_if_due()

    def _start_if_due(self) -> None:
        if self.taken != self.start:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        try:
            profiler = profile(activities=activities, acc_events=True)
            profiler.start()
        except RuntimeError as error:  # another profiler holds the device, say
            self._warn(error)
            return
        self._profiler = profiler

    def _finish(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        steps = min(self.taken, self.end) - self.start
        try:
            profiler.stop()
            self._write(profiler, steps)
        except Exception as error:
            self._warn(error)
        else:
            logger.info("%s: %d steps profiled, in %s/profile", self.job, steps, self.store.uri)

    def _warn(self, error: Exception) -> None:
        """It was asked for, but the training under way is worth more than a trace."""
        logger.warning("%s: there is no profile: %s: %s", self.job, type(error).__name__, error)

    def _write(self, profiler: Any, steps: int) -> None:
        with tempfile.TemporaryDirectory(prefix="raylora-profile-") as folder:
            trace = Path(folder, "trace.json.gz")
            profiler.export_chrome_trace(str(trace))
            self.store.storage.write(f"profile/{self.job}.json.gz", trace.read_bytes())
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=60)
        head = f"{self.job}: steps {self.start + 1} to {self.start + steps} of this attempt, the most expensive first\n"
        self.store.storage.write(f"profile/{self.job}.txt", (head + table).encode())
