"""Which members speak, and with what weights: fitted on validation rows alone, held against float64 references."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ensemble_fakes import fake_group
from scipy.optimize import minimize
from torch import Tensor

from raylora.ensemble import Predictions, aggregate_logits, decompose, summarize
from raylora.ensemble.gaussian import epistemic_std, fit_noise, mixture_nll
from raylora.ensemble.greedy import select_greedily
from raylora.ensemble.metrics import evaluate
from raylora.ensemble.objectives import LogitsNLL, MixtureNLL, Objective, ValueNLL
from raylora.ensemble.outputs import output_of
from raylora.ensemble.outputs.tokens import TokenPredictions, text_nlls
from raylora.ensemble.outputs.value import ValuePredictions
from raylora.ensemble.stacking import TOLERANCE, gap_of, stack_weights
from raylora.ensemble.summary import fit_group
from raylora.ensemble.uncertainty import disagreement
from raylora.ensemble.weights import MemberWeights
from raylora.errors import DataError
from raylora.spec import EnsembleSpec, EvaluationSpec

FEW = EvaluationSpec(bootstrap_samples=20)
NAMES = [f"member-{m:03d}" for m in range(9)]


def value_group(members: int, seed: int = 0, rows: int = 80) -> list[Predictions]:
    """Return a regression's validation and test sets, whose later members are noisier."""
    sets: list[Predictions] = []
    for offset, role in enumerate(("validation", "test")):
        generator = torch.Generator().manual_seed(100 * seed + offset)
        labels_N = torch.randn(rows, generator=generator)
        noise_M1 = torch.linspace(0.3, 1.2, members)[:, None]
        values_MN = labels_N + noise_M1 * torch.randn(members, rows, generator=generator)
        ids = [f"{role}-{n}" for n in range(rows)]
        sets.append(ValuePredictions(name=role, role=role, ids=ids, values=values_MN, labels_N=labels_N))  # type: ignore[arg-type]
    return sets


def token_group(members: int, seed: int = 0) -> list[Predictions]:
    sets: list[Predictions] = []
    for offset, role in enumerate(("validation", "test")):
        generator = torch.Generator().manual_seed(100 * seed + offset)
        difficulty_N = 4 * torch.rand(120, generator=generator)
        spread_M1 = torch.linspace(0.5, 3, members)[:, None]
        values_MN = -difficulty_N - spread_M1 * torch.rand(members, 120, generator=generator)
        ids = [f"{role}-{n // 12}" for n in range(120)]
        sets.append(TokenPredictions(name=role, role=role, ids=ids, values=values_MN))  # type: ignore[arg-type]
    return sets


GROUPS = {"classes": fake_group, "value": value_group, "tokens": token_group}


def objective_of(output: str, rule: str = "mean_probabilities", members: int = 6, seed: int = 0) -> Objective:
    validation = next(part for part in GROUPS[output](members, seed) if part.role == "validation")
    return output_of(output).objective(validation, rule)


CASES = [("classes", "mean_probabilities"), ("classes", "mean_logits"), ("value", "mean_probabilities"),
         ("tokens", "mean_probabilities")]


