"""A Gaussian over LoRA's matrices: curvature, prior and predictions against float64 references by autograd loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members, run, stop_at
from scipy.optimize import minimize_scalar
from sweeps import sweep
from torch.func import functional_call
from transformers import AutoModelForSequenceClassification

from raylora.adapters.base import HEAD
from raylora.engine.model import serialization
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.curvature import Curvature, diagonal_curvature, kronecker_curvature
from raylora.engine.training.laplace import Posterior, best_precision, draw_logits
from raylora.engine.training.logit_jacobians import LogitJacobians
from raylora.errors import Interrupted, RunDirectoryError, SpecError, TrainingError
from raylora.placement.inventory import Inventory, Node
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
DELTA = 3.0


def ignore(rows: int) -> None:
    """Be told of rows, and do nothing."""


@dataclass
class Reference:
    """A member of the tiny BERT in float64, with its LoRA written into the weights, and one row at a time."""

    model: Any
    lora: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    sites: list[str]
    scale: float

    def row(self, example: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
        """Return a row's logits, their Jacobian by matrix, and by site its inputs and its outputs' gradients."""
        leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in self.lora.items()}
        weights = dict(self.head)
        for site in self.sites:
            change = self.scale * leaves[f"{site}.lora_B"] @ leaves[f"{site}.lora_A"]
            weights[f"{site}.weight"] = self.model.get_parameter(f"{site}.weight").detach() + change
        inputs: dict[str, Any] = {}
        outputs: dict[str, Any] = {}

        def keep(site: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                inputs[site], outputs[site] = args[0].detach()[0], output
            return hook

        hooks = [self.model.get_submodule(site).register_forward_hook(keep(site)) for site in self.sites]
        ids = torch.tensor([example.sequences[0]])
        logits_C = functional_call(self.model, weights, kwargs={"input_ids": ids}).logits[0]
        for hook in hooks:
            hook.remove()
        jacobian = {name: torch.stack([torch.autograd.grad(z, leaf, retain_graph=True)[0] for z in logits_C])
                    for name, leaf in leaves.items()}
        tokens = {site: (inputs[site], torch.stack([
            torch.autograd.grad(z, outputs[site], retain_graph=True)[0][0] for z in logits_C
        ])) for site in self.sites}
        return logits_C.detach(), jacobian, tokens


@pytest.fixture
def parts(make_parts: Make) -> Any:
    return make_parts()


@pytest.fixture
def member(parts: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = parts.member(parts.units[0], trained=0.2)
    return found


@pytest.fixture
def reference(parts: Any, member: Any) -> Reference:
    model = AutoModelForSequenceClassification.from_pretrained(
        parts.spec.base.source, num_labels=2, attn_implementation="eager"
    ).double().eval()
    double = {name: tensor.double() for name, tensor in member.items()}
    return Reference(
        model, {n: t for n, t in double.items() if not n.startswith(HEAD)},
        {n.removeprefix(HEAD): t for n, t in double.items() if n.startswith(HEAD)},
        [site.name for site in parts.base.sites], parts.adapter.scale,
    )


def hessian(logits_C: torch.Tensor) -> torch.Tensor:
    p_C = logits_C.softmax(dim=0)
    return torch.diag(p_C) - torch.outer(p_C, p_C)


def some_rows(parts: Any, rows: int = 5) -> list[Any]:
    """Return rows of different lengths, so that a batch has padding."""
    chosen = sorted(parts.sets.train.examples, key=lambda example: len(example.sequences[0]))
    return [chosen[0], *chosen[-(rows - 1) :]]


def flat(jacobian: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    return torch.cat([jacobian[name].flatten(1) for name in names], dim=1)


def fisher(reference: Reference, rows: list[Any], names: list[str]) -> torch.Tensor:
    """Return the whole Fisher information P x P of some matrices, row after row."""
    total: Any = 0
    for example in rows:
        logits_C, jacobian, _ = reference.row(example)
        jacobian_CP = flat(jacobian, names)
        total = total + jacobian_CP.T @ hessian(logits_C) @ jacobian_CP
    return total


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


# --- Jacobians and curvature -----------------------------------------------------------------------------
def test_jacobians_are_those_of_each_row_alone_in_float64(parts: Any, member: Any, reference: Reference) -> None:
    rows = some_rows(parts)
    logits_NC, found = LogitJacobians(parts.model, member).of(rows)
    assert set(found) == set(reference.lora)  # the head is a constant
    for n, example in enumerate(rows):
        logits_C, jacobian, _ = reference.row(example)
        close(logits_NC[n], logits_C)
        for name, expected in jacobian.items():
            close(found[name][n].double(), expected)


def test_the_diagonal_is_that_of_the_whole_fisher_information(parts: Any, member: Any, reference: Reference) -> None:
    rows, names = some_rows(parts), list(reference.lora)
    told: list[int] = []
    curvature = diagonal_curvature(LogitJacobians(parts.model, member), rows, 2, told.append)
    found_P = torch.cat([curvature.eigenvalues[name].flatten() for name in names])
    close(found_P, fisher(reference, rows, names).diagonal())
    assert told == [2, 2, 1] and curvature.numbers == len(found_P)


def kronecker_reference(reference: Reference, rows: list[Any]) -> dict[str, torch.Tensor]:
    """Return 1/T (sum g g^T) x (sum a a^T) per matrix, from one row and one token after another."""
    found: dict[str, list[torch.Tensor]] = {}
    count = 0
    for example in rows:
        logits_C, _, tokens = reference.row(example)
        p_C = logits_C.softmax(dim=0)
        count += len(example.sequences[0])
        for site, (inputs_TI, gradients_CTO) in tokens.items():
            a_RI, b_OR = reference.lora[f"{site}.lora_A"], reference.lora[f"{site}.lora_B"]
            of_h_CTR = reference.scale * gradients_CTO @ b_OR
            for name, a_TI, g_CTO in (("lora_A", inputs_TI, of_h_CTR),
                                      ("lora_B", reference.scale * inputs_TI @ a_RI.T, gradients_CTO)):
                sums = found.setdefault(f"{site}.{name}", [torch.zeros(g_CTO.shape[2], g_CTO.shape[2]).double(),
                                                           torch.zeros(a_TI.shape[1], a_TI.shape[1]).double()])
                centered_CTO = g_CTO - (p_C[:, None, None] * g_CTO).sum(dim=0)
                for t in range(len(a_TI)):
                    sums[1] += torch.outer(a_TI[t], a_TI[t])
                    for c in range(len(p_C)):
                        sums[0] += p_C[c] * torch.outer(centered_CTO[c, t], centered_CTO[c, t])
    return {name: torch.kron(of_outputs, of_inputs) / count for name, (of_outputs, of_inputs) in found.items()}


def dense(curvature: Curvature, name: str) -> torch.Tensor:
    """Return a matrix's curvature as a matrix over its entries, row by row."""
    left_OO, right_II = curvature.factors[name]
    axes = torch.kron(left_OO, right_II)
    return axes @ torch.diag(curvature.eigenvalues[name].flatten()) @ axes.T


