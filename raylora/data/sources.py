"""Rows of one data set, from files, a hub or the ``pypi:`` catalog, each with the place it came from."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylora.data.catalog.assets import PREFIX, dataset_file
from raylora.errors import DataError, suggest
from raylora.spec import SetSpec

_READABLE = "jsonl, csv, tsv, parquet and arrow files can be read"
_DELIMITERS = (",", ";", "\t", "|")
_LOOKED_AT = 50
"""Rows by which a delimiter is recognized."""
_Line = tuple[int, dict[str, Any] | str]
"""A line's number, and its row or what is wrong with it."""


@dataclass(frozen=True)
class Row:
    """One row and where it came from, such as ``reviews.jsonl:17``."""

    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """All rows of a set; unreadable ones are only listed, with their places."""

    origin: str
    columns: list[str]
    rows: list[Row]
    bad: list[str]


def load_rows(set_spec: SetSpec, base_dir: Path | None = None) -> Table:
    """Read a set and rename its columns; relative paths start at ``base_dir`` (the current folder).

    Raises:
        DataError: the set cannot be found or read, is empty, or lacks a column that is to be renamed.
    """
    if set_spec.files is not None:
        table = _from_files(set_spec, base_dir or Path())
    elif set_spec.source is not None and set_spec.source.startswith(PREFIX):
        path = dataset_file(set_spec.source)
        table = _from_lines(set_spec.source, [(set_spec.source, _jsonl(path, set_spec.source))])
    else:
        table = _from_hub(set_spec)
    if not table.rows and not table.bad:
        raise DataError(f"{table.origin} has no rows", "check that the file is complete")
    return renamed(table, set_spec.columns)


