"""Learning rates for a contender: several seeds at each, as the members of one run, and validation rows choose.

Member m has rate m modulo the number of rates, so that the seeds of one rate stand so many apart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def members_at(rates: Sequence[float], seeds: int) -> dict[str, Any]:
    """Return what a spec's ensemble says of its members: so many seeds at each rate."""
    return {"members": seeds * len(rates), "vary": [{"optimization.lr": lr} for lr in rates] * seeds}


def validation(metrics: Mapping[str, Any]) -> list[float]:
    """Return each member's last NLL on the validation rows."""
    return [
        [row["validation_nll"] for row in rows if "validation_nll" in row][-1]
        for _, rows in sorted(metrics["training"].items())
    ]


@dataclass(frozen=True)
class BestRate:
    """The rate with the least mean validation NLL."""

    lr: float
    validation_nll: dict[str, float]
    """By rate, the mean over its seeds."""
    members: range
    """Which members have the chosen rate."""

    def test(self, metrics: Mapping[str, Any], key: str) -> list[float]:
        """Return a metric of the test rows, which are read at the chosen rate alone, of each seed."""
        return [metrics["members"][index]["eval"]["test"][key] for index in self.members]


def best_rate(metrics: Mapping[str, Any], rates: Sequence[float]) -> BestRate:
    """Return the rate that the validation rows choose."""
    last = validation(metrics)
    means = [statistics.fmean(last[place::len(rates)]) for place in range(len(rates))]
    best = means.index(min(means))
    of_rate = {f"{lr:g}": value for lr, value in zip(rates, means, strict=True)}
    return BestRate(rates[best], of_rate, range(len(last))[best::len(rates)])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return a mean over seeds and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
