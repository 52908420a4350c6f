"""The picture of a sweep: what validation says against each setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raylora.ensemble.metric_table import METRICS
from raylora.report.figures import COLORS, STYLE
from raylora.spec.vary import in_words

_WIDE = 20.0
"""From what ratio of the largest value to the smallest on an axis is logarithmic."""


def draw_sweep(tried: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """Return a panel for each setting, a point for each that was tried, the best first and marked.

    What was pruned on the way is a pale cross.
    """
    keys = list(dict.fromkeys(key for one in tried for key in one["settings"]))
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(max(4.2, 3.6 * len(keys)), 3.2), layout="constrained")
        panels = figure.subplots(1, max(1, len(keys)), squeeze=False, sharey=True)[0]
        for axes, key in zip(panels, keys, strict=False):
            _panel(axes, key, tried)
        panels[0].set_ylabel(f"validation {METRICS[metric].label}")
    return figure


def _panel(axes: Axes, key: str, tried: Sequence[Mapping[str, Any]]) -> None:
    values = [one["settings"].get(key) for one in tried]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    words = [in_words(value) for value in values]
    known = sorted(dict.fromkeys(words))
    places = [float(value) for value in values] if numeric else [float(known.index(one)) for one in words]
    for number, (place, one) in reversed(list(enumerate(zip(places, tried, strict=True)))):
        best = number == 0
        axes.errorbar(
            place, one["value"], yerr=_error(one), fmt="*" if best else "x" if one["left_at"] else "o",
            markersize=13 if best else 5, capsize=2, alpha=0.5 if one["left_at"] else 1.0,
            color=COLORS["single"] if best else COLORS["ensemble"],
        )
    if not numeric:
        axes.set_xticks(range(len(known)), [label.replace(" (", "\n(") for label in known])
    elif min(places) > 0 and max(places) / min(places) >= _WIDE:
        axes.set_xscale("log")
    axes.set_xlabel(key)


def _error(one: Mapping[str, Any]) -> list[list[float]] | None:
    if one["interval"] is not None:
        low, high = one["interval"]
        return [[max(0.0, one["value"] - low)], [max(0.0, high - one["value"])]]
    error = one["standard_error"]
    return None if error is None else [[error], [error]]