def test_kronecker_factors_are_sums_over_real_tokens(parts: Any, member: Any, reference: Reference) -> None:
    rows = some_rows(parts)
    curvature = kronecker_curvature(LogitJacobians(parts.model, member), rows, 3, ignore)
    expected = kronecker_reference(reference, rows)
    assert expected.keys() == curvature.factors.keys()
    for name, whole in expected.items():
        close(dense(curvature, name), whole, 1e-3)


def test_kronecker_factors_are_exact_for_one_row_of_one_token(parts: Any, member: Any, reference: Reference) -> None:
    row = parts.sets.train.examples[0]
    short = replace(row, sequences=((row.sequences[0][1],),))
    curvature = kronecker_curvature(LogitJacobians(parts.model, member), [short], 1, ignore)
    for name in curvature.factors:
        if ".value." in name:  # one token attends to itself whatever its query is
            whole = fisher(reference, [short], [name])
            assert float(whole.abs().max()) > 0
            close(dense(curvature, name), whole, 1e-3)


# --- the Gaussian ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_the_covariance_of_logits_is_the_explicit_product(
    parts: Any, member: Any, reference: Reference, structure: str
) -> None:
    rows, names = some_rows(parts), list(reference.lora)
    jacobians = LogitJacobians(parts.model, member)
    curvature_of = diagonal_curvature if structure == "diagonal" else kronecker_curvature
    covariance_NCC = Posterior(curvature_of(jacobians, rows, 3, ignore), DELTA).covariance(jacobians.of(rows)[1])
    if structure == "diagonal":
        whole = torch.diag(fisher(reference, rows, names).diagonal())
    else:
        whole = torch.block_diag(*(kronecker_reference(reference, rows)[name] for name in names))
    sigma_PP = torch.linalg.inv(whole + DELTA * torch.eye(len(whole), dtype=torch.float64))
    for n, example in enumerate(rows):
        jacobian_CP = flat(reference.row(example)[1], names)
        close(covariance_NCC[n], jacobian_CP @ sigma_PP @ jacobian_CP.T, 1e-3)


def test_the_prior_has_the_greatest_marginal_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    eigenvalues = {"a": torch.rand(6, 5, generator=generator).double() ** 4 * 50, "b": torch.zeros(3, 3).double()}
    theta_P = torch.randn(39, generator=generator).double() * 0.4
    fisher_PP = torch.diag(torch.cat([one.flatten() for one in eigenvalues.values()]))

    def loss(log_delta: float) -> float:
        delta = math.exp(log_delta)
        posterior = fisher_PP + delta * torch.eye(39, dtype=torch.float64)
        return 0.5 * float(delta * theta_P @ theta_P + torch.logdet(posterior) - 39 * log_delta)

    found = best_precision(Curvature(eigenvalues, {}), float(theta_P @ theta_P))
    expected = minimize_scalar(loss, bounds=(-10, 10), method="bounded", options={"xatol": 1e-9})
    assert math.log(found) == pytest.approx(expected.x, abs=1e-5)
    with pytest.raises(TrainingError, match="say nothing of member 0's matrices"):
        best_precision(Curvature({"a": torch.zeros(2, 2).double()}, {}), 1.0)


