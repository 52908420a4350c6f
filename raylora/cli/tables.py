"""Tables of results for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from raylora.serve.compress import Compressed


def predictions_table(predictions: Sequence[Any], texts: Sequence[str], answers: Sequence[str | None]) -> Table:
    """Return what an ensemble says of each text, in the columns of its output."""
    in_words = ["answer"] if any(answer is not None for answer in answers) else []
    table = Table("row", "text", *predictions[0].heads, *in_words, caption=predictions[0].caption())
    for one, text, answer in zip(predictions, texts, answers, strict=True):
        cells = [one.id, text, *one.cells(), *([answer or ""] if in_words else [])]
        table.add_row(*map(escape, cells))
    return table


def answer_tables(described: dict[str, Any]) -> list[Table]:
    """Return tables of how right answers are, and of what the members' doubts tell."""
    tables = []
    if "metrics" in described:
        right = Table("metric", "value", "interval")
        for name, one in [*described["metrics"].items(), ("ece of the answers' probabilities", described["ece"])]:
            right.add_row(name, f"{one['value']:.3f}", _interval(one))
        tables.append(right)
    for key, what in (("error_auroc", "wrong answers"), ("ood_auroc", "foreign prompts")):
        if key in described:
            told = Table("doubt", f"AUROC for {what}", "interval")
            for name, one in described[key].items():
                told.add_row(name, *(("-", "") if one is None else (f"{one['value']:.3f}", _interval(one))))
            tables.append(told)
    return tables


def compression_tables(done: Compressed) -> list[Table]:
    """Return tables of what members became, and of what the ensemble's metrics were and are."""
    from raylora.ensemble.metric_table import METRICS  # brings torch, which other commands need not wait for

    sizes = Table("member", "bytes", "compressed", "share", "change lost", "vectors of 8 / 3 / 2 / no bits")
    for one in done.members:
        vectors = " / ".join(str(one.vectors[bits]) for bits in (8, 3, 2, 0))
        sizes.add_row(one.member, f"{one.size_bytes:,}", f"{one.compressed_bytes:,}",
                      f"{one.compressed_bytes / one.size_bytes:.1%}", f"{one.change_error:.1%}", vectors)
    lost = Table("set", "metric of the ensemble", "whole", "compressed", "difference")
    for found in done.differences:
        metric = METRICS[found.metric]
        scale, digits, unit = (100, 1, " %") if metric.percent else (1, metric.digits + 1, "")
        whole, after = scale * found.whole, scale * found.compressed
        lost.add_row(escape(found.set), metric.label, f"{whole:.{digits}f}{unit}", f"{after:.{digits}f}{unit}",
                     f"{after - whole:+.{digits}f}")
    return [sizes, lost]


def _interval(one: dict[str, Any]) -> str:
    return "{:.3f} to {:.3f}".format(*one["interval"]) if "interval" in one else ""
