"""Figures of how good predictions are: reliability, selective risk and the M-curve.

Each function takes metrics.json and returns ``Drawn`` figures; it returns none where the numbers are missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raylora.ensemble.metric_table import METRICS
from raylora.records import CurvePoint, ReliabilityBin, RunMetrics
from raylora.report.entries import entries, scored_sets
from raylora.report.outputs.base import section_of

COLORS = {
    "ensemble": "#0072B2",
    "mean_member": "#56B4E9",
    "single": "#D55E00",
    "mc_dropout": "#009E73",
    "last_layer": "#CC79A7",
    "checkpoints": "#8A6D00",
    "selected": "#005A9C",
    "stacked": "#7FB3D5",
    "temperature": "#777777",
    "laplace": "#000000",
    "swag": "#6A3D9A",
}
"""Okabe and Ito's palette, the yellow darkened to be seen on white."""
SPARE = ("#000000", "#777777", "#56B4E9")
DASHES = {
    "ensemble": "-",
    "single": "--",
    "mc_dropout": "-.",
    "last_layer": ":",
    "checkpoints": (0, (5, 1, 1, 1, 1, 1)),
    "selected": (0, (2, 1)),
    "stacked": (0, (3, 1)),
    "temperature": (0, (1, 1)),
    "laplace": (0, (6, 2, 1, 2)),
    "swag": (0, (3, 2)),
}
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Drawn:
    """A figure, the name of its file, and what it says in words for those who cannot see it."""

    name: str
    figure: Figure
    alt: str


@contextmanager
def style() -> Iterator[None]:
    """Draw with the page's fonts and lines, whatever the user's matplotlibrc says."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def color(key: str, index: int = 0) -> str:
    """Return the color of a contender, the same in every figure."""
    return COLORS.get(key, SPARE[index % len(SPARE)])


def reliability(metrics: RunMetrics) -> list[Drawn]:
    """Per set: accuracy against confidence with counts, ensemble above single, before and after temperature."""
    drawn = []
    for name, groups in metrics.get("plots", {}).get("reliability", {}).items():
        pair = [key for key in ("ensemble", "single") if key in groups]
        stages = [stage for stage in ("before", "after") if any(stage in groups[key] for key in pair)]
        figure = Figure(figsize=(2.8 * len(stages), 3.3 * len(pair) + 0.3), layout="constrained")
        figure.suptitle(name, fontsize=11)
        ratios = [3, 1] * len(pair)
        axes = figure.subplots(2 * len(pair), len(stages), squeeze=False, height_ratios=ratios)
        for (row, key), (column, stage) in itertools.product(enumerate(pair), enumerate(stages)):
            bins = (groups[key].get("before") if stage == "before" else groups[key].get("after")) or []
            words = {"before": "as predicted", "after": "temperature-scaled"}[stage] if len(stages) > 1 else ""
            axes[2 * row][column].set_title(f"{key.capitalize()} {words}".strip(), fontsize=10)
            _reliability_panel(axes[2 * row][column], bins, color(key))
            _count_panel(axes[2 * row + 1][column], bins, color(key))
        drawn.append(Drawn(f"reliability-{name}", figure, f"Reliability diagrams with counts on {name}"))
    return drawn


def _reliability_panel(axes: Axes, bins: Sequence[ReliabilityBin], tint: str) -> None:
    full = [one for one in bins if one["count"]]
    axes.plot([0, 1], [0, 1], color="#555555", linewidth=1, linestyle="--", label="calibrated")
    axes.bar(
        [(one["lower"] + one["upper"]) / 2 for one in full],
        [one["accuracy"] or 0.0 for one in full],
        width=1 / max(len(bins), 1),
        color=tint,
        alpha=0.45,
        edgecolor=tint,
    )
    points = [(one["confidence"] or 0.0, one["accuracy"] or 0.0) for one in full]
    axes.plot([x for x, _ in points], [y for _, y in points], "o", color=tint, markersize=4)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    axes.tick_params(labelbottom=False)


def _count_panel(axes: Axes, bins: Sequence[ReliabilityBin], tint: str) -> None:
    counts = [one["count"] for one in bins]
    centers = [(one["lower"] + one["upper"]) / 2 for one in bins]
    axes.bar(centers, counts, width=1 / max(len(bins), 1), color=tint, edgecolor="white")
    for center, count in zip(centers, counts, strict=True):
        if count:
            axes.text(center, count, f"{count}", ha="center", va="bottom", fontsize=7.5, rotation=90)
    axes.set(xlim=(0, 1), ylim=(0, max([1, *counts]) * 1.9), xlabel="confidence", ylabel="rows")
    axes.grid(visible=False)


def risk_coverage(metrics: RunMetrics) -> list[Drawn]:
    """Per set: the error rate among the most confident rows."""
    labels = {entry.key: entry.label for entry in entries(metrics)}
    drawn = []
    for name, groups in metrics.get("plots", {}).get("risk_coverage", {}).items():
        figure = Figure(figsize=(5.4, 4.4), layout="constrained")
        axes = figure.subplots()
        for index, (key, curve) in enumerate(groups.items()):
            percent = [100 * value for value in curve["coverage"]]
            risk = [100 * value for value in curve["risk"]]
            axes.plot(
                percent,
                risk,
                color=color(key, index),
                label=labels.get(key, key),
                linewidth=2,
                linestyle=DASHES.get(key, "-"),
            )
        axes.set(
            title=name,
            xlabel="share of rows answered, most confident first (%)",
            ylabel="errors among them (%)",
            xlim=(0, 100),
        )
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=2)
        drawn.append(Drawn(f"risk-coverage-{name}", figure, f"Risk-coverage curves on {name}"))
    return drawn


def member_curve(metrics: RunMetrics) -> list[Drawn]:
    """Per set: each metric against the number of members."""
    drawn = []
    for name in scored_sets(metrics):
        curve = metrics.get("m_curve", {}).get(name, [])
        if len(curve) < 2:
            continue
        wanted = section_of(metrics).curve
        drawable = [metric for metric in wanted if all(metric in point for point in curve)] or ["nll"]
        rows, wide = (2, 2) if len(drawable) > 2 else (1, len(drawable))
        figure = Figure(figsize=(5.6, 2.2 * rows + 0.3 if rows > 1 else 3.6), layout="constrained")
        panels = figure.subplots(rows, wide, squeeze=False).flat
        for axes, metric in zip(panels, drawable, strict=True):
            _curve_panel(axes, curve, metric)
        figure.suptitle(name, fontsize=11)
        drawn.append(Drawn(f"members-{name}", figure, f"Metrics on {name} against the number of members"))
    return drawn


def _curve_panel(axes: Axes, curve: Sequence[CurvePoint], metric: str) -> None:
    scale = 100 if METRICS[metric].percent else 1
    members = [point["members"] for point in curve]
    mean = [scale * point[metric] for point in curve]
    spread = [scale * point[f"{metric}_std"] for point in curve]
    low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(members, low, high, color=COLORS["ensemble"], alpha=0.18, linewidth=0)
    axes.plot(members, mean, "o-", color=COLORS["ensemble"], markersize=4)
    axes.set(xlabel="members", ylabel=METRICS[metric].label + (" (%)" if scale == 100 else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