def test_draws_have_the_covariance_and_are_a_rows_own() -> None:
    mean_NC = torch.tensor([[1.0, -1.0, 0.0], [0.0, 2.0, 1.0]], dtype=torch.float64)
    root = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    covariance_NCC = root @ root.transpose(1, 2)
    drawn_SNC = draw_logits(mean_NC, covariance_NCC, ["x", "y"], 7, 40_000).double()
    for n in range(2):
        torch.testing.assert_close(torch.cov(drawn_SNC[:, n].T), covariance_NCC[n], rtol=0.03, atol=0.05)
        torch.testing.assert_close(drawn_SNC[:, n].mean(dim=0), mean_NC[n], rtol=0, atol=0.05)
    alone = draw_logits(mean_NC[1:], covariance_NCC[1:], ["y"], 7, 40_000)
    assert torch.equal(alone[:, 0], drawn_SNC[:, 1].float())
    none = draw_logits(mean_NC, torch.zeros(2, 3, 3).double(), ["x", "y"], 7, 2)
    assert torch.equal(none, mean_NC.float().expand(2, 2, 3))


# --- runs ------------------------------------------------------------------------------------------------
def predictions_of(spec: Any, name: str = "laplace") -> dict[str, torch.Tensor]:
    files = RunStore.for_spec(spec).load_result(f"predictions/{name}")
    return serialization.from_bytes(files["predictions.safetensors"])


@pytest.mark.parametrize("structure", sweep(["diagonal", "kronecker"], ["diagonal"]))
def test_a_run_predicts_by_its_first_member_and_its_doubts(make_spec: Make, structure: str) -> None:
    make_spec(adapter__dropout=0.1, evaluation__out_of_distribution={"news": {"source": "pypi:bbc-news", "rows": 20}})
    plain = make_spec(name="plain")
    run(plain)
    whole = make_spec(name="whole", baselines={"laplace": {"structure": structure, "samples": 40}})
    metrics = run(whole)
    assert_bit_equal(members(plain), members(whole))
    values_MNC = predictions_of(whole)["test/values"]
    own_NC = predictions_of(whole, "member-000")["test/values"][0]
    spread_NC = values_MNC.std(dim=0)
    assert values_MNC.shape == (40, 24, 2) and bool((spread_NC > 0).all())
    torch.testing.assert_close(values_MNC.mean(dim=0), own_NC, rtol=1e-4, atol=1e-4)  # draws lie opposite each other
    mixed_NC = values_MNC.softmax(dim=2).mean(dim=0)
    assert torch.equal(mixed_NC.argmax(dim=1), own_NC.argmax(dim=1))  # so that of two classes none is turned
    described = metrics["baselines"]["laplace"]
    fit = described["laplace_fit"]
    assert fit["structure"] == structure and 0 < fit["determined"] < fit["matrices_numbers"]
    assert described["eval"]["test"]["mutual_information"] > 0 and "mutual_information" in described["ood"]["news"]
    assert metrics["baseline_costs"]["laplace"]["fit_s"] > 0
    broken = make_spec(name="broken")
    with pytest.raises(Interrupted):
        run(broken, stop_at(3))
    run(broken)
    assert_bit_equal(predictions_of(whole), predictions_of(broken))
    with pytest.raises(RunDirectoryError, match="it is made of member 0 when that is predicted with"):
        prepare(make_spec(name="plain"))


def test_multiple_choice_has_it_too(make_spec: Make, tiny_model: Any) -> None:
    metrics = run(make_spec(
        base__source=tiny_model("llama"), adapter__target_modules="auto", baselines={"laplace": {"samples": 3}},
        task={"kind": "multiple_choice", "options": 2, "max_length": 96, "scoring": "option_text"},
        data={"train": {"source": "pypi:quartz"}, "train_rows": 8, "validation_rows": 8, "test_rows": 8},
        optimization={"lr": 0.005, "steps": 2, "micro_batch": 4}, evaluation__out_of_distribution={},
    ))
    assert metrics["baselines"]["laplace"]["members"] == 3


TWO_CORES = Inventory((Node("a", 2, 16 * 2**30),), "two cores")


@pytest.mark.parametrize(("changes", "words"), [
    ({"task": {"kind": "regression", "max_length": 24}}, "is there for classes, and regression predicts none"),
    ({"adapter": {"kind": "lora_xs", "rank": 4}}, "is over LoRA's matrices, and adapter.kind of member 0 is lora_xs"),
    ({"ensemble__aggregate": "mean_logits"}, "would say what member 0 says"),
    ({"placement": {"strategy": "shard", "workers": 2, "cpus_per_worker": 1}}, "a base that is split over workers"),
])
def test_what_has_no_such_gaussian_is_refused_before_training(make_spec: Make, changes: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        prepare(make_spec(baselines={"laplace": {}}, **changes), TWO_CORES)
