"""Confusion matrices, scores of single classes and the most surprising rows: their numbers, and their page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ensemble_fakes import fake_group, fake_language_group
from sklearn.metrics import confusion_matrix as reference_matrix
from sklearn.metrics import precision_recall_fscore_support
from test_records import misfits
from test_regression_ensemble import group_of
from test_report import Page

from raylora import records
from raylora.data.task import Example
from raylora.data.texts import MOST_CHARACTERS, parts_of, shortened
from raylora.ensemble import summarize
from raylora.ensemble.confusion import class_scores, confusion_matrix
from raylora.ensemble.outputs.base import Names
from raylora.ensemble.outputs.classes import ClassPredictions
from raylora.ensemble.summary import find_errors
from raylora.report import write_report
from raylora.spec import EvaluationSpec

FEW = EvaluationSpec(bootstrap_samples=0)
LABELS = ["business", "sports", "politics", "weather"]
NAMES = Names(LABELS, lambda name, row_id: f"text of {row_id} in {name}")


def with_classes(classes: int, rows: int = 60) -> list[ClassPredictions]:
    """Return two members' predictions of a test set with so many classes."""
    generator = torch.Generator().manual_seed(3)
    labels_N = torch.arange(rows) % classes
    values = torch.randn(2, rows, classes, generator=generator) + 2 * torch.nn.functional.one_hot(labels_N, classes)
    return [ClassPredictions(name="test", role="test", ids=[f"r{n}" for n in range(rows)], values=values,
                             labels_N=labels_N)]


def test_matrix_and_scores_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels_N, answers_N = (torch.randint(0, high, (300,), generator=generator) for high in (5, 6))
    answers_N[answers_N == 2] = 1  # nobody answers 2; nothing is of class 5, and class 6 does not occur at all
    found = confusion_matrix(answers_N, labels_N, 7)
    assert found.tolist() == reference_matrix(labels_N, answers_N, labels=range(7)).tolist()
    wanted = precision_recall_fscore_support(labels_N, answers_N, labels=range(7), zero_division=math.nan)
    for index, one in enumerate(class_scores(found)):
        for key, values in zip(("precision", "recall", "f1", "support"), wanted, strict=True):
            assert one[key] == (None if math.isnan(values[index]) else pytest.approx(values[index]))  # type: ignore[literal-required]
    assert class_scores(found)[6] == {"precision": None, "recall": None, "f1": None, "support": 0}
    assert class_scores(found)[2]["precision"] is None and class_scores(found)[2]["f1"] == 0


def test_surest_wrong_answers_by_brute_force() -> None:
    group = fake_group(3)
    errors = find_errors(group, FEW, NAMES)
    assert list(errors) == ["test", "shifted"] and misfits(errors, dict[str, records.SetErrors]) == []
    test, summary = group[1], summarize({"ensemble": group}, FEW)
    probs_NC = test.values.double().softmax(-1).mean(0)
    wrong = []
    for n, (row_id, label) in enumerate(zip(test.ids, test.labels().tolist(), strict=True)):
        answer = max(range(4), key=lambda c: float(probs_NC[n, c]))
        if answer != label:
            wrong.append((-float(probs_NC[n, answer]), row_id, LABELS[label], LABELS[answer], n))
    rows = errors["test"]["wrong_answers"]
    assert [(row["id"], row["label"], row["answer"]) for row in rows] == [one[1:4] for one in sorted(wrong)[:10]]
    assert [row["confidence"] for row in rows] == pytest.approx([-one[0] for one in sorted(wrong)[:10]])
    assert rows[0]["text"] == f"text of {rows[0]['id']} in test"
    each = test.values.double().softmax(-1)[:, sorted(wrong)[0][4]]
    entropies = [-(p * p.log()).sum() for p in (each.mean(0), *each)]
    assert rows[0]["mutual_information"] == pytest.approx(float(entropies[0] - sum(entropies[1:]) / 3))
    accuracy = summary["ensemble"]["eval"]["test"]["accuracy"]
    confusion = errors["test"]["confusion"]
    assert sum(confusion[c][c] for c in range(4)) == round(200 * accuracy) and sum(map(sum, confusion)) == 200


def test_widest_misses_by_brute_force() -> None:
    group = group_of(3)
    described = summarize({"ensemble": group}, FEW)["ensemble"]
    errors = find_errors(group, FEW, NAMES)
    assert misfits(errors, dict[str, records.SetErrors]) == []
    test = next(part for part in group if part.name == "test")
    found = []
    for row_id, values, label in zip(test.ids, test.values.double().T.tolist(), test.labels().tolist(), strict=True):
        mean = sum(values) / 3
        std = math.sqrt(described["noise_std"] ** 2 + sum((v - mean) ** 2 for v in values) / 3)
        found.append((abs(mean - label) / std, row_id, mean - label, std))
    rows = errors["test"]["misses"]
    wanted = sorted(found, reverse=True)[:10]
    assert [row["id"] for row in rows] == [one[1] for one in wanted]
    assert [row["deviations"] for row in rows] == pytest.approx([one[0] for one in wanted])
    assert [row["error"] for row in rows] == pytest.approx([one[2] for one in wanted])
    assert [row["total_std"] for row in rows] == pytest.approx([one[3] for one in wanted])


