"""What a tracker is: it is told numbers while a run goes on and shows them elsewhere; a run never reads them back."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raylora.errors import SpecError


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of the run as a whole."""

    name: str
    key: str
    """Equal when the run is taken up again, another one for a new run of the same name."""
    folder: Path
    """A local folder in which trackers that write files make a folder of their own; it ends up in the run directory."""
    settings: Mapping[str, Any]
    """The spec as plain data."""


class Tracker(Protocol):
    """One place where numbers are shown. All calls come from one thread, and any of them may fail."""

    def begin(self, subject: str, after_step: int) -> None:
        """Begin with a member, or with ``ensemble``, or go on after a step: what was said of later steps is void."""

    def log(self, subject: str, step: int, values: Mapping[str, float]) -> None:
        """Take values by name, such as ``train/loss``; steps never go back."""

    def flush(self) -> None:
        """Make sure that all values so far outlive this process."""

    def close(self, complete: bool) -> None:
        """End; what is not complete will be gone on with."""


def require(module: str, kind: str) -> None:
    """Refuse a tracker whose package is not installed. Raises: SpecError."""
    if importlib.util.find_spec(module) is None:
        raise SpecError(
            f"tracking: {kind} needs the Python package {module}, which is not installed",
            f"`pip install {module}`, on every node, or leave {kind} out of `tracking`",
        )


def leaves(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as ``a.b.c`` -> value."""
    if not isinstance(settings, Mapping) or not settings:
        return {prefix: settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return found