@pytest.mark.parametrize(("output", "rule"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_the_validation_nll_falls_with_every_step_and_is_that_of_the_counts(output: str, rule: str, seed: int) -> None:
    objective = objective_of(output, rule, seed=seed)
    steps = select_greedily(objective, 12)
    nlls = [step.nll for step in steps]
    assert nlls == sorted(nlls, reverse=True) and len(set(nlls)) == len(nlls)
    alone = [objective.nll(torch.eye(6, dtype=torch.float64)[m]) for m in range(6)]
    assert steps[0].index == int(np.argmin(alone)) and steps[0].nll == min(alone)
    for end in range(1, len(steps) + 1):
        counts_M = torch.bincount(torch.tensor([step.index for step in steps[:end]]), minlength=6).double()
        before_M = counts_M - torch.eye(6)[steps[end - 1].index]
        others = [objective.nll((before_M + torch.eye(6)[m]) / end) for m in range(6)]
        assert steps[end - 1].nll == pytest.approx(min(others), rel=1e-12)
        assert objective.nll(counts_M / end) == steps[end - 1].nll
    if len(steps) < 12:  # it stopped because no addition would lower it
        size = len(steps) + 1
        assert min(objective.nll((counts_M + torch.eye(6)[m]) / size) for m in range(6)) >= nlls[-1] * (1 - 1e-11)


def reference(objective: Objective, members: int) -> tuple[np.ndarray, float]:
    """Return scipy's weights and their NLL, from its own derivatives."""
    found = minimize(
        lambda w: objective.nll(torch.from_numpy(np.clip(w, 1e-300, None))), np.full(members, 1 / members),
        method="SLSQP", bounds=[(0, 1)] * members, constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x, float(found.fun)


@pytest.mark.parametrize(("output", "rule"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_stacked_weights_satisfy_kkt_and_are_as_good_as_scipys(output: str, rule: str, seed: int) -> None:
    objective = objective_of(output, rule, seed=seed)
    found = stack_weights(objective)
    assert found.weights_M.dtype == torch.float64 and bool((found.weights_M >= 0).all())
    assert abs(float(found.weights_M.sum()) - 1) < 1e-12
    fixed = objective.at(found.weights_M)
    weights, least = reference(fixed, 6)
    assert fixed.nll(found.weights_M) <= least + 1e-7
    gradient_M = fixed.derivatives(found.weights_M).gradient_M
    slack_M = gradient_M - gradient_M.min()  # multipliers: none negative, and zero wherever there is weight
    tolerance = 1e-4 if output == "value" else 1e-6  # a regression's noise is found to a search's tolerance
    assert float((slack_M * found.weights_M).sum()) <= tolerance
    assert bool((slack_M[found.weights_M > 1e-3] <= 1e-3).all())
    if output != "value":
        assert found.gap <= TOLERANCE and gap_of(objective, found.weights_M) <= TOLERANCE
        np.testing.assert_allclose(found.weights_M.numpy(), weights, atol=2e-3)
    plain_M = torch.full((6,), 1 / 6, dtype=torch.float64)
    assert found.nll <= objective.nll(plain_M) + 1e-12
    assert found.nll <= select_greedily(objective, 12)[-1].nll + 1e-7


def test_derivatives_are_those_of_finite_differences() -> None:
    weights_M = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05, 0.0001], dtype=torch.float64)
    for output, rule in CASES:
        objective = objective_of(output, rule).at(weights_M)
        free = weights_M.clone().requires_grad_()

        def nll(w_M: Tensor, objective: Objective = objective) -> Tensor:
            if isinstance(objective, MixtureNLL):
                return -torch.logsumexp(objective.logp_MN + w_M.log()[:, None], 0).mean()
            assert isinstance(objective, LogitsNLL)
            pooled_NC = torch.log_softmax((w_M[:, None, None] * objective.logp_MNC).sum(0), -1)
            return -pooled_NC.gather(1, objective.labels_N[:, None]).mean()

        found = objective.derivatives(weights_M)
        torch.testing.assert_close(found.gradient_M, torch.autograd.functional.jacobian(nll, free))
        torch.testing.assert_close(found.hessian_MM, torch.autograd.functional.hessian(nll, free))


@pytest.mark.parametrize("output", ["classes", "value", "tokens"])
def test_members_who_say_the_same_share_their_weight_and_the_first_is_selected(output: str) -> None:
    part = next(part for part in GROUPS[output](3) if part.role == "validation")
    twice = part.weighted([0, 1, 0, 2], None)
    alone = stack_weights(output_of(output).objective(part, "mean_probabilities")).weights_M
    found = stack_weights(output_of(output).objective(twice, "mean_probabilities")).weights_M
    assert float(found[0]) == float(found[2]) == float(alone[0]) / 2
    assert torch.equal(found[[1, 3]], alone[[1, 2]])
    same = part.weighted([1, 1, 1], None)
    assert stack_weights(output_of(output).objective(same, "mean_probabilities")).weights_M.tolist() == [1 / 3] * 3
    steps = select_greedily(output_of(output).objective(same, "mean_probabilities"), 5)
    assert [step.index for step in steps] == [0]  # a second time would change nothing


@pytest.mark.parametrize("output", ["classes", "value", "tokens"])
@pytest.mark.parametrize("asked", [{"select": {"size": 7}}, {"weights": "stacked"},
                                   {"select": {"size": 3}, "weights": "stacked"}])
def test_what_the_test_rows_say_changes_nothing(output: str, asked: dict[str, Any]) -> None:
    spec = EnsembleSpec.model_validate({"members": 6, **asked})
    group = GROUPS[output](6)
    before = fit_group(group, NAMES[:6], spec)
    other = [
        part if part.role == "validation" else replace(
            part, values=part.values.flip(0) - 1, labels_N=None if part.labels_N is None else part.labels_N.flip(0)
        ) for part in group
    ]
    assert fit_group(other, NAMES[:6], spec) == before  # bit for bit, and again the same
    assert [one.name for one in before] == [name for name, key in (("selected", "select"), ("stacked", "weights"))
                                            if key in asked]
    for fit in before:
        assert all(weight > 0 for weight in fit.weights.weights)
        assert math.fsum(fit.weights.weights) == pytest.approx(1, abs=1e-12)
    if len(before) == 2:
        assert set(before[1].weights.names) <= set(before[0].weights.names)
        assert before[1].nll <= before[0].nll + 1e-7
    shifted = [replace(part, values=part.values.flip(0)) if part.role == "validation" else part for part in group]
    assert fit_group(shifted, NAMES[:6], spec) != before  # while validation rows do


def test_without_validation_rows_nothing_is_fitted() -> None:
    with pytest.raises(DataError, match="ensemble.select and ensemble.weights are fitted on a validation set"):
        fit_group(fake_group(3)[1:], NAMES[:3], EnsembleSpec(members=3, weights="stacked"))


@pytest.mark.parametrize("output", ["classes", "value", "tokens"])
def test_weights_as_counts_equal_members_that_are_there_as_often(output: str) -> None:
    """Every number of a weighted ensemble is that of the plain mean with each member as often as it was added."""
    group = GROUPS[output](3)
    weights_M = torch.tensor([0.75, 0.25], dtype=torch.float64)
    weighted = [part.weighted([2, 0], weights_M) for part in group]
    repeated = [part.weighted([2, 2, 2, 0], None) for part in group]
    summary = summarize({"ensemble": group, "selected": weighted, "repeated": repeated}, FEW)
    found, expected = summary["weighted"]["selected"], summary["baselines"]["repeated"]
    for part in group[1:]:
        for key, value in expected.get("eval", {}).get(part.name, {}).items():
            own = found["eval"][part.name][key]
            if key == "intervals":
                assert own == {name: pytest.approx(ends, abs=1e-6) for name, ends in value.items()}
            elif key != "disagreement":  # a member is no pair with itself
                assert own == pytest.approx(value, abs=1e-6), key
    assert set(found["gains"]) == set(summary["gains"])
    over = found["gains"]["test"]["over_ensemble"]["nll"]
    assert over["gain"] == pytest.approx(summary["ensemble"]["eval"]["test"]["nll"] - found["eval"]["test"]["nll"])
    assert over["interval"][0] <= over["gain"] <= over["interval"][1]


def test_equal_weights_are_the_plain_mean_bit_for_bit_and_change_nothing_else() -> None:
    group = fake_group(4)
    equal = MemberWeights(tuple(NAMES[:4]), (0.25,) * 4)
    assert equal.weights_M is None
    plain = summarize({"ensemble": group}, FEW)
    both = summarize({"ensemble": group, "selected": [part.weighted(range(4), equal.weights_M) for part in group]}, FEW)
    described = dict(both["weighted"]["selected"])
    gains = described.pop("gains")
    assert described == plain["ensemble"]
    assert gains["test"]["over_ensemble"]["nll"] == {"gain": 0.0, "interval": [0.0, 0.0]} or gains["test"][
        "over_ensemble"]["nll"]["gain"] == 0
    assert {key: both[key] for key in ("ensemble", "members", "gains", "m_curve", "baselines")} == {
        key: plain[key] for key in ("ensemble", "members", "gains", "m_curve", "baselines")}


def test_weighted_numbers_against_their_equations() -> None:
    part = fake_group(3)[1]
    weights_M = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p_MNC = part.values.double().softmax(-1)
    mixed_NC = (weights_M[:, None, None] * p_MNC).sum(0)
    torch.testing.assert_close(aggregate_logits(part.values, "mean_probabilities", weights_M=weights_M).exp(), mixed_NC)
    geometric_NC = (weights_M[:, None, None] * p_MNC.log()).sum(0).softmax(-1)
    torch.testing.assert_close(aggregate_logits(part.values, "mean_logits", weights_M=weights_M).exp(), geometric_NC)
    parts = decompose(part.values, weights_M=weights_M)
    own_MN = -(p_MNC * p_MNC.log()).sum(-1)
    torch.testing.assert_close(parts.predictive_entropy_N, -(mixed_NC * mixed_NC.log()).sum(-1))
    torch.testing.assert_close(parts.expected_entropy_N, (weights_M[:, None] * own_MN).sum(0))
    scores = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    expected = 2 * (0.5 * 0.2 + 0.3 * 0.2) / (1 - 0.25 - 0.09 - 0.04)
    assert float(disagreement(scores, weights_M)) == pytest.approx(expected)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(disagreement(scores, third), disagreement(scores))
    values_MN = part.values[..., 0].double()
    center_N = (weights_M[:, None] * values_MN).sum(0)
    torch.testing.assert_close(epistemic_std(values_MN, weights_M),
                               (weights_M[:, None] * (values_MN - center_N) ** 2).sum(0).sqrt())
    density = torch.distributions.Normal(values_MN, 0.7).log_prob(torch.zeros(values_MN.shape[1]).double()).exp()
    torch.testing.assert_close(mixture_nll(values_MN, torch.zeros(values_MN.shape[1]), 0.7, weights_M),
                               -(weights_M[:, None] * density).sum(0).log())
    logp_MN, ids = -values_MN.abs(), [str(n // 4) for n in range(values_MN.shape[1])]
    tokenwise_D, whole_D = text_nlls(logp_MN, ids, weights_M)
    first_M4 = logp_MN[:, :4]
    assert float(tokenwise_D[0]) == pytest.approx(-float((weights_M[:, None] * first_M4.exp()).sum(0).log().sum()))
    assert float(whole_D[0]) == pytest.approx(-float((weights_M * first_M4.sum(1).exp()).sum().log()))
    labels_N = part.labels()
    assert evaluate(mixed_NC.log(), labels_N, 15, ["nll"])["nll"] == pytest.approx(
        -float(mixed_NC.gather(1, labels_N[:, None]).log().mean()))


def test_a_weighted_noise_is_the_best_for_its_weights() -> None:
    validation = value_group(3)[0]
    weights_M = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    noise = fit_noise(validation.values, validation.labels(), weights_M)

    def nll(std: float) -> float:
        return float(mixture_nll(validation.values, validation.labels(), std, weights_M).mean())

    assert noise.nll == pytest.approx(nll(noise.std))
    assert nll(0.99 * noise.std) > noise.nll < nll(1.01 * noise.std)
    assert ValueNLL(validation.values, validation.labels()).nll(weights_M) == noise.nll


@pytest.mark.parametrize("weights", [[0.5, 0.5, 0.0], [0.5, 0.4, 0.0999], [0.5, 0.5]])
def test_what_are_no_weights_is_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match=r"'test'.*no weights of 3 members"):
        fake_group(3)[1].weighted(range(3), torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize(("asked", "says"), [
    ({"members": 1, "weights": "stacked"}, "one member alone"), ({"members": 1, "select": {}}, "one member alone"),
    ({"select": {"size": 0}}, "greater than or equal to 1"), ({"select": {"method": "best"}}, "greedy"),
    ({"weights": "best"}, "stacked"),
])
def test_a_spec_that_makes_no_sense_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EnsembleSpec.model_validate(asked)
