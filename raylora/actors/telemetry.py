"""What Prometheus and Ray's dashboard and timeline see of a run: a few series, tagged by run and member, and spans."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge

from raylora import control
from raylora.progress import Activity, Progress

_RUN, _MEMBER = ("run",), ("run", "member")
_MEMORY_EVERY_S = 5.0
_AGAIN_S = 3.0


@dataclass(frozen=True)
class Series:
    """One metric: its kind, what it says, and what it is tagged by."""

    kind: type[Counter] | type[Gauge]
    description: str
    tags: tuple[str, ...]


SERIES: dict[str, Series] = {
    # from the workers
    "raylora_loss": Series(Gauge, "Training loss of a member's latest step.", _MEMBER),
    "raylora_validation_nll": Series(Gauge, "A member's NLL in its latest validation.", _MEMBER),
    "raylora_grad_norm": Series(Gauge, "Norm of a member's latest gradient, before clipping.", _MEMBER),
    "raylora_step": Series(Gauge, "Optimizer steps a member has taken.", _MEMBER),
    "raylora_tokens_total": Series(Counter, "Tokens trained on, over all members of a pack.", _RUN),
    "raylora_step_seconds": Series(Gauge, "Duration of a pack's latest step.", _RUN),
    "raylora_checkpoint_seconds": Series(Gauge, "Duration of a pack's latest checkpoint.", _RUN),
    "raylora_base_bytes": Series(Gauge, "Size of the base that a worker has loaded.", _RUN),
    "raylora_peak_bytes": Series(Gauge, "Largest resident size that a worker has had.", _RUN),
    "raylora_gpu_memory_bytes": Series(Gauge, "GPU memory that a worker's tensors take up; none without a GPU.", _RUN),
    # from the coordinator
    "raylora_member_phase": Series(
        Gauge, "Where a member stands: 0 pending, 1 running, 2 finished, 3 failed.", _MEMBER),
    "raylora_queue_length": Series(Gauge, "Jobs that wait for a worker.", _RUN),
    "raylora_restarts": Series(Gauge, "How often a job was begun again or a worker lost.", _RUN),
}
"""Every series by name; Ray puts ``ray_`` before it. ``cluster/grafana/raylora.json`` draws just these."""
MEMBER_PHASES = {
    control.JobState.PENDING: 0, control.JobState.RUNNING: 1, control.JobState.FINISHED: 2, control.JobState.FAILED: 3,
}


class Published:
    """Some of the series, of one run."""

    def __init__(self, run: str, names: tuple[str, ...]) -> None:
        """Begin to publish.

        Gauges are said again and again: Ray forgets one that was not set for two of its export intervals, and an epoch,
        or one step of a large model, takes longer.
        """
        self.run = run
        self._metrics: dict[str, Any] = {
            name: SERIES[name].kind(name, SERIES[name].description, tag_keys=SERIES[name].tags) for name in names
        }
        self._gauges: dict[tuple[str, str | None], float] = {}
        threading.Thread(target=self._say_again, daemon=True).start()

    def say(self, name: str, value: float, member: str | None = None) -> None:
        """Set a gauge, or add to a counter."""
        if SERIES[name].kind is Gauge:
            self._gauges[name, member] = value
        self._publish(name, value, member)

    def forget_members(self) -> None:
        """Say nothing more of members that somebody else may be training by now."""
        for key in [key for key in self._gauges.copy() if key[1] is not None]:
            self._gauges.pop(key, None)

    def _publish(self, name: str, value: float, member: str | None) -> None:
        metric = self._metrics[name]
        tags = {"run": self.run, **({"member": member} if member is not None else {})}
        (metric.inc if isinstance(metric, Counter) else metric.set)(value, tags)

    def _say_again(self) -> None:
        while True:
            time.sleep(_AGAIN_S)
            for (name, member), value in self._gauges.copy().items():
                self._publish(name, value, member)


class Telemetry:
    """Feeds ``raylora_*`` metrics from a worker's progress; they appear as ``ray_raylora_*``."""

    def __init__(self, run: str) -> None:
        self.published = Published(run, tuple(name for name in SERIES if name not in COORDINATOR_SERIES))
        self._measured_at = 0.0

    def loaded(self, base_bytes: int) -> None:
        """Publish the size of what was loaded."""
        self.published.say("raylora_base_bytes", base_bytes)
        self.measure_memory()

    def begin_job(self) -> None:
        """Say nothing more of the members of the job before."""
        self.published.forget_members()

    def record(self, progress: Progress) -> None:
        """Publish one step; what is not training has no series."""
        if progress.activity is not Activity.TRAINING:
            return
        say = self.published.say
        for member, loss in progress.losses.items():
            say("raylora_loss", loss, member)
            say("raylora_step", progress.done, member)
        for member, norm in progress.grad_norms.items():
            say("raylora_grad_norm", norm, member)
        for member, values in progress.validations.items():
            if "nll" in values:
                say("raylora_validation_nll", values["nll"], member)
        say("raylora_tokens_total", max(1, progress.tokens))
        say("raylora_step_seconds", progress.seconds)

    def measure_memory(self) -> None:
        """Publish what this process has needed, if that was not done just now."""
        if time.monotonic() - self._measured_at < _MEMORY_EVERY_S:
            return
        self._measured_at = time.monotonic()
        import torch  # where a worker measures, its session has long imported it

        from raylora.engine.model.machine import peak_memory_bytes

        self.published.say("raylora_peak_bytes", peak_memory_bytes())
        if torch.cuda.is_initialized():
            self.published.say("raylora_gpu_memory_bytes", torch.cuda.memory_allocated())

    @contextmanager
    def span(self, what: str) -> Iterator[None]:
        """Mark a step or a checkpoint in Ray's timeline, and publish how long a checkpoint takes."""
        began = time.monotonic()
        with _timeline(f"raylora:{what}"):
            yield
        if what == "checkpoint":
            self.published.say("raylora_checkpoint_seconds", time.monotonic() - began)


COORDINATOR_SERIES = ("raylora_member_phase", "raylora_queue_length", "raylora_restarts")


class RunTelemetry:
    """Feeds the metrics that only the coordinator knows, from the run's state."""

    def __init__(self, run: str) -> None:
        self.published = Published(run, COORDINATOR_SERIES)
        self._said: control.State | None = None
        self._phases: dict[str, int] = {}

    def record(self, state: control.State) -> None:
        """Publish where a run is; only what has changed is said."""
        if state is self._said:
            return
        self._said = state
        self.published.say("raylora_queue_length", len(state.pending))
        self.published.say("raylora_restarts", restarts(state))
        for job in state.jobs.values():
            for unit in job.units:
                phase = MEMBER_PHASES[control.JobState.FAILED if unit in state.failed_units else job.status]
                if self._phases.get(unit) != phase:
                    self._phases[unit] = phase
                    self.published.say("raylora_member_phase", phase, unit)


def restarts(state: control.State) -> int:
    """Return how often jobs of a run were begun again, and how often workers died without a job."""
    return sum(max(0, job.attempt - 1) for job in state.jobs.values()) + sum(state.worker_failures.values())


def _timeline(name: str) -> Any:
    """Return a span of Ray's timeline, which keeps spans where RAY_PROFILING=1 was set when the cluster was started.

    Ray has no public call for it, and nothing depends on there being one.
    """
    if os.environ.get("RAY_PROFILING") is None:
        return nullcontext()
    try:
        from ray._private.profiling import profile
    except ImportError:
        return nullcontext()
    return profile(name)