def test_what_has_no_wrong_answers_lists_none() -> None:
    assert find_errors(fake_language_group(2), FEW, NAMES) == {}
    (part,) = with_classes(3)
    right = replace(part, values=torch.nn.functional.one_hot(part.labels(), 3).float().expand(2, -1, -1))
    assert find_errors([right], FEW, NAMES)["test"]["wrong_answers"] == []


def page_of(group: Any, names: Names, folder: Any, **more: Any) -> tuple[str, Page, list[Any]]:
    """Return a report's HTML, what stands in it, and the files."""
    summary = summarize({"ensemble": group}, FEW)
    errors = find_errors(group, FEW, names)
    metrics = json.loads(json.dumps({**summary, "errors": errors, "label_names": list(names.labels), **more}))
    paths = write_report(metrics, folder)
    html = paths[0].read_text(encoding="utf-8")
    return html, Page(html), paths


def test_the_page_shows_matrix_scores_and_rows(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylora.report.page.png_of", lambda drawn: b"")
    _, page, paths = page_of(fake_group(3), NAMES, tmp_path)
    assert {"Which classes are confused?", "Sure and wrong"} <= set(page.headings)
    assert {"confusion-test.png", "confusion-shifted.png"} <= {path.name for path in paths}
    text = " ".join(page.words)
    assert "Precision" in text and "weather" in text and "text of test-" in text


@pytest.mark.parametrize(("classes", "shown"), [(20, True), (21, False)])
def test_a_matrix_is_drawn_for_up_to_twenty_classes(classes: int, shown: bool, tmp_path: Any) -> None:
    names = Names([f"class $number$ {index}" for index in range(classes)])  # no formula
    _, page, paths = page_of(with_classes(classes), names, tmp_path)
    assert ("confusion-test.png" in {path.name for path in paths}) is shown
    said = "With 21 classes, matrices and scores of each are left out. They are shown for up to 20."
    assert (said in page.words) is not shown and "Which classes are confused?" in page.headings
    assert "Sure and wrong" in page.headings


def test_texts_and_names_are_escaped_and_may_be_in_any_script(tmp_path: Any) -> None:
    evil = "<script>alert(1)</script>"
    html, page, _ = page_of(with_classes(3), Names([evil, "<b>", "政治"], lambda *_: evil), tmp_path)
    assert "<script" not in html and "<b>" not in html and evil in page.words and "政治" in page.words


def test_values_far_off_have_a_table(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylora.report.page.png_of", lambda drawn: b"")  # figures are built, but not painted
    html, page, _ = page_of(group_of(3), Names((), lambda *_: "<script>"), tmp_path)
    assert "Furthest off" in page.headings and "Error in stds" in page.words and "<script" not in html
    assert "Which classes are confused?" not in page.headings


# --- texts ------------------------------------------------------------------------------------------------
def test_texts_are_shortened_fairly() -> None:
    assert shortened(["short"]) == "short"
    assert shortened(["a" * 500]) == "a" * 199 + "…"
    pair = shortened(["brief", "b" * 500])
    assert pair.startswith("brief ⏐ bbb") and len(pair) == MOST_CHARACTERS
    both = shortened(["a" * 500, "b" * 500]).split(" ⏐ ")
    assert abs(len(both[0]) - len(both[1])) <= 1 and len(shortened(["c" * 90] * 26)) <= MOST_CHARACTERS


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_pairs_and_options_are_decoded_side_by_side(kind: str, tiny_model: Callable[[str], str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model(kind))
    one = Example("a", (tuple(tokenizer("a plain text")["input_ids"]),), 0)
    assert parts_of(one, tokenizer) == ["a plain text"]
    if kind == "bert":
        pair = Example("a", (tuple(tokenizer("the first", "the second")["input_ids"]),), 0)
        assert parts_of(pair, tokenizer) == ["the first", "the second"]
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("who is it?", " a cat", " a dog")]
    options = Example("a", tuple((*plain[0], *option) for option in plain[1:]), 0, (len(plain[0]),) * 2)
    assert parts_of(options, tokenizer)[1:] == ["a cat", "a dog"]


def test_a_run_records_names_and_texts_of_its_rows(
    trained: Callable[[Any], str], make_spec: Callable[..., Any]
) -> None:
    from raylora.store.run_store import RunStore

    metrics = RunStore(trained(make_spec())).read_json("metrics.json")
    assert metrics["label_names"] == ["negative", "positive"]
    rows = metrics["errors"]["test"]["wrong_answers"]
    assert 0 < len(rows) <= 10 and all({row["label"], row["answer"]} == {"negative", "positive"} for row in rows)
    assert all(10 < len(row["text"]) <= MOST_CHARACTERS and "[SEP]" not in row["text"] for row in rows)
    assert sum(map(sum, metrics["errors"]["test"]["confusion"])) == metrics["sets"]["test"]["rows"]
