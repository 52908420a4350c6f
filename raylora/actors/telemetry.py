"""What Ray's dashboard and Prometheus see of a run: a few series, tagged by run and member."""

from __future__ import annotations

import time
from typing import Any

from ray.util.metrics import Counter, Gauge

from raylora.engine.training.trainer import Progress

_TAGS = ("run", "member")
_REPORT_EVERY_S = 0.5


class Telemetry:
    """Feeds ``raylora_*`` metrics from a worker's progress; they appear as ``ray_raylora_*``."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.loss = Gauge("raylora_loss", "Training loss of a member's latest step.", _TAGS)
        self.step = Gauge("raylora_step", "Optimizer steps a member has taken.", _TAGS)
        self.tokens = Counter("raylora_tokens_total", "Tokens trained on, over all members of a pack.", ("run",))
        self.step_seconds = Gauge("raylora_step_seconds", "Duration of a pack's latest step.", ("run",))

    def record(self, progress: Progress) -> None:
        """Publish one step."""
        for member, loss in progress.losses.items():
            tags = {"run": self.run, "member": member}
            self.loss.set(loss, tags)
            self.step.set(progress.step, tags)
        self.tokens.inc(max(1, progress.tokens), {"run": self.run})
        self.step_seconds.set(progress.step_s, {"run": self.run})


class Throttle:
    """Lets a report through at most twice a second, and always the last of a job."""

    def __init__(self) -> None:
        self._last = 0.0
        self._tokens = 0
        self._steps = 0
        self._seconds = 0.0

    def summary(self, progress: Progress) -> dict[str, Any] | None:
        """Return what happened since the last report, or None if that was just now."""
        self._tokens += progress.tokens
        self._steps += 1
        self._seconds += progress.step_s
        now = time.monotonic()
        if now - self._last < _REPORT_EVERY_S and progress.step < progress.total_steps:
            return None
        report = {
            "step": progress.step,
            "total_steps": progress.total_steps,
            "losses": progress.losses,
            "tokens_per_s": self._tokens / max(self._seconds, 1e-9),
            "step_s": self._seconds / self._steps,
        }
        self._last, self._tokens, self._steps, self._seconds = now, 0, 0, 0.0
        return report
