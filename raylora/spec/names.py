"""Names of runs, and of what lies in their directories."""

from __future__ import annotations

import re

NAME_PATTERN = re.compile(r"^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?\Z")
"""Run names: short enough for a Kubernetes label and safe as a folder name."""
RUN_FOLDERS = (
    "members", "baselines", "predictions", "checkpoints", "snapshots", "timing", "targets", "export", "plots",
    "distillation", "tensorboard", "wandb", "profile", "trunk", "answers",
)
"""What a run's directory has folders of its own for."""
