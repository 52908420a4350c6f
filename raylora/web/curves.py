"""The curves of a run's members: what their histories hold, and after that what was seen live."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

Points = list[tuple[int, float]]
LOSS = "loss"
_VALIDATION = "validation_"


class Curves:
    """Points by member and series. A member that was taken back to a commit loses what came after it."""

    def __init__(self) -> None:
        self._points: dict[str, dict[str, Points]] = {}

    def see(self, member: str, step: int, values: Mapping[str, float]) -> None:
        """Add what a status says of a member after a step; nothing changes where that was seen already."""
        for name, value in values.items():
            if math.isfinite(value):
                points = self._points.setdefault(member, {}).setdefault(name, [])
                if not points or points[-1][0] != step:
                    _take_back(points, step)
                    points.append((step, value))

    def take_history(self, member: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put a committed history in place of what was seen up to its last step; what was seen after it stays."""
        known: dict[str, Points] = {}
        last = 0
        for row in rows:
            step = int(row["step"])
            last = max(last, step)
            for key, value in row.items():
                name = key.removeprefix(_VALIDATION)
                is_shown = key == LOSS or key.startswith(_VALIDATION)
                if is_shown and isinstance(value, int | float) and math.isfinite(value):
                    known.setdefault(name, []).append((step, float(value)))
        seen = self._points.get(member, {})
        self._points[member] = {
            name: known.get(name, []) + [point for point in seen.get(name, []) if point[0] > last]
            for name in sorted({*known, *seen})
        }

    def latest(self, member: str) -> tuple[int, float] | None:
        """Return the last step of a member that is known of, with its loss, or None."""
        points = self._points.get(member, {}).get(LOSS)
        return points[-1] if points else None

    def shown(self, members: Iterable[str], most: int) -> dict[str, dict[str, Points]]:
        """Return the series of some members, each thinned to at most so many points; those without are left out."""
        found = {member: self._points[member] for member in members if self._points.get(member)}
        return {
            member: {name: thinned(points, most) for name, points in series.items()} for member, series in found.items()
        }


def thinned(points: Points, most: int) -> Points:
    """Return at most so many of the points, evenly chosen, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _take_back(points: Points, step: int) -> None:
    while points and points[-1][0] >= step:
        points.pop()
