"""The figure of a confusion matrix: a heat map of row shares with counts and shares in its cells.

It takes metrics.json and returns ``Drawn`` figures; it returns none where the numbers are missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raylora.records import RunMetrics
from raylora.report.entries import scored_sets
from raylora.report.figures import Drawn

_LONGEST_NAME = 18
_SMALL = 8
"""Up to so many classes, a figure fits into half a page."""


def class_names(metrics: RunMetrics, classes: int) -> list[str]:
    """Return what the classes are called."""
    names = metrics.get("label_names") or []
    return list(names) if len(names) == classes else [str(index) for index in range(classes)]


def needs_room(metrics: RunMetrics) -> bool:
    """Return whether there are too many classes for half a page."""
    return any(len(one.get("confusion", [])) > _SMALL for one in metrics.get("errors", {}).values())


def confusion(metrics: RunMetrics) -> list[Drawn]:
    """Per set: how many rows of each class were answered with which, as counts and as shares of the class's rows."""
    drawn = []
    for name in scored_sets(metrics):
        counts = metrics.get("errors", {}).get(name, {}).get("confusion")
        if not counts:
            continue
        classes = len(counts)
        labels = _printable(class_names(metrics, classes))
        longest = max(map(len, labels))
        turned = longest > (6 if classes <= _SMALL else 3)
        side = max(2.2, (0.62 if classes <= _SMALL else 0.46) * classes)
        # What names take at 9 points, so that square cells leave no empty margins.
        size = side + 0.6 + 0.075 * longest, side + 0.85 + (0.05 * longest if turned else 0.0)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        shares = [[value / (sum(row) or 1) for value in row] for row in counts]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        _write(axes, counts, shares)
        axes.set_xticks(range(classes), labels, rotation=45 if turned else 0, ha="right" if turned else "center",
                        rotation_mode="anchor" if turned else None, parse_math=False)
        axes.set_yticks(range(classes), labels, parse_math=False)
        axes.tick_params(length=0, labelsize=9)
        axes.set(title=name, xlabel="answer of the ensemble", ylabel="true class")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        right = sum(counts[index][index] for index in range(classes))
        words = f"Confusion matrix on {name}: {right} of {sum(map(sum, counts))} rows on the diagonal"
        drawn.append(Drawn(f"confusion-{name}", figure, words))
    return drawn


def _write(axes: Axes, counts: Sequence[Sequence[int]], shares: Sequence[Sequence[float]]) -> None:
    """Write count and share into each cell that is not empty."""
    sizes = (10, 8) if len(counts) <= _SMALL else (7.5, 6.5)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if not count:
                continue
            tint = "white" if shares[i][j] > 0.55 else "black"
            axes.text(j, i - 0.17, f"{count}", ha="center", va="center", color=tint, fontsize=sizes[0])
            axes.text(j, i + 0.22, f"{shares[i][j]:.0%}", ha="center", va="center", color=tint, fontsize=sizes[1])


def _printable(names: Sequence[str]) -> list[str]:
    """Return names short enough for an axis; their numbers where the figure's font cannot write them all."""
    lines = [" ".join(name.split()) for name in names]
    known = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    if any(ord(character) not in known for line in lines for character in line):
        return [str(index) for index in range(len(names))]
    return [line if len(line) <= _LONGEST_NAME else line[: _LONGEST_NAME - 1] + "…" for line in lines]
