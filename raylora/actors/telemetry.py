"""What Ray's dashboard and Prometheus see of a run: a few series, tagged by run and member."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from raylora.progress import Activity, Progress

_TAGS = ("run", "member")


class Telemetry:
    """Feeds ``raylora_*`` metrics from a worker's progress; they appear as ``ray_raylora_*``."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.loss = Gauge("raylora_loss", "Training loss of a member's latest step.", _TAGS)
        self.step = Gauge("raylora_step", "Optimizer steps a member has taken.", _TAGS)
        self.tokens = Counter("raylora_tokens_total", "Tokens trained on, over all members of a pack.", ("run",))
        self.step_seconds = Gauge("raylora_step_seconds", "Duration of a pack's latest step.", ("run",))

    def record(self, progress: Progress) -> None:
        """Publish one step; what is not training has no series."""
        if progress.activity is not Activity.TRAINING:
            return
        for member, loss in progress.losses.items():
            tags = {"run": self.run, "member": member}
            self.loss.set(loss, tags)
            self.step.set(progress.done, tags)
        self.tokens.inc(max(1, progress.tokens), {"run": self.run})
        self.step_seconds.set(progress.seconds, {"run": self.run})
