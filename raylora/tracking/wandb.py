"""Weights & Biases: a run per member, grouped by raylora's run; offline too, for ``wandb sync`` later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from raylora.spec import TrackerSpec
from raylora.tracking.base import TrackedRun, Tracker, require


class Spec(TrackerSpec):
    """Runs of a W&B project; the key is W&B's own affair (``wandb login`` or ``WANDB_API_KEY`` on each node)."""

    kind: Literal["wandb"] = "wandb"
    project: str = "raylora"
    """The project that the runs belong to."""
    entity: str | None = None
    """The user or team that owns the project; by default W&B's own choice."""
    mode: Literal["online", "offline"] | None = None
    """Whether runs are sent while they go on; by default what ``WANDB_MODE`` says, else online. Offline runs lie in
    ``RUN/wandb``."""


def check(spec: Spec) -> None:
    """Refuse what cannot work on this machine. Raises: SpecError."""
    require("wandb", "wandb")


class WandB:
    """W&B has a process of its own that sends the values; a step that it has already is left out."""

    def __init__(self, spec: Spec, run: TrackedRun) -> None:
        self.spec, self.run = spec, run
        self.runs: dict[str, Any] = {}
        self.first: dict[str, int] = {}

    def begin(self, subject: str, after_step: int) -> None:
        """Go on with the member's W&B run, or make one."""
        import wandb

        self.run.folder.mkdir(parents=True, exist_ok=True)
        self.runs[subject] = wandb.init(
            project=self.spec.project, entity=self.spec.entity, mode=self.spec.mode, group=self.run.name,
            name=f"{self.run.name}/{subject}", id=f"{self.run.key}-{subject}", resume="allow",
            dir=str(self.run.folder), config=dict(self.run.settings), reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Online, W&B tells which step comes next; offline it cannot know, and counts from 0.
        self.first[subject] = max(self.runs[subject].step, after_step + 1 if after_step else 0)

    def log(self, subject: str, step: int, values: Mapping[str, float]) -> None:
        """Hand a step's values over; those of one step become one row."""
        if step >= self.first[subject]:
            self.runs[subject].log(dict(values), step=step)

    def flush(self) -> None:
        """W&B writes what it gets at once."""

    def close(self, complete: bool) -> None:
        """End the members' W&B runs."""
        for run in self.runs.values():
            run.finish(exit_code=0 if complete else 1)


def build(spec: Spec, run: TrackedRun) -> Tracker:
    """Return the tracker of a run."""
    return WandB(spec, run)
