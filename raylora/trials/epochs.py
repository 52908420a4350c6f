"""What a trial reports to Tune: the mean of its members at the end of every epoch that all of them have reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from raylora.engine.run.run_status import RunStatus


class Epochs:
    """Reports each epoch's end once all of a trial's members have reached it."""

    def __init__(self, report: Callable[[dict[str, Any]], None], own: Collection[str] | None = None) -> None:
        """Take who is told, and of which members; by default of all that a run has."""
        self.report, self.own = report, own
        self.reported = 0
        self.latest: dict[str, Any] = {}
        self._seen: dict[str, Any] = {}
        self._values: dict[str, list[tuple[int, Mapping[str, float]]]] = {}

    def __call__(self, status: RunStatus) -> None:
        """Take what the run says of itself."""
        for name, job in status.jobs.items():
            progress = job.progress
            if progress is None or progress is self._seen.get(name):
                continue
            self._seen[name] = progress
            for member, values in progress.validations.items():
                if self._is_own(member):
                    self._values.setdefault(member, []).append((progress.done, values))
        members = [unit for job in status.jobs.values() for unit in job.units if self._is_own(unit)]
        while members and all(len(self._values.get(member, ())) > self.reported for member in members):
            ended = [self._values[member][self.reported] for member in members]
            self.reported += 1
            self.latest = {"step": max(step for step, _ in ended), **_means([values for _, values in ended])}
            self.report(self.latest)

    def end(self, **facts: Any) -> None:
        """Report the last numbers again, and facts with them; of members that stopped early, their last."""
        self.report({**self.latest, **_means([values[-1][1] for values in self._values.values()]), **facts})

    def _is_own(self, unit: str) -> bool:
        return unit.startswith("member-") if self.own is None else unit in self.own


def _means(ended: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = ended[0] if ended else {}
    return {f"validation_{key}": statistics.fmean(values[key] for values in ended if key in values) for key in keys}
