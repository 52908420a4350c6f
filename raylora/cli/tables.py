"""Tables of results for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table


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


def _interval(one: dict[str, Any]) -> str:
    return "{:.3f} to {:.3f}".format(*one["interval"]) if "interval" in one else ""
