"""A run whose ensemble is selected or weighted on its validation rows: who speaks, wherever it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import run, stop_at

from raylora.engine.run.speakers import predictions_of
from raylora.ensemble.aggregate import aggregate_logits
from raylora.errors import Interrupted, RunDirectoryError
from raylora.report.entries import entries
from raylora.report.headline import headline
from raylora.serve.predictor import load_ensemble
from raylora.spec import EnsembleSpec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
TEXTS = ["A film to remember.", "Dull and far too long.", "Fine."]
APART = {"optimization__lr": 0.2, "ensemble__seed": 16, "ensemble__bootstrap": True,
         "placement__members_per_worker": 1}
"""Members that know different things; alone in their packs, so that they are bit for bit the same after growth."""
BOTH = {**APART, "ensemble__select": {"size": 4}, "ensemble__weights": "stacked"}


def fitted(metrics: Any) -> Any:
    """Return what was fitted, without what it predicts."""
    return json.loads(json.dumps({
        name: {key: one.get(key) for key in ("weights", "validation_nll", "steps", "gap")}
        for name, one in metrics["weighted"].items()
    }))


def test_a_selected_run_reports_both_and_predicts_with_those_it_chose(
    make_spec: Make, trained: Callable[[Any], str]
) -> None:
    spec = make_spec(name="chosen", ensemble__members=3, **BOTH)
    uri = trained(spec)
    store = RunStore(uri)
    metrics = store.read_json("metrics.json")
    assert list(metrics["weighted"]) == ["selected", "stacked"]
    plain = store.read_json("metrics.json")["ensemble"]
    assert plain["members"] == 3
    for row in metrics["weighted"].values():
        assert row["eval"].keys() == plain["eval"].keys()
        assert {"accuracy", "nll", "brier", "ece", "intervals"} <= row["eval"]["test"].keys()
        assert sum(row["weights"].values()) == pytest.approx(1)
    said = metrics["weighted"]["stacked"]
    assert 1 < len(said["weights"]) < 3 and len(set(said["weights"].values())) > 1
    names, weights_M = list(said["weights"]), torch.tensor(list(said["weights"].values()), dtype=torch.float64)
    group = predictions_of(store, names)
    logp_NC = aggregate_logits(group[1].values, "mean_probabilities", weights_M=weights_M)
    nll = -float(logp_NC.gather(1, group[1].labels()[:, None]).mean())
    assert said["eval"]["test"]["nll"] == pytest.approx(nll, abs=1e-12)
    assert [row.key for row in entries(metrics)][:3] == ["ensemble", "selected", "stacked"]
    assert any(sentence.startswith("Weighted by the validation rows") for sentence in headline(metrics))

    ensemble, everybody = load_ensemble(uri, calibrated=False), load_ensemble(uri, calibrated=False, plain=True)
    assert (ensemble.members, everybody.members) == (len(names), 3)
    for one, other in zip(ensemble.predict(TEXTS), everybody.predict(TEXTS), strict=True):
        record = one.record()
        members = [other.member_probabilities[int(name[-3:])] for name in names]
        for label, value in record["probabilities"].items():
            mixed = sum(weight * own[label] for weight, own in zip(weights_M.tolist(), members, strict=True))
            assert value == pytest.approx(mixed, abs=1e-6)
        assert record["weights"] == said["weights"] and record["members_asked"] == 3
        assert "weights" not in other.record()
    assert load_ensemble(uri)._described["temperature"] == said["temperature"]


def test_weights_come_out_the_same_after_a_resume_and_are_fitted_anew_after_growth(make_spec: Make) -> None:
    whole = make_spec(name="whole", ensemble__members=3, **BOTH)
    expected = fitted(run(whole))
    stopped = make_spec(name="stopped")
    with pytest.raises(Interrupted):
        run(stopped, stop_at(3))
    assert fitted(run(stopped)) == expected
    grown = make_spec(name="grown", ensemble__members=2)
    before = fitted(run(grown))
    grown = make_spec(name="grown", ensemble__members=3)
    assert fitted(run(grown)) == expected != before
    seen: list[Any] = []
    plain = make_spec(name="grown", ensemble__select=None, ensemble__weights="equal")
    metrics = run(plain, seen.append)
    assert not seen and "weighted" not in metrics  # nobody is trained for it, and back it goes
    assert fitted(run(make_spec(name="grown", **BOTH))) == expected
    identity = plain.identity()["ensemble"]
    assert "select" not in identity and "weights" not in identity


def test_members_who_weigh_nothing_may_be_lost_and_others_not(make_spec: Make, trained: Callable[[Any], str]) -> None:
    uri = trained(make_spec(name="chosen", ensemble__members=3, ensemble__select={"size": 1}))
    store = RunStore(uri)
    (chosen,) = store.read_json("metrics.json")["weighted"]["selected"]["weights"]
    alone = [one.record() for one in load_ensemble(uri).predict(TEXTS)]
    assert {one["members"] for one in alone} == {1} and alone[0]["mutual_information"] == 0
    spare = next(name for name in store.storage.list("members") if name != chosen)
    store.storage.delete(f"members/{spare}")
    assert [one.record() for one in load_ensemble(uri, allow_missing=True).predict(TEXTS)] == alone
    store.storage.delete(f"members/{chosen}")
    left = load_ensemble(uri, allow_missing=True)
    assert left.members == 1 and left.weights is None and "temperature" not in left._described


def test_before_a_run_has_ended_nobody_speaks_for_it(make_spec: Make, trained: Callable[[Any], str]) -> None:
    uri = trained(make_spec(name="chosen", ensemble__members=3, **BOTH))
    Path(uri, "metrics.json").unlink()
    with pytest.raises(RunDirectoryError, match="fitted when it ends.*\n.*raylora resume"):
        load_ensemble(uri)


def test_the_spec_says_whether_weights_are_fitted() -> None:
    assert not EnsembleSpec().is_fitted
    assert EnsembleSpec(weights="stacked").is_fitted and EnsembleSpec.model_validate({"select": {}}).is_fitted
