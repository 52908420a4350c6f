"""Small multiples of the training: each recorded quantity over the steps, a line per member, marked where one stopped.

It takes metrics.json and returns ``Drawn`` figures; it returns none where the numbers are missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raylora.ensemble.metric_table import METRICS
from raylora.records import HistoryRow, RunMetrics
from raylora.report.figures import Drawn
from raylora.report.outputs.base import section_of

_VALIDATION = "validation_"
_FEW_POINTS = 15
"""So few are seen one by one."""
_NAMED = 10
"""With more members, nobody finds a color in a legend."""


def training(metrics: RunMetrics) -> list[Drawn]:
    """Draw every validation metric that the histories hold, the loss, the gradient norm and the learning rate."""
    runs = {name: rows for name, rows in sorted(metrics.get("training", {}).items()) if rows}
    stops = {one["name"]: step for one in metrics.get("members", []) if (step := one.get("stopped_at")) is not None}
    drawn = []
    for key in _recorded(metrics, list(runs.values())):
        title, scale = _title(key)
        figure = Figure(figsize=(3.9, 3.0), layout="constrained")
        axes = figure.subplots()
        stopped = _lines(axes, runs, stops, key, scale)
        axes.set(title=title, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if 1 < len(runs) <= _NAMED:
            figure.legend(title="member", loc="outside right center", handlelength=1.0, fontsize=8, title_fontsize=8)
        words = f"; {stopped} of {len(runs)} stopped early, at the crosses" if stopped else ""
        drawn.append(Drawn(f"training-{key.replace('_', '-')}", figure, f"{title} of each member by step{words}"))
    return drawn


def any_stopped(metrics: RunMetrics) -> bool:
    """Return whether early stopping ended a member's training."""
    return any(one.get("stopped_at") is not None for one in metrics.get("members", []))


def _recorded(metrics: RunMetrics, runs: Sequence[Sequence[HistoryRow]]) -> list[str]:
    """Return what some history holds, in reading order: loss, validation metrics as the page ranks them, the rest."""
    found = dict.fromkeys(key for rows in runs for row in rows for key, value in row.items() if value is not None)
    judged = [key for key in found if key.startswith(_VALIDATION) and key.removeprefix(_VALIDATION) in METRICS]
    first = [f"{_VALIDATION}{name}" for name in section_of(metrics).watched]
    order = ["loss", *[key for key in first if key in judged], *[key for key in judged if key not in first]]
    return [key for key in (*order, "grad_norm", "lr") if key in found]


def _title(key: str) -> tuple[str, float]:
    """Return what a quantity is called, and by what it is multiplied to be drawn."""
    if key.startswith(_VALIDATION):
        metric = METRICS[key.removeprefix(_VALIDATION)]
        unit, scale = (" (%)", 100.0) if metric.percent else ("", 1.0)
        return f"Validation: {metric.label}{unit}", scale
    return {"loss": "Training loss", "grad_norm": "Gradient norm", "lr": "Learning rate"}[key], 1.0


def _lines(
    axes: Axes, runs: Mapping[str, Sequence[HistoryRow]], stops: Mapping[str, int], key: str, scale: float
) -> int:
    """Draw a line per member and return how many of them end at a mark."""
    tints = matplotlib.colormaps["viridis"].resampled(max(2, len(runs) + 1))  # the last, yellow, is not seen on white
    stopped = 0
    for index, (name, rows) in enumerate(runs.items()):
        points = [(row["step"], scale * row[key]) for row in rows if row.get(key) is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < _FEW_POINTS else ""
        axes.plot(steps, values, color=tints(index), linewidth=1.3, marker=marker, markersize=3, label=_short(name))
        if name in stops:
            stopped += 1
            axes.plot(steps[-1], values[-1], "X", color=tints(index), markeredgecolor="black", markersize=8, zorder=3)
    return stopped


def _short(name: str) -> str:
    """Return a member's number."""
    number = name.rpartition("-")[2]
    return str(int(number)) if number.isdecimal() else name
