"""Other ways to say how sure a model is, as baselines of the same run: a temperature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ensemble_fakes import fake_group
from run_helpers import run

from raylora.engine.run.plan_run import prepare
from raylora.ensemble.calibration import tempered
from raylora.ensemble.groups import one_member
from raylora.errors import SpecError

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
    base = {"base__source": tiny_model("llama"), "adapter__target_modules": "auto"} if "language" in task["kind"] else {}
    spec = make_spec(task=task, baselines={"temperature": True}, evaluation__out_of_distribution={}, **base)
    with pytest.raises(SpecError, match=words):
        prepare(spec)
