"""What runs write has the keys and types that ``raylora.records`` promises, no more and no less."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from ensemble_fakes import fake_group, fake_language_group
from run_helpers import run
from test_regression_ensemble import group_of

from raylora import records
from raylora.engine.distillation.compare import distillations
from raylora.engine.model.quantized_layers import prepared_store
from raylora.ensemble import METRICS, summarize
from raylora.ensemble.metrics import CLASS_METRICS
from raylora.ensemble.regression_metrics import VALUE_METRICS
from raylora.spec import EvaluationSpec
from raylora.store.run_store import RunStore

FEW = EvaluationSpec(bootstrap_samples=5)


def misfits(value: Any, promised: Any, where: str = "") -> list[str]:
    """Return where a JSON value is not what a type says."""
    origin, inner = get_origin(promised), get_args(promised)
    if promised is Any:
        return []
    if origin in (Union, types.UnionType):
        return min((misfits(value, one, where) for one in inner), key=len)
    if origin is Literal:
        return [] if value in inner else [f"{where}: {value!r}"]
    if is_typeddict(promised):
        if not isinstance(value, dict):
            return [f"{where}: {value!r}"]
        hints = get_type_hints(promised)
        found = [f"{where}.{key}: unknown" for key in value.keys() - hints.keys()]
        found += [f"{where}.{key}: missing" for key in promised.__required_keys__ - value.keys()]
        return found + [
            one for key in value.keys() & hints.keys() for one in misfits(value[key], hints[key], f"{where}.{key}")
        ]
    if origin is dict:
        return [one for key, each in value.items()
                for one in misfits(key, inner[0], where) + misfits(each, inner[1], f"{where}.{key}")]
    if origin is list:
        return [one for each in value for one in misfits(each, inner[0], f"{where}[]")]
    if promised is float:
        return [] if isinstance(value, int | float) else [f"{where}: {value!r}"]
    return [] if isinstance(value, promised) else [f"{where}: {value!r}"]


def test_the_check_finds_what_does_not_fit() -> None:
    good: Any = {"name": "a", "role": "test", "origin": "b", "rows": 1, "truncated": 0, "skipped": 0,
                 "left_out": 0, "duplicates": 0, "content_hash": "c"}
    assert misfits([good], list[records.DataSet]) == []
    assert misfits([good | {"more": 1}], list[records.DataSet]) == ["[].more: unknown"]
    assert misfits([good | {"rows": "1"}], list[records.DataSet]) == ["[].rows: '1'"]
    del good["origin"]
    assert misfits([good], list[records.DataSet]) == ["[].origin: missing"]
    assert misfits({"standard_error": None, "mean": None}, records.MeanAndError) == [".mean: None"]


@pytest.mark.parametrize("groups", [
    {"ensemble": fake_group(3), "mc_dropout": fake_group(2, seed=7)},
    {"ensemble": group_of(3), "mc_dropout": group_of(2, seed=7)},
    {"ensemble": fake_language_group(3)},
], ids=["classes", "value", "tokens"])
def test_a_summary_is_what_its_type_says(groups: Any) -> None:
    assert misfits(summarize(groups, FEW), records.Summary) == []


def test_every_metric_of_a_set_is_in_the_table_and_in_the_type() -> None:
    named = {*CLASS_METRICS, *VALUE_METRICS}
    assert named <= METRICS.keys()
    assert named <= get_type_hints(records.SetMetrics).keys()


def test_what_a_run_writes_is_what_the_types_say(make_spec: Callable[..., Any]) -> None:
    spec = make_spec(base__quantization={"kind": "rtn", "bits": 3}, baselines__mc_dropout={"passes": 2},
                     adapter__dropout=0.1)
    metrics = run(spec)
    store = RunStore.for_spec(spec)
    assert misfits(metrics, records.RunMetrics) == [] and "preparation" in metrics
    assert misfits(store.read_json("data.json"), records.DataRecord) == []
    timings = [store.read_json(f"timing/{name}") for name in store.storage.list("timing")]
    assert timings and misfits(timings, list[records.JobTiming]) == []
    prepared = prepared_store(store)
    assert prepared is not None
    assert misfits(prepared.read_json("summary/summary.json"), records.PreparationSummary) == []


@pytest.mark.slow
def test_what_a_distillation_writes_is_what_the_types_say(
    trained: Callable[[Any], str], make_spec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from raylora.client import distill_run
    from raylora.engine.distillation import costs
    from raylora.spec import DistillSpec

    def here(contenders: Any, what: str) -> Any:
        return costs._speed(contenders) if what == "speed" else costs._memory(*contenders)

    monkeypatch.setattr(costs, "_in_process", here)
    spec = make_spec()
    uri = trained(spec)
    settings = DistillSpec.model_validate({"student": {"base": spec.base, "adapter": {"rank": 2}}})
    found = distill_run(uri, settings, local=True)
    assert misfits(found, records.DistillationRecord) == [] and "measured_on" in found
    assert distillations(RunStore(uri)) == [found]