def require_columns(table: Table, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Refuse a set that lacks a column.

    Raises:
        DataError: listing the columns there are, the one that is probably meant, and how to rename it.
    """
    missing = [column for column in required if column not in table.columns]
    if missing and table.rows:
        column, there = missing[0], ", ".join(table.columns)
        spare = [name for name in table.columns if name not in (*required, *optional)]
        raise DataError(
            f"{table.origin} has no column {column!r}; it has: {there}",
            f"{suggest(column, spare)}; rename it under the set's 'columns', as in {{{column}: NAME}}".lstrip("; "),
        )


def _from_files(spec: SetSpec, base_dir: Path) -> Table:
    names, separated = spec.file_names, functools.partial(_csv, delimiter=spec.delimiter)
    readers: dict[str, Callable[[Path, str], Iterator[_Line]]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".csv": separated,
        ".tsv": separated,
        ".parquet": _columnar,
        ".arrow": _columnar,
    }
    if not names:
        raise DataError("the set's list of files is empty", "name at least one file")
    suffixes = {Path(name).suffix.lower() for name in names}
    unknown = sorted(suffixes - set(readers))
    if unknown:
        raise DataError(f"cannot read {unknown[0] or 'a file without an ending'!r} ({names[0]})", _READABLE)
    if len(suffixes) > 1:
        raise DataError(f"one set mixes {', '.join(sorted(suffixes))}", "put each format into a set of its own")
    parts = []
    for name in names:
        path = base_dir / spec.places.get(name, name)
        if path.is_dir():
            raise DataError(f"{name} is a folder", "name the files in it")
        if not path.is_file():
            near = [other.name for other in path.parent.iterdir() if other.is_file()] if path.parent.is_dir() else []
            raise DataError(f"{name}: there is no such file in {path.parent.resolve()}", suggest(path.name, near))
        if path.stat().st_size == 0:
            raise DataError(f"{name} is empty", "check that it was written completely")
        parts.append((name, readers[path.suffix.lower()](path, name)))
    return _from_lines(", ".join(names), parts)


def _from_lines(origin: str, parts: list[tuple[str, Iterator[_Line]]]) -> Table:
    rows: list[Row] = []
    bad: list[str] = []
    for name, lines in parts:
        for line, content in lines:
            if isinstance(content, str):
                bad.append(f"{name}:{line}: {content}")
            else:
                rows.append(Row(f"{name}:{line}", content))
    columns = dict.fromkeys(column for row in rows for column in row.values)
    return Table(origin, list(columns), rows, bad)


def _jsonl(path: Path, name: str) -> Iterator[_Line]:
    for number, line in _decoded(path, name):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"not valid JSON: {error.msg} at column {error.colno}"
            continue
        except RecursionError:
            yield number, "not valid JSON: nested too deeply"
            continue
        yield number, value if isinstance(value, dict) else f"a {type(value).__name__}, not an object with columns"


def _csv(path: Path, name: str, delimiter: str | None = None) -> Iterator[_Line]:
    content = "".join(line for _, line in _decoded(path, name))
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(
        io.StringIO(content, newline=""), delimiter=delimiter or _delimiter_of(content, usual), strict=True
    )
    number = 1
    try:
        header = next(reader)
        if len(set(header)) != len(header):
            raise DataError(f"{name}:1: the header names a column twice: {', '.join(header)}", "rename one of them")
        number = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                yield number, f"{len(fields)} fields, but the header has {len(header)}"
            elif fields:
                yield number, dict(zip(header, fields, strict=True))
            number = reader.line_num + 1
    except csv.Error as error:  # what follows a broken quote cannot be trusted, so this is no mere bad row
        raise DataError(f"{name}:{number}: not valid csv: {error}", "check the quotes of this line") from None


def _delimiter_of(content: str, usual: str) -> str:
    """Return what separates the fields: the usual one, unless the header has it nowhere and another fits every row."""
    if usual in content.partition("\n")[0]:
        return usual
    for other in _DELIMITERS:
        try:
            rows = list(itertools.islice(csv.reader(io.StringIO(content, newline=""), delimiter=other), _LOOKED_AT))
        except csv.Error:
            continue
        if len(rows[0]) > 1 and all(len(row) in (0, len(rows[0])) for row in rows):
            return other
    return usual


def _decoded(path: Path, name: str) -> Iterator[tuple[int, str]]:
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}:{number}: not UTF-8 at byte {offset + error.start} (0x{line[error.start]:02x})",
                    f"save it as UTF-8, for example with `iconv -f latin1 -t utf-8 {name}`",
                ) from None
            offset += len(line)


def _columnar(path: Path, name: str) -> Iterator[_Line]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() == ".parquet":
            table = pq.read_table(path)
        else:
            with pa.memory_map(str(path)) as source:
                table = _arrow_table(source)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} is not a readable {path.suffix[1:]} file: {error}", "write it again") from None
    yield from enumerate(table.to_pylist(), start=1)


def _arrow_table(source: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:  # `datasets` writes the streaming form
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


def _from_hub(spec: SetSpec) -> Table:
    import datasets

    source = str(spec.source)
    try:
        found = datasets.load_dataset(source, spec.subset, split=spec.split, revision=spec.revision)
    except Exception as error:  # the library raises a dozen kinds, from its own, requests' and fsspec's trees
        raise DataError(
            f"cannot load the data set {source!r} from the hub: {type(error).__name__}: {str(error).splitlines()[0]}",
            "check the name and the network, or name local 'files' or a pypi: set instead",
        ) from error
    if isinstance(found, dict):
        if len(found) > 1:
            raise DataError(f"{source} has the splits {', '.join(found)}", "choose one with 'split'")
        found = next(iter(found.values()))
    rows = [Row(f"{source}[{index}]", dict(row)) for index, row in enumerate(found)]
    return Table(source, list(found.column_names), rows, [])


def renamed(table: Table, columns: dict[str, str]) -> Table:
    """Return a table under other column names: ours -> theirs. Raises: DataError for a column that is not there."""
    for ours, theirs in columns.items():
        if theirs not in table.columns:
            raise DataError(
                f"{table.origin} has no column {theirs!r} to use as {ours!r}; it has: {', '.join(table.columns)}",
                suggest(theirs, table.columns),
            )
    taken = {*columns, *columns.values()}
    rows = []
    for row in table.rows:
        values = {name: value for name, value in row.values.items() if name not in taken}
        values |= {ours: row.values[theirs] for ours, theirs in columns.items() if theirs in row.values}
        rows.append(Row(row.place, values))
    return Table(table.origin, [*columns, *(name for name in table.columns if name not in taken)], rows, table.bad)
