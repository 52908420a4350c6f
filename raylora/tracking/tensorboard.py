"""TensorBoard: event files in ``RUN/tensorboard``, a folder per member.

Records are written here and now, one by one: tensorboardX's own ``SummaryWriter`` hands them to a thread through a
queue of ten, and where that thread dies of a full disk, whoever logs next waits for ever.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from typing import Any, Literal

import yaml

from raylora.spec import TrackerSpec
from raylora.tracking.base import TrackedRun, Tracker, require


class Spec(TrackerSpec):
    """Event files that ``tensorboard --logdir RUN/tensorboard`` shows."""

    kind: Literal["tensorboard"] = "tensorboard"


def check(spec: Spec) -> None:
    """Refuse what cannot work on this machine. Raises: SpecError."""
    require("tensorboardX", "tensorboard")


class TensorBoard:
    """A file of events per member and attempt."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.files: dict[str, Any] = {}

    def begin(self, subject: str, after_step: int) -> None:
        """Open a new file; TensorBoard reads a folder's files in the order of their names."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import text

        folder = self.run.folder / "tensorboard" / subject
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{now % 10**9:09d}.{socket.gethostname()}"
        self.files[subject] = RecordWriter(str(folder / name))
        # A start makes readers forget the events from its step on: those of an attempt that was lost.
        step = after_step + 1 if after_step else 0
        self._write(subject, Event(step=step, file_version="brain.Event:2"))
        self._write(subject, Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        if not after_step:
            spec = yaml.safe_dump(dict(self.run.settings), sort_keys=False, allow_unicode=True)
            self._write(subject, Event(step=0, summary=text("spec", f"```yaml\n{spec}```")))

    def log(self, subject: str, step: int, values: Mapping[str, float]) -> None:
        """Write a step's scalars as one event."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(subject, Event(step=step, summary=Summary(value=scalars)))

    def flush(self) -> None:
        """Sync the files."""
        for file in self.files.values():
            file.flush()

    def close(self, complete: bool) -> None:
        """Sync and close the files."""
        for file in self.files.values():
            file.flush()
            file.close()

    def _write(self, subject: str, event: Any) -> None:
        event.wall_time = time.time()
        self.files[subject].write(event.SerializeToString())


def build(spec: Spec, run: TrackedRun) -> Tracker:
    """Return the tracker of a run."""
    return TensorBoard(run)
