"""What the page says of single classes and of single rows that were answered wrongly."""

from __future__ import annotations

from raylora.records import ClassScores, Miss, RunMetrics, WrongAnswer
from raylora.report import figures_errors
from raylora.report.entries import scored_sets
from raylora.report.formatting import number
from raylora.report.outputs.base import Block, Part
from raylora.report.tables import MISSING, Table, Text

_CONFUSION = (
    "Rows are the true classes, columns the ensemble's answers; each cell holds how many rows that is and which share "
    "of the true class, which is its color. What is off the diagonal is wrong."
)
_SCORES = (
    "Precision is the share of a class's answers that are right, recall the share of its rows that were found, F1 "
    "their harmonic mean (higher is better for all three), and support how many rows the class has."
)
_SURE = (
    "The wrong answers that the ensemble was surest of, as it predicts without a temperature. Such rows are worth "
    "reading: some are labeled wrongly, some show what the model goes by. A small mutual information says that the "
    "members agree on the error."
)
_FAR = (
    "The rows whose value lies furthest off for how sure the ensemble was, in standard deviations of its prediction. "
    "Beyond three, either the label is doubtful or the model does not know what it does not know."
)
_READ = "The text is what the model read, decoded from its tokens and shortened."


def confusion_block(metrics: RunMetrics) -> list[Block]:
    """Return the confusion matrices and the scores of each class, or why there are none."""
    sets = [name for name in scored_sets(metrics) if name in metrics.get("errors", {})]
    if not sets:
        return []
    title = "Which classes are confused?"
    found = {name: classes for name in sets if (classes := metrics["errors"][name].get("classes"))}
    if not found:
        count = len(metrics.get("label_names") or [])
        text = f"With {count or 'so'}{'' if count else ' many'} classes, matrices and scores of each are left out."
        return [Block(Part(title, text + " They are shown for up to 20."), stands_alone=True)]
    more = [Part("Class by class", _SCORES, table=_class_table(metrics, found), label="Class")]
    return [Block(Part(title, _CONFUSION), figures_errors.confusion(metrics), more,
                  stands_alone=True, wide=figures_errors.needs_room(metrics))]


def wrong_answers_block(metrics: RunMetrics) -> list[Block]:
    """Return the answers that were sure and wrong."""
    found = {name: rows for name in scored_sets(metrics)
             if (rows := metrics.get("errors", {}).get(name, {}).get("wrong_answers"))}
    tables = {name: _table(["True", "Answer", "Confidence", "Mutual information", "Text"],
                           [(row["id"], _wrong(row)) for row in rows]) for name, rows in found.items()}
    return _rows_block("Sure and wrong", _SURE, tables)


def misses_block(metrics: RunMetrics) -> list[Block]:
    """Return the values that are furthest off."""
    found = {name: rows for name in scored_sets(metrics)
             if (rows := metrics.get("errors", {}).get(name, {}).get("misses"))}
    tables = {name: _table(["True value", "Predicted", "Error", "Total std", "Error in stds", "Text"],
                           [(row["id"], _miss(row)) for row in rows]) for name, rows in found.items()}
    return _rows_block("Furthest off", _FAR, tables)


def _rows_block(title: str, text: str, tables: dict[str, Table]) -> list[Block]:
    if not tables:
        return []
    parts = [Part(name, "", table=table, label="Row") for name, table in tables.items()]
    return [Block(Part(title, text, _READ), (), parts, stands_alone=True)]


def _class_table(metrics: RunMetrics, found: dict[str, list[ClassScores]]) -> Table:
    sets = list(found)
    names = figures_errors.class_names(metrics, len(found[sets[0]]))
    rows = [(label, [cell for name in sets for cell in _scores(found[name][index])])
            for index, label in enumerate(names)]
    return Table([(name, 4) for name in sets], ["Precision", "Recall", "F1", "Support"] * len(sets), rows)


def _scores(one: ClassScores) -> list[Text]:
    shares = [MISSING if share is None else f"{100 * share:.1f} %"
              for share in (one["precision"], one["recall"], one["f1"])]
    return [Text(word) for word in (*shares, f"{one['support']:,}")]


def _wrong(row: WrongAnswer) -> list[Text]:
    return [Text(row["label"]), Text(row["answer"]), Text(f"{100 * row['confidence']:.1f} %"),
            Text(number(row["mutual_information"])), Text(row["text"], prose=True)]


def _miss(row: Miss) -> list[Text]:
    numbers = [number(value) for value in (row["label"], row["value"], row["error"], row["total_std"])]
    return [*(Text(word) for word in (*numbers, f"{row['deviations']:.1f}")), Text(row["text"], prose=True)]


def _table(heads: list[str], rows: list[tuple[str, list[Text]]]) -> Table:
    """Return a table whose last column is text; without it where no row has one."""
    if any(cells[-1].main for _, cells in rows):
        return Table([], heads, rows, prose=True)
    return Table([], heads[:-1], [(row_id, cells[:-1]) for row_id, cells in rows])
