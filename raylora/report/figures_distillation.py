"""The figure of a distillation: teacher, one member and student as dots with their intervals, beside what they cost."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from raylora.ensemble.metric_table import METRICS
from raylora.records import DistillationRecord, RunMetrics
from raylora.report.entries import Entry
from raylora.report.figures import COLORS, Drawn
from raylora.report.formatting import number
from raylora.report.outputs.base import section_of

TINTS = {"teacher": COLORS["ensemble"], "single": COLORS["single"], "student": "#009E73", "alone": "#777777"}
_COSTS = {"latency_ms": ("Latency of one row (ms)", 1.0), "parameters": ("Parameters (millions)", 1e-6)}


def retained(metrics: RunMetrics) -> list[Drawn]:
    """Draw one figure per student: its test metrics and its cost, beside its teacher's."""
    return [_figure(record) for record in metrics.get("distillation") or []]


def _figure(record: DistillationRecord) -> Drawn:
    rows = [Entry(key, one["label"].replace("_", " "), one) for key, one in record["contenders"].items()][::-1]
    shown = [metric for metric in section_of(record).distilled if rows[0].cell("eval", "test", metric) is not None]
    cost = next(key for key in _COSTS if all(key in row.content for row in rows))
    panels = [*shown, cost]
    lines = (len(panels) + 1) // 2
    layout = ConstrainedLayoutEngine(wspace=0.06, hspace=0.06)
    figure = Figure(figsize=(5.8, (0.75 + 0.3 * len(rows)) * lines), layout=layout)
    for place, (axes, panel) in enumerate(zip(figure.subplots(lines, 2, squeeze=False).flat, panels, strict=True)):
        if panel == cost:
            _cost_panel(axes, rows, cost)
        else:
            _metric_panel(axes, rows, panel)
        axes.set_yticks(range(len(rows)), [row.label for row in rows] if place % 2 == 0 else [])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    words = "; ".join(
        f"{row.label} {number(cell.value, 'nll')}"
        for row in rows[::-1] if (cell := row.cell("eval", "test", "nll")) is not None
    )
    return Drawn(f"distilled-{record['name']}", figure, f"Test metrics and cost of teacher and student. NLL: {words}")


def _metric_panel(axes: Axes, rows: list[Entry], metric: str) -> None:
    scale = 100 if METRICS[metric].percent else 1
    for height, row in enumerate(rows):
        cell = row.cell("eval", "test", metric)
        if cell is None:
            continue
        if cell.low is not None and cell.high is not None:
            axes.plot([scale * cell.low, scale * cell.high], [height] * 2, color=TINTS.get(row.key), linewidth=2)
        axes.plot(scale * cell.value, height, "o", color=TINTS.get(row.key), markersize=6)
    axes.set_title(f"{METRICS[metric].label} (%)" if scale == 100 else METRICS[metric].label)


def _cost_panel(axes: Axes, rows: list[Entry], key: str) -> None:
    title, scale = _COSTS[key]
    for height, row in enumerate(rows):
        axes.barh(height, scale * row.content[key], height=0.55, color=TINTS.get(row.key), alpha=0.75)
    axes.set_title(title)
