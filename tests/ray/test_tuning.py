"""Ray Tune tries settings of a run, each trial in a process of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from run_helpers import assert_bit_equal, members, run, weights

import raylora
from raylora.errors import TrainingError
from raylora.spec import build_spec
from raylora.store.run_store import RunStore

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_trials_with_slots_share_a_run_and_who_is_stopped_leaves_it(
    make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    from ray import tune

    spec = make_spec(ensemble__members=1, optimization__steps=None, optimization__epochs=3,
                     placement={"cpus_per_worker": 1, "workers": 1})
    slow = 1e-5
    results = tune.Tuner(
        raylora.tune_trainable(spec, slots=2, gather_s=5), tune_config=tune.TuneConfig(max_concurrent_trials=2),
        param_space={"optimization.lr": tune.grid_search([slow, 5e-3, 1e-3]), "adapter.rank": tune.choice([2])},
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "tune"), verbose=0,
            stop=lambda trial, result: result["config"]["optimization.lr"] == slow,
        ),
    ).fit()
    assert not results.errors and len(results) == 3
    stopped, *ended = sorted(results, key=lambda result: result.config["optimization.lr"])
    assert len(stopped.metrics_dataframe) == 1 and "run" not in stopped.metrics
    assert [len(result.metrics_dataframe) for result in ended] == [4, 4]  # three epochs, and where the run lies
    runs = {result.metrics["run"] for result in ended}
    for result in ended:
        store, (name,) = RunStore(result.metrics["run"]), result.metrics["members"]
        alone = spec.with_settings(result.config).model_copy(update={"name": "alone"})
        metrics = run(alone)
        row = metrics["training"]["member-000"][-1]
        assert result.metrics["validation_nll"] == pytest.approx(row["validation_nll"])
        assert_bit_equal(weights(store.uri, name), weights(alone))
        shutil.rmtree(RunStore.for_spec(alone).uri)
    together = [one for uri in runs for one in RunStore(uri).read_json("metrics.json")["members"]]
    assert sorted(one["settings"]["optimization.lr"] for one in together) == [slow, 1e-3, 5e-3]
    left = {one["settings"]["optimization.lr"]: one["stopped_at"] for one in together}
    assert left == {slow: stopped.metrics["step"], 1e-3: None, 5e-3: None}


@pytest.mark.slow
def test_settings_that_cannot_share_a_forward_end_their_trial_and_no_other(
    make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    from ray import tune

    trainable = raylora.tune_trainable(make_spec(placement={"cpus_per_worker": 1}), slots=2, gather_s=2)
    results = tune.Tuner(
        trainable, param_space=tune.grid_search([{"optimization.micro_batch": 4}, {"optimization.lr": 1e-3}]),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()
    (error,) = results.errors
    assert "members of one run do not differ in 'optimization.micro_batch'" in str(error)
    assert [result.metrics["run"] for result in results if result.error is None]


def test_a_trial_whose_process_dies_leaves_the_pack_and_the_other_goes_on(make_spec: Callable[..., Any]) -> None:
    import ray

    spec = make_spec(ensemble__members=1, optimization__steps=None, optimization__epochs=3,
                     placement={"cpus_per_worker": 1, "workers": 1})
    host, dies, lives = host_of(spec), trial_process(), trial_process()
    first = ray.get(host.join.remote({"optimization.lr": 1e-3}, dies))
    second = ray.get(host.join.remote({"optimization.lr": 5e-3}, lives))
    told = [ray.get([host.next.remote(number) for number in (first, second)])[1]]
    ray.kill(dies)
    told += rest_of(host, second)
    assert len(told) == 4 and told[-1]["members"] == ["member-001"]
    left, went_on = RunStore(told[-1]["run"]).read_json("metrics.json")["members"]
    assert (left["stopped_at"], went_on["stopped_at"]) == (told[0]["step"], None)
    ray.kill(host)


@pytest.mark.slow
def test_a_pack_whose_process_dies_goes_on_from_its_commits_when_its_trials_are_tried_again(
    make_spec: Callable[..., Any],
) -> None:
    import ray

    spec = make_spec(ensemble__members=1, optimization__steps=None, optimization__epochs=3,
                     placement={"cpus_per_worker": 1, "workers": 1})
    settings = [{"optimization.lr": 1e-3}, {"optimization.lr": 5e-3}]
    host, processes = host_of(spec), [trial_process(), trial_process()]
    numbers = [ray.get(host.join.remote(*one)) for one in zip(settings, processes, strict=True)]
    for _ in range(2):  # the first epoch is committed when the second is told
        step = ray.get([host.next.remote(number) for number in numbers])[0]["step"]
    ray.kill(host, no_restart=False)
    with pytest.raises((ray.exceptions.RayActorError, TrainingError)):
        while True:
            ray.get(host.next.remote(numbers[0]))
    again = [ray.get(host.join.remote(*one)) for one in reversed(list(zip(settings, processes, strict=True)))]
    with ThreadPoolExecutor(2) as pool:  # both ask: a pack waits for all of its trials at an epoch's end
        last, other = (told[-1] for told in pool.map(lambda number: rest_of(host, number), again))
    assert last["run"] == other["run"] and (last["members"], other["members"]) == (["member-001"], ["member-000"])
    store = RunStore(last["run"])
    (timing,) = store.storage.list("timing")
    assert store.read_json(f"timing/{timing}")["resumed_at_step"] >= step // 2
    run(alone := spec.with_settings(settings[1]).model_copy(update={"name": "alone"}))
    assert_bit_equal(weights(last["run"], "member-001"), weights(alone))
    ray.kill(host)


def trial_process() -> Any:
    """Return an actor that stands where a trial's would."""
    import ray

    class Process:
        pass

    return ray.remote(num_cpus=0)(Process).remote()


def host_of(spec: Any) -> Any:
    """Return an actor that trains two trials at once."""
    import ray

    from raylora.trials.packs import PackHost

    return ray.remote(num_cpus=1, max_restarts=1)(PackHost).remote(spec, 2, 60.0)


def rest_of(host: Any, number: int) -> list[dict[str, Any]]:
    """Return all that a trial is still told."""
    import ray

    return list(iter(lambda: ray.get(host.next.remote(number)), None))
