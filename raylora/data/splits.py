"""The good rows of a set, drawn and divided by content before anything is tokenized.

A text that was trained on, or that chose when to stop, is never evaluated on: splits are made by content,
and own evaluation sets lose the rows whose text was already used.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from raylora.data.order import derive_seed
from raylora.data.sources import Row, Table, load_rows, require_columns
from raylora.data.task import BadRow, ReadsEither, ReadsQuestions, Task
from raylora.errors import DataError
from raylora.spec import DataSpec, SetSpec

T = TypeVar("T")

_SHOWN = 5
"""How many bad rows an error lists."""


@dataclass(frozen=True)
class GoodRow:
    """A row that fits the task."""

    id: str
    key: str
    """Equal for rows whose texts differ only in case and spacing."""
    row: Row


@dataclass(frozen=True)
class Pool:
    """Rows of one set, and how many were left out on the way here."""

    name: str
    origin: str
    rows: list[GoodRow]
    labeled: bool
    skipped: int = 0
    duplicates: int = 0
    only_asks: bool = False
    """Whether some row holds no answer: then what all rows ask is what counts."""

    def keys(self) -> set[str]:
        """Return the keys of the pool's texts."""
        return {good.key for good in self.rows}


def read_pool(
    name: str, spec: SetSpec, data: DataSpec, task: Task, labeled: bool, base_dir: Path | None = None,
    may_ask: bool = False,
) -> Pool:
    """Read a set, check each row against the task, and draw ``spec.rows`` of the good ones.

    Args:
        may_ask: rows that hold no answer are fine, too, if the task can do something with what they ask.

    Raises:
        DataError: the set cannot be read, lacks a column, or has more bad rows than ``data`` allows.
    """
    table = load_rows(spec, base_dir)
    label = task.label_column
    if not labeled:  # an out-of-distribution set may have labels, but of another task
        table = _without(table, label)
    asking = task if may_ask and isinstance(task, ReadsQuestions) else None
    columns = task.columns_for(table.columns, may_ask) if isinstance(task, ReadsEither) else task.columns
    content = task.content if asking is None else asking.asked
    require_columns(table, (*columns, *((label,) if labeled and label else ())), task.optional_columns)
    bad, rows = list(table.bad), []
    for row_id, row in zip(_ids(table), table.rows, strict=True):
        try:
            if task.label(row.values) is None and labeled and label:
                raise BadRow(f"no {label!r}")
            rows.append(GoodRow(row_id, text_key(content(row.values)), row))
        except BadRow as error:
            bad.append(f"{row.place}: {error}")
    judge(name, bad, len(table.rows) + len(table.bad), data)
    if spec.rows is not None and spec.rows < len(rows):
        rows = _drawn(rows, spec.rows, data.seed, "rows", name)
    only_asks = asking is not None and any(asking.reference(good.row.values) is None for good in rows)
    return Pool(name, table.origin, rows, labeled, len(bad), only_asks=only_asks)


def divide(pool: Pool, sizes: Mapping[str, int], data: DataSpec) -> tuple[Pool, dict[str, Pool]]:
    """Split evaluation sets of distinct texts off a pool; return the rest for training, and them.

    The order of the texts depends on the seed alone, so that asking for more or fewer training rows
    leaves the evaluation sets as they were.

    Raises:
        DataError: there are fewer rows than asked for.
    """
    counts = Counter(good.key for good in pool.rows)
    first = {good.key: good for good in reversed(pool.rows)}
    texts = _drawn(sorted(counts), len(counts), data.seed, "split", ordered=False)
    held_out = sum(sizes.values())
    kept = set(texts[held_out:])
    rows = [good for good in pool.rows if good.key in kept]
    if len(rows) < (data.train_rows or 1):
        asked = {"train": data.train_rows or "at least 1", **sizes}
        raise DataError(
            f"{pool.origin} has {len(pool.rows):,} usable rows ({len(counts):,} distinct texts), too few for "
            + ", ".join(f"data.{name}_rows = {size}" for name, size in asked.items()),
            "lower them, or give more rows",
        )
    if data.train_rows is not None:
        rows = _drawn(rows, data.train_rows, data.seed, "train")
    parts, start = {}, 0
    for name, size in sizes.items():
        chosen = texts[start : start + size]
        repeats = sum(counts[key] - 1 for key in chosen)
        parts[name] = Pool(name, pool.origin, [first[key] for key in chosen], pool.labeled, duplicates=repeats)
        start += size
    return replace(pool, rows=rows), parts


def fresh(pool: Pool, used: set[str]) -> Pool:
    """Drop the rows whose text was used before, in another set or earlier in this one.

    Raises:
        DataError: no row is left.
    """
    seen, rows = set(used), []
    for good in pool.rows:
        if good.key not in seen:
            seen.add(good.key)
            rows.append(good)
    if not rows:
        raise DataError(f"{pool.name}: every text of {pool.origin} was already used in training", "choose other rows")
    return replace(pool, rows=rows, duplicates=len(pool.rows) - len(rows))


def judge(name: str, bad: list[str], read: int, data: DataSpec) -> None:
    """Refuse bad rows, or too many of them where some may be skipped.

    Raises:
        DataError: with the count and the places of the first.
    """
    if not bad or data.on_bad_row == "skip" and len(bad) <= data.max_bad_fraction * read:
        return
    shown = [*bad[:_SHOWN], *([f"... and {len(bad) - _SHOWN:,} more"] if len(bad) > _SHOWN else [])]
    hint = "fix these rows, or set data.on_bad_row to skip"
    if data.on_bad_row == "skip":
        hint = f"these are {len(bad) / read:.1%}, data.max_bad_fraction allows {data.max_bad_fraction:.1%}: fix them"
    raise DataError("\n  - ".join([f"{name}: {len(bad):,} of {read:,} rows cannot be used", *shown]), hint)


def _drawn(items: list[T], count: int, seed: int, *purpose: str, ordered: bool = True) -> list[T]:
    """Return a random sample without replacement, in the items' own order or in the drawn one."""
    drawn = np.random.default_rng(derive_seed(seed, *purpose)).permutation(len(items))[:count].tolist()
    return [items[index] for index in (sorted(drawn) if ordered else drawn)]


def _without(table: Table, column: str | None) -> Table:
    rows = [Row(row.place, {key: value for key, value in row.values.items() if key != column}) for row in table.rows]
    return replace(table, columns=[name for name in table.columns if name != column], rows=rows)


def _ids(table: Table) -> list[str]:
    """Return the rows' own ids where they identify them, else their places."""
    own = [row.values.get("id") for row in table.rows]
    if None not in own and len({str(value) for value in own}) == len(own):
        return [str(value) for value in own]
    return [row.place for row in table.rows]


def text_key(content: str) -> str:
    """Return a hash that is equal for texts that differ only in case and spacing."""
    return hashlib.sha256(" ".join(content.casefold().split()).encode()).hexdigest()
