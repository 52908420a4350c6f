"""What a student kept of its teacher and what it saves, for the page and for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table as ConsoleTable

from raylora.report.entries import Cell, Entry, columns
from raylora.report.formatting import NAMES, duration, number, size
from raylora.report.shown import shown_of_scores
from raylora.report.tables import MISSING, Table, Text


def sections(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, per student, its name, sentences about it and two tables: what it says, and what it costs."""
    return [_section(one) for one in metrics.get("distillation") or []]


def distillation_table(record: dict[str, Any]) -> ConsoleTable:
    """Return one row per contender for a terminal: the test metrics, then what it costs."""
    quality, costs = _quality(record), _costs(record)
    table = ConsoleTable(title=f"distillation: {record['name']}", header_style="bold")
    table.add_column("")
    groups = [name for name, span in quality.groups for _ in range(span)]
    for group, head in zip(groups, quality.heads, strict=True):
        table.add_column(f"{group}\n{head}", justify="right")
    for head in costs.heads:
        table.add_column(head, justify="right")
    for (label, said), (_, cost) in zip(quality.rows, costs.rows, strict=True):
        table.add_row(label, *[f"[bold]{c.main}[/bold]" if c.best else c.main for c in said], *[c.main for c in cost])
    return table


def _section(record: dict[str, Any]) -> dict[str, Any]:
    taught = record["targets"]
    members = len(taught["members"])
    sentence = (
        f"Taught by {members} member{'s' if members > 1 else ''} on {taught['rows']:,} rows; the targets take "
        f"{size(taught['size_bytes'])} and took {duration(taught['made_s'])}, once."
    )
    return {
        "name": record["name"], "sentence": sentence, "measured": _measured(record.get("measured_on")),
        "quality": _quality(record), "costs": _costs(record),
    }


def _measured(where: dict[str, Any] | None) -> str:
    if where is None:
        return ""
    return (
        f"Latency is one row, throughput batches of {where['batch_rows']}, tokens ready: medians of {where['rounds']} "
        f"rounds in which all take turns in one process ({where['device']}, {where['threads']} threads). Peak memory "
        "is that of a fresh process which loads the model and predicts one batch, libraries included; on a GPU the "
        "device's."
    )


def _entries(record: dict[str, Any]) -> list[Entry]:
    return [Entry(name, one["label"], one) for name, one in record["contenders"].items()]


def _quality(record: dict[str, Any]) -> Table:
    rows = _entries(record)
    sets, foreign = list(rows[0].content["eval"]), list(rows[0].content["ood"])
    show = shown_of_scores(rows[0].content["eval"][sets[0]])
    keys = [(name, metric) for name in sets for metric in show.compared]
    # A student that keeps its teacher's disagreement can be asked for it; the score is the AUROC of that.
    keys += [(name, score) for score in show.kept for name in foreign]
    part = dict.fromkeys(sets, "eval") | dict.fromkeys(foreign, "ood")
    cells = columns(rows, keys, lambda row, name, metric: row.cell(part[name], name, metric))
    lines = [
        (row.label, [_text(cell, metric) for cell, (_, metric) in zip(line, keys, strict=True)])
        for row, line in zip(rows, cells, strict=True)
    ]
    heads = [f"AUROC of {NAMES[metric].lower()}" if part[name] == "ood" else NAMES[metric] for name, metric in keys]
    groups = [(name, len(show.compared)) for name in sets]
    return Table(groups + [(name, 1) for name, _ in keys[len(sets) * len(show.compared):]], heads, lines)


def _costs(record: dict[str, Any]) -> Table:
    metric = record.get("retained_metric") or "accuracy"
    heads = [f"{NAMES[metric]} kept", "Parameters", "Trained", "Peak memory", "Latency", "Throughput"]
    rows = []
    for entry in _entries(record):
        found = entry.content
        kept = found.get("retained_score", found.get("retained_accuracy"))
        rows.append((entry.label, [
            Text(MISSING if kept is None else f"{100 * kept:.1f} %"),
            Text(f"{found['parameters']:,}"),
            Text(f"{found['trainable_parameters']:,}"),
            Text(size(found["peak_memory_bytes"]) if "peak_memory_bytes" in found else MISSING),
            Text(f"{found['latency_ms']:.1f} ms" if "latency_ms" in found else MISSING),
            Text(f"{found['rows_per_s']:,.0f} / s" if "rows_per_s" in found else MISSING),
        ]))
    return Table([], heads, rows)


def _text(cell: Cell | None, metric: str) -> Text:
    if cell is None:
        return Text(MISSING)
    small = ""
    if cell.low is not None and cell.high is not None:
        small = f"{number(cell.low, metric).removesuffix(' %')} to {number(cell.high, metric)}"
    return Text(number(cell.value, metric), small, cell.best)
