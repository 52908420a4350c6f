"""Rows that people bring to a finished run: read, renamed and checked before a base is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raylora.data.sources import Table, load_rows, renamed, require_columns
from raylora.data.task import AnswersInWords, BadRow, Task
from raylora.engine.model.checkpoint import load_tokenizer
from raylora.engine.training.distillation_loss import task_of
from raylora.ensemble.outputs.base import Record
from raylora.errors import DataError
from raylora.spec import RunSpec, SetSpec
from raylora.store.run_store import RunStore

OnBadRow = Literal["error", "skip"]
_SHOWN = 60
"""Characters of a text in a table."""


@dataclass(frozen=True)
class Inputs:
    """Rows to predict, beside what was brought, and those that were left out."""

    task: Task
    rows: Sequence[Mapping[str, Any]]
    """In the task's columns."""
    brought: Sequence[Mapping[str, Any]]
    """As they were read, with every column."""
    left_out: Sequence[str] = ()
    """The place of each row that does not fit, and why."""

    def texts(self) -> list[str]:
        """Return the beginning of each row's text, on one line."""
        lines = (" ".join(self.task.content(row).split()) for row in self.rows)
        return [line if len(line) <= _SHOWN else line[: _SHOWN - 1].rstrip() + "…" for line in lines]

    def answers(self, predictions: Sequence[Record]) -> list[str | None]:
        """Return what the answered labels stand for in each row; None where a label speaks for itself."""
        if not isinstance(self.task, AnswersInWords):
            return [None] * len(predictions)
        return [self.task.answer_in_words(row, one.record()["label"])
                for row, one in zip(self.rows, predictions, strict=True)]

    def records(self, predictions: Sequence[Record]) -> list[dict[str, Any]]:
        """Return each prediction's record, with what the row was brought as under ``input``."""
        answers = self.answers(predictions)
        return [
            {**one.record(), **({} if answer is None else {"answer": answer}), "input": dict(row)}
            for one, answer, row in zip(predictions, answers, self.brought, strict=True)
        ]


def inputs_of_texts(run: str, texts: Sequence[str]) -> Inputs:
    """Return texts given at a prompt. Raises: DataError for a run whose rows are not single texts."""
    task = task_of(RunStore(run).read_spec())
    if "text" not in task.columns:
        raise DataError(f"--text: a row of this run has the columns {', '.join(task.columns)}", "use --file")
    rows = [{"text": text} for text in texts]
    return Inputs(task, rows, rows)


def read_inputs(
    run: str, path: str, columns: Mapping[str, str] | None = None, delimiter: str | None = None,
    on_bad_row: OnBadRow = "error",
) -> Inputs:
    """Return the rows of a jsonl, csv, parquet or arrow file that a run is to predict.

    Args:
        columns: what the task calls a column -> what the file calls it; by default as the run's training set does.
        on_bad_row: ``skip`` leaves out rows that cannot be read or do not fit the task.

    Raises:
        DataError: the file cannot be read, lacks a column, or a row of it does not fit; the message says which.
    """
    spec = RunStore(run).read_spec()
    task = task_of(spec)
    table = load_rows(SetSpec(files=path, delimiter=delimiter), Path())
    ours = renamed(table, dict(columns) if columns else _own_columns(spec, table))
    require_columns(ours, task.columns, task.optional_columns)
    bad = [*table.bad]
    good: list[int] = []
    tokenizer = load_tokenizer(spec.base, task)
    rows = [{k: v for k, v in row.values.items() if k != task.label_column} for row in ours.rows]
    for index, row in enumerate(rows):
        try:
            task.tokenize(row, str(row.get("id", index)), tokenizer)
            good.append(index)
        except BadRow as error:
            bad.append(f"{table.rows[index].place}: {error}")
    if bad and (on_bad_row == "error" or not good):
        more = f"; {len(bad) - 1:,} more do not fit" if len(bad) > 1 else ""
        raise DataError(f"{bad[0]}{more}", "fix the rows, or leave them out with --on-bad-row skip")
    return Inputs(task, [rows[i] for i in good], [table.rows[i].values for i in good], bad)


def write_records(path: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Write predictions as JSON lines; the file appears whole or not at all."""
    target = Path(path)
    temporary = target.with_name(target.name + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    temporary.replace(target)


def _own_columns(spec: RunSpec, table: Table) -> dict[str, str]:
    """Return the training set's renaming, as far as this file has its columns: it need not have the label's."""
    return {ours: theirs for ours, theirs in spec.data.train.columns.items() if theirs in table.columns}
