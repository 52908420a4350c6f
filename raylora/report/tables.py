"""The tables of the page, as plain rows that the template prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raylora.ensemble.metric_table import METRICS
from raylora.records import RunMetrics
from raylora.report.entries import Cell, Entry, columns, entries, member_entries, scored_sets, set_names
from raylora.report.formatting import difference, number
from raylora.report.outputs.base import section_of

MISSING = "n/a"


@dataclass(frozen=True)
class Text:
    """A table cell: a number, what stands small below it, and whether it is the best of its column."""

    main: str
    small: str = ""
    best: bool = False
    prose: bool = False
    """Words, not a number: set from the left, on as many lines as it needs."""


@dataclass(frozen=True)
class Table:
    """Two heading rows (groups that span columns, then columns) and labeled rows."""

    groups: list[tuple[str, int]]
    heads: list[str]
    rows: list[tuple[str, list[Text]]]
    prose: bool = False
    """The last column is of words."""


def comparison(metrics: RunMetrics) -> Table | None:
    """Everyone on every labeled set."""
    return _grouped(
        entries(metrics),
        scored_sets(metrics),
        section_of(metrics).compared,
        lambda row, name, metric: row.cell("eval", name, metric),
    )


def scaled(metrics: RunMetrics) -> Table | None:
    """The same after temperature scaling, for those that have a temperature."""
    return _grouped(
        entries(metrics),
        scored_sets(metrics),
        ("nll", "brier", "ece"),
        lambda row, name, metric: row.cell("eval", name, metric, scaled=True),
    )


def members(metrics: RunMetrics) -> Table | None:
    """Each member on every labeled set."""
    return _grouped(
        member_entries(metrics), scored_sets(metrics), section_of(metrics).members,
        lambda row, name, metric: row.cell("eval", name, metric),
    )


def secondary(metrics: RunMetrics) -> Table | None:
    """The metrics that the comparison leaves out."""
    return _grouped(
        entries(metrics),
        scored_sets(metrics),
        section_of(metrics).secondary,
        lambda row, name, metric: row.cell("eval", name, metric),
    )


def detection(metrics: RunMetrics) -> Table | None:
    """The AUROC of each score on each foreign set."""
    foreign = [
        name for name in set_names(metrics, "out_of_distribution") if name in metrics.get("ensemble", {}).get("ood", {})
    ]
    return _grouped(
        entries(metrics), foreign, section_of(metrics).detection,
        lambda row, name, metric: row.cell("ood", name, metric),
    )


def shift(metrics: RunMetrics) -> Table | None:
    """How much each contender loses from the test set to each other labeled set."""
    test, *others = scored_sets(metrics) or [""]
    told = section_of(metrics).shifted
    if not others:
        return None
    keys = [(name, metric) for name in others for metric in told]
    rows = [
        (row.label, [_change(row.cell("eval", test, m), row.cell("eval", name, m), m) for name, m in keys])
        for row in entries(metrics)
    ]
    groups = [(f"{test} → {name}", len(told)) for name in others]
    return Table(groups, [METRICS[metric].label for _, metric in keys], rows)


def _change(before: Cell | None, after: Cell | None, metric: str) -> Text:
    if before is None or after is None:
        return Text(MISSING)
    path = f"{number(before.value, metric)} → {number(after.value, metric)}"
    return Text(difference(after.value - before.value, metric), path)


def temperatures(metrics: RunMetrics) -> list[str]:
    """Return one phrase per contender that has a fitted temperature."""
    phrases = []
    for row in entries(metrics):
        if "temperature" in row.content:
            told = not row.content.get("temperature_fit", {}).get("degenerate", False)
            note = "" if told else " (the validation split does not determine it, so it stays 1)"
            phrases.append(f"{row.label}: T = {row.content['temperature']:.2f}{note}")
    return phrases


def noises(metrics: RunMetrics) -> list[str]:
    """Return one phrase per contender of a regression: its noise, and how far its members differ on the test set."""
    test = (scored_sets(metrics) or [""])[0]
    phrases = []
    for row in entries(metrics):
        if "noise_std" in row.content:
            phrase = f"{row.label}: noise {number(row.content['noise_std'])}"
            between = row.content["eval"][test]["epistemic_std"]
            phrase += f", between members {number(between)} on average" if between else ""
            if row.content["noise_fit"]["degenerate"]:
                phrase += " (the validation labels were predicted almost exactly, so the noise is a lower bound)"
            phrases.append(phrase)
    return phrases


def data(metrics: RunMetrics) -> Table | None:
    """One row per data set; a column for every count that any set reports."""
    sets = metrics.get("data", [])
    known = [key for one in sets for key in one if key != "name"]
    heads = list(dict.fromkeys(known))
    if not sets:
        return None

    rows = [(str(one.get("name", "?")), [_fact(head, one.get(head)) for head in heads]) for one in sets]
    return Table([], [head.capitalize().replace("_", " ") for head in heads], rows)


def _fact(key: str, value: Any) -> Text:
    if isinstance(value, int):
        return Text(f"{value:,}")
    text = str(value if value is not None else MISSING)
    if key == "content_hash":  # enough to tell two apart
        return Text(text[:12])
    return Text(text.replace("_", " ") if key == "role" else text)


def _grouped(
    rows: Sequence[Entry],
    names: Sequence[str],
    told: Sequence[str],
    cell: Callable[[Entry, str, str], Cell | None],
) -> Table | None:
    keys = [(name, metric) for name in names for metric in told]
    cells = columns(rows, keys, cell)
    lines = [
        (row.label, [text_of(one, metric) for one, (_, metric) in zip(line, keys, strict=True)])
        for row, line in zip(rows, cells, strict=True)
        if any(one is not None for one in line)
    ]
    if not lines:
        return None
    return Table([(name, len(told)) for name in names], [METRICS[metric].label for _, metric in keys], lines)


def text_of(cell: Cell | None, metric: str) -> Text:
    """Return a number as a table shows it, with its interval or its standard error below it."""
    if cell is None:
        return Text(MISSING)
    small = ""
    if cell.low is not None and cell.high is not None:
        small = f"{number(cell.low, metric).removesuffix(' %')} to {number(cell.high, metric)}"
    elif cell.error is not None:
        small = f"± {number(cell.error, metric)}"
    return Text(number(cell.value, metric), small, cell.best)
