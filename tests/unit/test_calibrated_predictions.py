"""Predictions at the prompt: calibrated by the run's own temperature, as its report scores them, or raw when asked."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from run_helpers import run
from typer.testing import CliRunner

from raylora.cli import app
from raylora.ensemble.outputs.base import Contributors, Rows
from raylora.report.advice import advice, mean_curve, temperature_advice, training_advice
from raylora.serve.predictor import load_ensemble
from raylora.store.run_store import RunStore

Make = Callable[..., Any]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with rows of which one word tells the label, but for one in five: no model can be sure there."""
    folder = tmp_path_factory.mktemp("reviews")
    chance = random.Random(0)
    for name, rows in (("train", 120), ("validation", 60), ("test", 30)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for number in range(rows):
                label = chance.randrange(2)
                word = ("dull", "wonderful")[label if chance.random() < 0.8 else 1 - label]
                file.write(json.dumps({"text": f"a {word} film, number {name} {number}", "label": label}) + "\n")
    return folder


@pytest.fixture
def fitted(make_spec: Make, reviews: Path, trained: Callable[[Any], str]) -> str:
    """Return a run that is far from calibrated."""
    uri = trained(make_spec(
        data={name: {"files": str(reviews / f"{name}.jsonl")} for name in ("train", "validation", "test")},
        optimization={"lr": 0.02, "epochs": 4, "micro_batch": 20},
    ))
    fit = RunStore(uri).read_json("metrics.json")["ensemble"]["temperature_fit"]
    assert not fit["degenerate"] and fit["nll_after"] < fit["nll_before"]
    return uri


def test_predictions_of_the_test_rows_score_what_the_report_says(fitted: str, reviews: Path, tmp_path: Path) -> None:
    test = reviews / "test.jsonl"
    labels = [json.loads(line)["label"] for line in test.read_text().splitlines()]
    said = RunStore(fitted).read_json("metrics.json")["ensemble"]
    nll = {}
    for flag in ("--raw", None):
        out = str(tmp_path / "out.jsonl")
        done = call("predict", fitted, "--file", str(test), "--out", out, *([flag] if flag else []))
        assert done.exit_code == 0, done.output
        records = [json.loads(line) for line in Path(out).read_text().splitlines()]
        assert [one["calibrated"] for one in records] == [flag is None] * 30
        assert {one["temperature"] for one in records} == {said["temperature"] if flag is None else None}
        names = list(records[0]["probabilities"])
        nll[flag] = fmean(-math.log(one["probabilities"][_name(label, names)]) for one, label in
                          zip(records, labels, strict=True))
        raw = fmean(-math.log(one["raw_probabilities"][_name(label, names)]) for one, label in
                    zip(records, labels, strict=True))
        assert raw == pytest.approx(said["eval"]["test"]["nll"], abs=2e-6)
    assert nll["--raw"] == pytest.approx(said["eval"]["test"]["nll"], abs=2e-6)
    assert nll[None] == pytest.approx(said["eval"]["test"]["temperature_scaled"]["nll"], abs=2e-6)
    assert nll[None] != pytest.approx(nll["--raw"], abs=1e-3)


def _name(label: Any, names: list[str]) -> str:
    return label if label in names else names[int(label)]


def test_all_numbers_of_a_record_are_of_one_temperature(fitted: str) -> None:
    texts = ["A film to remember.", "Dull from start to end."]
    calibrated, raw = (load_ensemble(fitted, calibrated=flag).predict(texts) for flag in (True, False))
    for one, other in zip(calibrated, raw, strict=True):
        assert one.raw_probabilities == other.probabilities == other.raw_probabilities
        members = torch.tensor([list(member.values()) for member in other.member_probabilities], dtype=torch.float64)
        scaled = (members.log() / one.temperature).softmax(dim=-1)
        mean = scaled.mean(dim=0)
        assert list(one.probabilities.values()) == pytest.approx(mean.tolist(), abs=1e-9)
        assert one.entropy == pytest.approx(float(-(mean * mean.log()).sum()), abs=1e-9)
        own = float(-(scaled * scaled.log()).sum(dim=-1).mean())
        assert one.mutual_information == pytest.approx(one.entropy - own, abs=1e-9)


def test_the_table_says_whether_it_is_calibrated(fitted: str) -> None:
    value = RunStore(fitted).read_json("metrics.json")["ensemble"]["temperature"]
    default, raw = (" ".join(call("predict", fitted, "--text", "Dull.", *more).output.split())
                    for more in ((), ("--raw",)))
    assert f"calibrated with T = {value:.2f}, fitted on the validation split" in default
    assert "not calibrated" in raw and "fitted" not in raw


@pytest.mark.parametrize("described", [
    {}, {"temperature": 1.0, "temperature_fit": {"nll_before": 0.4, "nll_after": 0.4, "degenerate": True}},
])
def test_a_temperature_that_was_not_fitted_or_told_nothing_is_not_applied(described: Any) -> None:
    assert Rows([], [], [], "mean_probabilities", described, Contributors(2, 2)).temperature is None


def test_a_run_without_temperature_scaling_predicts_raw(make_spec: Make) -> None:
    spec = make_spec(evaluation={"temperature_scaling": False, "bootstrap_samples": 0})
    run(spec)
    record = load_ensemble(RunStore.for_spec(spec).uri).predict(["Dull."])[0].record()
    assert not record["calibrated"] and record["probabilities"] == record["raw_probabilities"]


# --- what the report advises -----------------------------------------------------------------------------
def metrics_of(*curves: list[float], temperature: float = 1.0, degenerate: bool = False) -> Any:
    rows = {
        f"member-{m:03d}": [{"step": 10.0 * (n + 1), "validation_nll": value} for n, value in enumerate(curve)]
        for m, curve in enumerate(curves)
    }
    fit = {"nll_before": 0.795, "nll_after": 0.481, "degenerate": degenerate}
    return {"output": "classes", "training": rows, "ensemble": {"temperature": temperature, "temperature_fit": fit}}


@pytest.mark.parametrize(("temperature", "word"), [
    (0.10, "underconfident"), (0.95, ""), (1.0, ""), (1.05, ""), (1.8, "overconfident"),
])
def test_temperatures_below_and_above_one_are_explained(temperature: float, word: str) -> None:
    said = temperature_advice(metrics_of([0.5, 0.5], temperature=temperature))
    assert word in said and bool(said) == bool(word)
    assert not word or ("0.795 to 0.481" in said and "optimization.epochs" in said)
    assert not temperature_advice(metrics_of([0.5, 0.5], temperature=temperature, degenerate=True))


@pytest.mark.parametrize(("curves", "words"), [
    ([[0.7, 0.6, 0.5]], "still falling when training ended (0.600 to 0.500"),
    ([[0.7, 0.5, 0.499]], ""),
    ([[0.4, 0.5, 0.6, 0.7]], "best at step 10 of 40 (0.400) and rose to 0.700"),
    ([[0.6, 0.5, 0.4, 0.45]], ""),
    ([[0.4]], ""),
    ([], ""),
    ([[0.7, 0.6, 0.5], [0.7, 0.6]], "still falling when training ended (0.700 to 0.600"),
])
def test_training_that_was_too_short_or_too_long_is_named(curves: list[list[float]], words: str) -> None:
    said = training_advice(metrics_of(*curves))
    assert words in said and bool(said) == bool(words)
    assert not said or "optimization.epochs" in said


def test_members_that_stopped_early_are_not_told_to_stop_early() -> None:
    metrics = metrics_of([0.4, 0.5, 0.6, 0.7])
    assert "rose" in training_advice(metrics)
    assert not training_advice({**metrics, "members": [{"name": "member-000", "stopped_at": 40}]})


def test_the_mean_curve_is_of_steps_that_all_members_reached() -> None:
    assert mean_curve(metrics_of([0.4, 0.6, 0.1], [0.2, 0.2]), "nll") == [(10.0, pytest.approx(0.3)), (20.0, 0.4)]


@pytest.mark.slow
def test_advice_stands_in_the_report_and_under_the_table_of_a_run(fitted: str) -> None:
    metrics = RunStore(fitted).read_json("metrics.json")
    sentences = advice(metrics)
    done = call("report", fitted)
    page = (Path(fitted) / "report.html").read_text()
    assert done.exit_code == 0 and ("What to try next" in page) == bool(sentences)
    for sentence in sentences:
        assert sentence.split(" (")[0] in page and sentence.split(" (")[0] in " ".join(done.output.split())
