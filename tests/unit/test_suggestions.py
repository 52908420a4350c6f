"""What a misspelt word is answered with: the nearest known one, or all of them where none is near."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from raylora.cli import app
from raylora.errors import nearest, suggest

MEMBERS = [f"member-{number:03d}" for number in range(12)]


@pytest.mark.parametrize(("word", "meant"), [
    ("member-0", "member-000"), ("member-01", "member-001"), ("member-1", "member-001"), ("member-11", "member-011"),
    ("member-0002", "member-002"), ("member-10", "member-010"), ("Member-7", "member-007"),
    ("mmeber-003", "member-003"), ("member_004", "member-004"), ("membr-005", "member-005"),
])
def test_a_member_is_found_by_its_number(word: str, meant: str) -> None:
    assert suggest(word, MEMBERS) == f"did you mean {meant!r}?"


@pytest.mark.parametrize(("word", "known", "meant"), [
    ("trian", ["train", "test", "validation"], "train"), ("LORA", ["lora", "mos"], "lora"),
    ("lorra", ["lora", "dora", "mos"], "lora"), ("pypi:minilm-l7", ["minilm-l6", "minilm-l6-half"], "minilm-l6"),
    ("job-100", ["job-010", "job-100"], "job-100"),
])
def test_fewest_edits_decide(word: str, known: list[str], meant: str) -> None:
    assert nearest(word, known) == meant


@pytest.mark.parametrize("word", ["zzz", "", "99"])
def test_where_nothing_is_near_all_known_words_are_listed(word: str) -> None:
    assert nearest(word, MEMBERS) is None
    assert suggest(word, MEMBERS) == "known: " + ", ".join(MEMBERS)
    assert suggest(word, []) == ""


@given(st.integers(0, 999))
def test_any_number_finds_its_own_member(number: int) -> None:
    known = [f"member-{other:03d}" for other in {number, max(0, number - 1), number + 1, 10 * number % 1000, 0}]
    assert nearest(f"member-{number}", known) == f"member-{number:03d}"


def test_export_knows_and_lists_every_format() -> None:
    from raylora.serve import export, export_base

    formats = (*export.FORMATS, *export_base.FORMATS)
    shown = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200"}).output
    assert all(f"{form}" in shown for form in formats)
    unknown = CliRunner().invoke(app, ["export", "nowhere", "--format", "zzz"])
    assert unknown.exit_code == 2 and "known: " + ", ".join(sorted(formats)) in unknown.output
    near = CliRunner().invoke(app, ["export", "nowhere", "--format", "base-paked"])
    assert near.exit_code == 2 and "did you mean 'base-packed'?" in near.output
