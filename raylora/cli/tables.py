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
