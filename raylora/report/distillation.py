"""What a student kept of its teacher and what it saves, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table as ConsoleTable

from raylora.ensemble.metric_table import METRICS
from raylora.records import DistillationRecord, MeasuredOn, RunMetrics, TargetFacts
from raylora.report.entries import Cell, Entry, columns
from raylora.report.formatting import duration, number, size
from raylora.report.outputs.base import section_of
from raylora.report.tables import MISSING, Table, Text, text_of


def sections(metrics: RunMetrics) -> list[dict[str, Any]]:
    """Return, per student, its name, what it kept in words, and two tables: what it says, and what it costs."""
    return [_section(one) for one in metrics.get("distillation") or []]


def distillation_table(record: DistillationRecord) -> ConsoleTable:
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


def _section(record: DistillationRecord) -> dict[str, Any]:
    return {
        "name": record["name"], "headline": [worth(record), retained(record)],
        "sentence": _targets(record["targets"], section_of(record).taught_on),
        "drawn": _listed(section_of(record).distilled),
        "compared": "alone" in record["contenders"], "intervals": _has_intervals(record),
        "quality": _quality(record), "costs": _costs(record), "measured": _measured(record.get("measured_on")),
    }


def worth(record: DistillationRecord) -> str:
    """Return what the teacher was worth to its student, in words."""
    found = {entry.key: entry.cell("eval", "test", "nll") for entry in _entries(record)}
    taught, alone = found["student"], found.get("alone")
    if taught is None or alone is None:
        return "No student was trained without a teacher, so what the teacher contributed is not known."
    gain = number(abs(alone.value - taught.value), "nll")
    nats = f"{gain} nats{section_of(record).unit}"
    verdict = f"the teacher {'improved it' if taught.value < alone.value else 'made it worse'} by {nats}"
    if gain == number(0.0, "nll"):
        verdict = "the teacher made almost no difference"
    doubt = " (the intervals overlap: it may be different on other rows)" if _overlap(taught, alone) else ""
    return (
        f"Taught, the student has a test NLL of {_with_interval(taught)}, against {_with_interval(alone)} without a "
        f"teacher: {verdict}{doubt}."
    )


def retained(record: DistillationRecord) -> str:
    """Return what the student kept of its teacher, and for which share of the costs, in words."""
    teacher, student = record["contenders"]["teacher"], record["contenders"]["student"]
    said: Mapping[str, Any] = teacher["eval"]["test"]
    told: Mapping[str, Any] = student["eval"]["test"]
    shares = [f"{100 * student['parameters'] / teacher['parameters']:.0f} % of the parameters"]
    if "latency_ms" in student:
        shares.append(f"{100 * student['latency_ms'] / teacher['latency_ms']:.0f} % of the latency")
        shares.append(f"{100 * student['peak_memory_bytes'] / teacher['peak_memory_bytes']:.0f} % of the peak memory")
    cost = f"{', '.join(shares[:-1])}{' and ' if shares[1:] else ''}{shares[-1]}"
    metric, share = record["retained_metric"], student["retained_score"]
    if metric is None:
        last = section_of(record).compared[-1]
        own, whole = (number(one[last], last) for one in (told, said))
        return f"With {cost} its {METRICS[last].label.lower()} is {own}, the teacher's {whole}."
    if share is None:
        return f"The teacher's own score is not above zero, so no share of it can be given; the student has {cost}."
    return (
        f"It keeps {100 * share:.1f} % of the teacher's {METRICS[metric].label.lower()} "
        f"({number(told[metric], metric)} of {number(said[metric], metric)}), with {cost}."
    )


def _listed(metrics: Sequence[str]) -> str:
    """Return the names of the metrics that are better the lower they are."""
    return " and ".join(METRICS[metric].label for metric in metrics if METRICS[metric].sign < 0)


def _has_intervals(record: DistillationRecord) -> bool:
    cells = [entry.cell("eval", "test", "nll") for entry in _entries(record)]
    return any(cell is not None and cell.low is not None for cell in cells)


def _with_interval(cell: Cell) -> str:
    if cell.low is None or cell.high is None:
        return number(cell.value, "nll")
    return f"{number(cell.value, 'nll')} ({number(cell.low, 'nll')} to {number(cell.high, 'nll')})"


def _overlap(one: Cell, other: Cell) -> bool:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.low <= other.high and other.low <= one.high


def _targets(taught: TargetFacts, rows: str) -> str:
    """Return who taught on what, and what the targets took."""
    members = len(taught["members"])
    if "size_bytes" not in taught:
        return _without_targets(taught, rows)
    text = (
        f"Taught by {members} member{'s' if members > 1 else ''} on {taught['rows']:,} {rows}; the targets take "
        f"{size(taught['size_bytes'])}"
    )
    if taught.get("tokens") and taught.get("positions"):
        k, positions = taught["tokens"][0], taught["positions"]
        text += (
            f", {taught['size_bytes'] / positions:.0f} bytes for each of {positions:,} tokens (the {k} most probable "
            "next tokens and the mass of all others),"
        )
    return f"{text} and took {duration(taught['made_s'])} to make, once."


def _without_targets(taught: TargetFacts, rows: str) -> str:
    """Return who taught by answering or by being asked, and what the student learned from."""
    members, kept = len(taught["members"]), taught.get("answers")
    who = f"Taught by {members} member{'s' if members > 1 else ''}"
    sentences = [f"{who} on {taught['rows']:,} {rows}."]
    if kept is not None:
        why = {"unfinished": "cut off", "too_long": "too long", "unsure": "not sure enough"}
        left_out = [f"{count:,} {why[reason]}" for reason, count in taught["left_out"].items()]
        took = f", which took {duration(taught['made_s'])}" if "made_s" in taught else ""
        sentences = [f"{who}, whose mixture answered {taught['rows']:,} rows{took}; {kept:,} answers are learned"
                     + (f" ({', '.join(left_out)})." if left_out else ".")]
    if "on_policy" in taught:
        share = f"{100 * taught['on_policy']:.0f} %"
        sentences.append("The teacher stayed loaded and judged every token; "
                         f"in {share} of the steps the student learned from what it had written.")
    return " ".join(sentences)


def _measured(where: MeasuredOn | None) -> str:
    if where is None:
        return ""
    threads = f"{where['threads']} thread{'s' if where['threads'] != 1 else ''}"
    return (
        f"Latency is one row, throughput batches of {where['batch_rows']}, tokens ready: medians of {where['rounds']} "
        f"rounds in which all take turns in one process ({where['device']}, {threads}). Peak memory "
        "is that of a fresh process which loads the model and predicts one batch, libraries included; on a GPU the "
        "device's."
    )


def _entries(record: DistillationRecord) -> list[Entry]:
    return [Entry(name, one["label"].replace("_", " "), one) for name, one in record["contenders"].items()]


def _quality(record: DistillationRecord) -> Table:
    rows, show = _entries(record), section_of(record)
    content = rows[0].content
    # By what stands above them: where the numbers are, of which set, and which.
    shown: dict[str, tuple[str, str, Sequence[str]]] = {name: ("eval", name, show.compared) for name in content["eval"]}
    for name, scores in content.get("answers", {}).items():
        shown[f"{name}, answers"] = ("answers", name, [metric for metric in scores if metric != "intervals"])
    # A student that keeps its teacher's disagreement can be asked for it; the score is the AUROC of that.
    shown |= {name: ("ood", name, show.retained) for name in content["ood"]}
    keys = [(group, metric) for group, (_, _, metrics) in shown.items() for metric in metrics]
    cells = columns(rows, keys, lambda row, group, metric: row.cell(*shown[group][:2], metric))
    lines = [
        (row.label, [text_of(cell, metric) for cell, (_, metric) in zip(line, keys, strict=True)])
        for row, line in zip(rows, cells, strict=True)
    ]
    heads = [
        f"AUROC of {METRICS[metric].label.lower()}" if shown[group][0] == "ood" else METRICS[metric].label
        for group, metric in keys
    ]
    return Table([(group, len(metrics)) for group, (_, _, metrics) in shown.items()], heads, lines)


def _costs(record: DistillationRecord) -> Table:
    """Return a column for everything that was measured of any contender."""
    metric = record.get("retained_metric") or "accuracy"
    shown: dict[str, tuple[str, Callable[[Any], str]]] = {
        "retained_score": (f"{METRICS[metric].label} kept", lambda share: f"{100 * share:.1f} %"),
        "parameters": ("Parameters", lambda count: f"{count:,}"),
        "trainable_parameters": ("Trained", lambda count: f"{count:,}"),
        "peak_memory_bytes": ("Peak memory", size),
        "latency_ms": ("Latency", lambda value_ms: f"{value_ms:.1f} ms"),
        "rows_per_s": ("Throughput", lambda rate: f"{rate:,.1f} / s" if rate < 10 else f"{rate:,.0f} / s"),
    }
    rows = _entries(record)
    known = [key for key in shown if any(row.content.get(key) is not None for row in rows)]

    def text(row: Entry, key: str) -> Text:
        value = row.content.get(key)
        return Text(MISSING if value is None else shown[key][1](value))

    return Table([], [shown[key][0] for key in known], [(row.label, [text(row, key) for key in known]) for row in rows])
