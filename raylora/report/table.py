"""The result of a run as one compact table for the terminal."""

from __future__ import annotations

from rich.table import Table

from raylora.ensemble.metric_table import METRICS
from raylora.records import RunMetrics
from raylora.report.entries import Cell, columns, entries, scored_sets, set_names
from raylora.report.formatting import number
from raylora.report.outputs.base import section_of


def console_table(metrics: RunMetrics) -> Table:
    """Return one row per contender: test metrics, NLL under shift, AUROC of detection; the best of a column is bold."""
    rows = entries(metrics)
    keys = _keys(metrics)
    table = Table(title=metrics.get("run", {}).get("name"), header_style="bold")
    table.add_column("")
    for part, name, metric in keys:
        # AUROC is named by the set: which score it comes from stands in the report.
        head = "AUROC" if part == "ood" else METRICS[metric].label
        table.add_column(f"{name}\n{head}", justify="right")
    parts = {(name, metric): part for part, name, metric in keys}
    cells = columns(rows, list(parts), lambda row, name, metric: row.cell(parts[name, metric], name, metric))
    for row, line in zip(rows, cells, strict=True):
        table.add_row(row.label, *[_text(one, keys[index][2]) for index, one in enumerate(line)])
    return table


def _keys(metrics: RunMetrics) -> list[tuple[str, str, str]]:
    test, *others = scored_sets(metrics) or ["test"]
    show = section_of(metrics)
    keys = [("eval", test, metric) for metric in show.compared] + [("eval", name, "nll") for name in others]
    if show.detected_by:
        keys += [("ood", name, show.detected_by) for name in set_names(metrics, "out_of_distribution")]
    return keys


def _text(cell: Cell | None, metric: str) -> str:
    if cell is None:
        return "-"
    text = number(cell.value, metric)
    if cell.error is not None:
        text += f" ±{number(cell.error, metric)}"
    return f"[bold]{text}[/bold]" if cell.best else text
