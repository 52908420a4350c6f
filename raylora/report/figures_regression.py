"""Figures of predicted values: against the true ones, and how often the intervals around them hold.

Each function takes metrics.json and returns ``Drawn`` figures; it returns none where the numbers are missing.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from raylora.records import RunMetrics
from raylora.report.entries import entries
from raylora.report.figures import COLORS, DASHES, Drawn, color


def values(metrics: RunMetrics) -> list[Drawn]:
    """Per set: predicted against true values, with one epistemic and one total standard deviation."""
    drawn = []
    for name, points in metrics.get("plots", {}).get("values", {}).items():
        figure = Figure(figsize=(5.4, 5.0), layout="constrained")
        axes = figure.subplots()
        label, value = points["label"], points["value"]
        ends = min([*label, *value]), max([*label, *value])
        axes.plot(ends, ends, color="#555555", linewidth=1, linestyle="--", label="right")
        bars = ((points["total_std"], COLORS["mean_member"], 1.0, 0.5, "total"),
                (points["epistemic_std"], COLORS["single"], 2.2, 0.9, "between members"))
        for reach, tint, width, alpha, words in bars:
            axes.errorbar(label, value, yerr=reach, fmt="none", ecolor=tint, elinewidth=width, alpha=alpha,
                          label=f"± one std, {words}")
        axes.plot(label, value, "o", color=COLORS["ensemble"], markersize=3.5)
        margin = 0.05 * (max(label) - min(label)) or 1.0
        axes.set_xlim(min(label) - margin, max(label) + margin)
        axes.set(title=name, xlabel="true value", ylabel="predicted value (mean of the members)")
        figure.legend(loc="outside lower center", ncols=3)
        predicted = metrics.get("sets", {})
        rows = predicted[name]["rows"] if name in predicted else len(label)
        of_all = f"{len(label)} of {rows} rows" if rows > len(label) else f"{rows} rows"
        drawn.append(Drawn(f"values-{name}", figure, f"Predicted against true values on {name}, {of_all}"))
    return drawn


def coverage(metrics: RunMetrics) -> list[Drawn]:
    """Per set: the share of labels inside central intervals, against the share that they promise."""
    labels = {entry.key: entry.label for entry in entries(metrics)}
    drawn = []
    for name, groups in metrics.get("plots", {}).get("coverage", {}).items():
        figure = Figure(figsize=(5.4, 4.8), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color="#555555", linewidth=1, linestyle="--", label="calibrated")
        for index, (key, curve) in enumerate(groups.items()):
            axes.plot(
                [100 * level for level in curve["nominal"]], [100 * share for share in curve["observed"]],
                color=color(key, index), linestyle=DASHES.get(key, "-"), linewidth=2, marker="o", markersize=3.5,
                label=labels.get(key, key),
            )
        axes.set(title=name, xlabel="promised: nominal coverage (%)", ylabel="kept: labels inside the interval (%)",
                 xlim=(0, 100), ylim=(0, 101))
        figure.legend(loc="outside lower center", ncols=2)
        drawn.append(Drawn(f"coverage-{name}", figure, f"Nominal and observed coverage of intervals on {name}"))
    return drawn
