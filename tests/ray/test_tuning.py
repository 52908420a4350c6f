"""Ray Tune tries settings of a run, each trial in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import assert_bit_equal, members, run

import raylora
from raylora.spec import build_spec
from raylora.store.run_store import RunStore

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]


def test_each_trial_is_a_run_that_reports_its_epochs_and_equals_the_same_run_without_tune(
    make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    from ray import tune

    spec = make_spec(optimization__steps=None, optimization__epochs=2, evaluation__bootstrap_samples=20)
    trainable = tune.with_resources(raylora.tune_trainable(spec), {"CPU": 1})
    tuner = tune.Tuner(
        trainable, param_space={"optimization.lr": tune.grid_search([1e-5, 5e-3]), "adapter.rank": 2},
        tune_config=tune.TuneConfig(metric="validation_nll", mode="min"),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors and len(results) == 2
    best = results.get_best_result()
    assert best.config["optimization.lr"] == 5e-3
    assert len(best.metrics_dataframe) == 3  # two epochs, and where the run lies
    store = RunStore(best.metrics["run"])
    rows = store.read_json("metrics.json")["training"]
    last = [[row["validation_nll"] for row in own if "validation_nll" in row][-1] for own in rows.values()]
    assert best.metrics["validation_nll"] == pytest.approx(sum(last) / len(last))
    assert best.metrics["step"] == rows["member-000"][-1]["step"]
    alone = build_spec({**store.read_spec().model_dump(mode="json"), "name": "alone"})
    assert alone.adapter.rank == 2 and alone.optimization.lr == 5e-3
    run(alone)
    assert_bit_equal(members(store.uri), members(alone))


def test_settings_that_make_no_run_end_the_trial_with_the_reason(
    make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    from ray import tune

    trainable = tune.with_resources(raylora.tune_trainable(make_spec()), {"CPU": 1})
    results = tune.Tuner(
        trainable, param_space={"optimization.lr": -1.0},
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()
    (error,) = results.errors
    assert "optimization.lr" in str(error) and "SpecError" in str(error)
