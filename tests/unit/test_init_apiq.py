"""ApiQ's steps against Adam on the whole activations in float64, its grids, and preparations that use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from raylora.engine.quantization import quantize_base
from raylora.engine.quantization.layer_solver import solve_here
from raylora.errors import BaseError, Interrupted, SpecError
from raylora.init.apiq import ClippedGrid, Grid, apiq
from raylora.init.cloq import calibration_error, optimal_error
from raylora.init.loftq import loftq
from raylora.quant.gram import Cross, Gram
from raylora.quant.quantized import Quantized
from raylora.quant.rtn import round_to_nearest

OUTPUTS, INPUTS, RANK, GROUP = 40, 56, 6, 16


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (weight, inputs behind quantized layers, inputs of the full model)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(INPUTS, INPUTS, generator=generator) / INPUTS**0.5
    x_NI = torch.randn(600, INPUTS, generator=generator) @ mix
    near_NI = x_NI + 0.2 * torch.randn(600, INPUTS, generator=generator) @ mix
    return 0.1 * torch.randn(OUTPUTS, INPUTS, generator=generator), near_NI, x_NI


def stored(grid: Grid, bits: int) -> Tensor:
    return Quantized.of_codes(grid.codes_OI, grid.scales_OG, grid.zeros_OG, bits, GROUP).dequantize()


def test_its_steps_are_those_of_adam_on_the_activations() -> None:
    weight_OI, near_NI, x_NI = data()
    gram_II, cross_II = near_NI.double().T @ near_NI.double(), near_NI.double().T @ x_NI.double()
    grid, a_RI, b_OR = apiq(weight_OI, gram_II, cross_II, 2, GROUP, RANK, 12, 3e-3, 2e-2, seed=5)
    w_OI, near, x = weight_OI.double(), near_NI.double(), x_NI.double()
    bound = INPUTS**-0.5
    a = torch.empty(RANK, INPUTS).uniform_(-bound, bound, generator=torch.Generator().manual_seed(5)).double()
    a.requires_grad_()
    b = torch.zeros(OUTPUTS, RANK, dtype=torch.float64, requires_grad=True)
    clipped = ClippedGrid(w_OI, 2, GROUP)
    clips = [c.requires_grad_() for c in clipped.open()]
    adam = torch.optim.Adam([{"params": [a, b], "lr": 3e-3}, {"params": clips, "lr": 2e-2}], eps=1e-8)
    losses = []
    for step in range(13):
        q, reference = clipped.rounded(*clips)
        loss = (x @ w_OI.T - near @ (q + b @ a).T).square().sum()
        losses.append(float(loss.detach()))
        if step < 12:
            adam.zero_grad()
            loss.backward()
            adam.step()
    assert losses[-1] == min(losses) and losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(a_RI.double(), a.detach(), rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(b_OR.double(), b.detach(), rtol=2e-3, atol=2e-4)
    assert (grid.codes_OI != reference.codes_OI).float().mean() < 0.01  # a weight at the edge of two codes may turn
    near_OI, expected_OI = stored(grid, 2), stored(reference, 2)
    assert float((near_OI - expected_OI).abs().mean()) < 1e-3 * float(expected_OI.abs().mean()) + 1e-4


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_stored_is_what_was_optimized(bits: int) -> None:
    weight_OI, _, _ = data()
    clipped = ClippedGrid(weight_OI, bits, GROUP)
    generator = torch.Generator().manual_seed(1)
    g_OG, b_OG = (torch.randn(t.shape, generator=generator) for t in clipped.open())
    q_OI, grid = clipped.rounded(g_OG, b_OG)
    torch.testing.assert_close(stored(grid, bits), q_OI, rtol=1e-6, atol=1e-7)
    wide = torch.full_like(g_OG, 20.0)  # nothing is clipped: rounding to nearest, but for the last digit of a scale
    plain_OI = round_to_nearest(weight_OI, bits, GROUP).dequantize()
    assert float((clipped.rounded(wide, wide)[0] - plain_OI).abs().mean()) < 0.01 * float(plain_OI.abs().mean())


@pytest.mark.parametrize("bits", [2, 3])
def test_it_loses_less_than_rounding_and_loftq_and_no_less_than_the_best_pair_of_its_grid(bits: int) -> None:
    weight_OI, x_NI, _ = data()
    gram_II = x_NI.double().T @ x_NI.double()
    grid, a_RI, b_OR = apiq(weight_OI, gram_II, gram_II, bits, GROUP, RANK, 400, 3e-3, 1e-2)
    q_OI = stored(grid, bits)
    found = calibration_error(weight_OI - q_OI - b_OR @ a_RI, gram_II)
    plain_OI = round_to_nearest(weight_OI, bits, GROUP).dequantize()
    rounded, own_a, own_b = loftq(weight_OI, lambda w: round_to_nearest(w, bits, GROUP), RANK)
    assert found < 0.7 * calibration_error(weight_OI - plain_OI, gram_II)
    assert found < calibration_error(weight_OI - rounded.dequantize() - own_b @ own_a, gram_II)
    if bits == 2:  # the best pair over the plain grid, CLoQ's; at 3 bits there is little for clipping to gain
        assert found < optimal_error((weight_OI - plain_OI).double(), gram_II, RANK)
    best = optimal_error((weight_OI - q_OI).double(), gram_II, RANK)
    assert best <= found < 1.2 * best


def test_it_makes_up_for_what_the_layers_before_have_changed() -> None:
    weight_OI, near_NI, x_NI = data()
    gram, cross = Gram(INPUTS), Cross(INPUTS)
    for part in (slice(0, 250), slice(250, 600)):
        gram.add(near_NI[part])
        cross.add(near_NI[part], x_NI[part])
    torch.testing.assert_close(cross.matrix_II, near_NI.double().T @ x_NI.double(), rtol=1e-5, atol=1e-3)
    lost = []
    for target_II in (gram.matrix_II, cross.matrix_II):
        grid, a_RI, b_OR = apiq(weight_OI, gram.matrix_II, target_II, 4, GROUP, RANK, 300, 3e-3, 1e-2)
        change_OI = stored(grid, 4) + b_OR @ a_RI
        lost.append(float((x_NI @ weight_OI.T - near_NI @ change_OI.T).norm()))
    assert lost[1] < 0.98 * lost[0]


def test_what_makes_no_sense_is_refused() -> None:
    weight_OI, x_NI, _ = data()
    gram_II = x_NI.double().T @ x_NI.double()
    with pytest.raises(BaseError, match=r"rank: 41 for up \(40 x 56\)"):
        apiq(weight_OI, gram_II, gram_II, 2, GROUP, 41, name="up")
    with pytest.raises(BaseError, match="up: its weights or calibration inputs have NaN"):
        apiq(weight_OI, gram_II * float("nan"), gram_II, 2, GROUP, 4, name="up")


# --- preparations ---------------------------------------------------------------------------------------
@pytest.fixture
def spec_for(make_spec: Callable[..., Any], tiny_model: Callable[[str], str]) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        return make_spec(**{
            "base__source": tiny_model("llama"), "base__quantization": {"kind": "rtn", "bits": 2, "group_size": 16},
            "base__compensation": {"kind": "apiq", "rank": 4, "steps": 25, "lr": 5e-3},
            "base__calibration": {"source": "pypi:bbc-news", "samples": 6, "length": 32, "held_out": 2},
            "task": {"kind": "language_modeling", "max_length": 32}, "data__train__source": "pypi:bbc-news",
            "adapter__target_modules": ["q_proj", "v_proj"], **changes,
        })

    return make


def prepare(spec: Any, folder: Any, **options: Any) -> tuple[Any, Any]:
    from raylora import registry

    task = registry.load("task", spec.task.kind).build(spec.task)
    base = quantize_base.open_base(spec.base, task, str(folder))
    return base, quantize_base.ensure_prepared(spec.base, task, base, torch.device("cpu"), **options)


def test_a_preparation_compares_with_the_full_model_and_goes_on_after_a_stop(
    spec_for: Callable[..., Any], tmp_path: Any
) -> None:
    spec = spec_for()
    seen: list[Any] = []

    def solve(jobs: Any) -> Any:
        seen.extend(jobs)
        return solve_here(jobs)

    whole, summary = prepare(spec, tmp_path / "whole", solve=solve)
    for layer in summary["layers"]:
        assert layer["theory"] <= 1.001 * layer["compensated"]
    first, last = seen[0], seen[-1]
    torch.testing.assert_close(first.cross_II, first.gram_II, rtol=1e-5, atol=1e-3)  # nothing is quantized before it
    assert float((last.cross_II - last.gram_II).norm()) > 0.02 * float(last.gram_II.norm())
    with pytest.raises(Interrupted, match="after block 1 of 2"):
        prepare(spec, tmp_path / "broken", should_stop=lambda: 15)
    again, _ = prepare(spec, tmp_path / "broken")
    for block in range(2):
        one, two = (base.store.load_result(f"blocks/block-{block:03d}") for base in (whole, again))
        assert one["layers.safetensors"] == two["layers.safetensors"]


def test_it_takes_the_grid_of_rtn_alone(spec_for: Callable[..., Any]) -> None:
    with pytest.raises(SpecError, match="apiq rounds by itself.*use kind rtn in place of optq"):
        spec_for(base__quantization={"kind": "optq", "bits": 2, "group_size": 16})
