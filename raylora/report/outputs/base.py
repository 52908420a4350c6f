"""The seam between an output and its report: which metrics stand where, what is said of them, and its own figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylora import registry
from raylora.records import DistillationRecord, RunMetrics

if TYPE_CHECKING:  # figures and tables ask for the section that is being shown
    from raylora.report.figures import Drawn
    from raylora.report.tables import Table


@dataclass(frozen=True)
class Part:
    """A heading with text below it and, where there are numbers, a table."""

    title: str
    text: str
    note: str = ""
    table: Table | None = None
    label: str = ""
    """What the table's rows are."""


@dataclass(frozen=True)
class Block:
    """A part of the page that one output alone has: figures under a heading, and what belongs to them."""

    part: Part
    figures: Sequence[Drawn] = ()
    more: Sequence[Part] = ()
    """Under headings of their own, below the figures."""
    stands_alone: bool = False
    """The heading and its text are shown without a figure too."""
    wide: bool = False
    """Its figures hold too much for half a page."""


@dataclass(frozen=True)
class OutputSection:
    """What is shown of runs with one output; an empty tuple or text leaves the place out."""

    compared: tuple[str, ...]
    """The metrics of the main table, of the terminal's, and of teacher and student."""
    compared_text: str
    secondary: tuple[str, ...]
    """Those of a second table of the same rows."""
    secondary_title: str
    secondary_text: str
    members: tuple[str, ...]
    shifted: tuple[str, ...]
    curve: tuple[str, ...]
    headline: tuple[str, ...]
    """Those in sentences, the most important first."""
    watched: tuple[str, ...]
    """Those of the validation split that are drawn over the training."""
    distilled: tuple[str, ...]
    """Those that teacher and student are drawn by, beside their costs."""
    detection: tuple[str, ...] = ()
    """Scores that tell foreign inputs from those of the task."""
    detected_by: str = ""
    """The one among them that is quoted: picking the best afterwards would flatter."""
    detection_text: str = ""
    retained: tuple[str, ...] = ()
    """Scores that a student is compared by: what its teacher was sure of, and what it disagreed about."""
    unit: str = ""
    """What a difference in nats is per, where that is not a row."""
    taught_on: str = "rows"
    blocks: Callable[[RunMetrics], list[Block]] = lambda metrics: []
    """From metrics.json to the blocks that have something to show."""


def section_of(metrics: RunMetrics | DistillationRecord) -> OutputSection:
    """Return what is shown of a run's metrics, or of a distillation; numbers that do not say are those of classes."""
    name = metrics.get("output")
    section: OutputSection = registry.load("report", name if name in registry.kinds("report") else "classes").SECTION
    return section
