"""MagR against slow float64 proximal gradient descent with a projection by sorting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raylora.errors import BaseError
from raylora.init.cloq import calibration_error
from raylora.quant.grid import fit_grid
from raylora.quant.magr import clip_level, magr, shrink, top_eigenvalue

SHAPES = ((48, 40), (40, 48))
GROUP_SIZES = (8, 12, 64)


def layer(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, inputs)
    x_NI = torch.randn(200, inputs, generator=generator, dtype=torch.float64) @ mix_II
    return torch.randn(outputs, inputs, generator=generator), x_NI.T @ x_NI


def slow_prox(v: Tensor, strength: float) -> Tensor:
    """Return v - a * proj(v / a) on the L1 ball of radius 1, by sorting (Duchi et al. 2008)."""
    u = v / strength
    if u.abs().sum() <= 1:
        return torch.zeros_like(v)
    sorted_sizes = u.abs().sort(descending=True).values
    sums = sorted_sizes.cumsum(0) - 1
    counts = torch.arange(1, len(u) + 1, dtype=v.dtype)
    last = int((sorted_sizes > sums / counts).nonzero().max())
    projected = u.sign() * (u.abs() - sums[last] / (last + 1)).clamp(min=0)
    return v - strength * projected


def slow_magr(weight_OI: Tensor, gram_II: Tensor, group_size: int, strength: float, iterations: int) -> Tensor:
    weight_OI = weight_OI.double()
    unit_II = gram_II / torch.linalg.eigvalsh(gram_II)[-1]
    new_OI = weight_OI.clone()
    for _ in range(iterations):
        new_OI = new_OI - (new_OI - weight_OI) @ unit_II
        for row in new_OI:
            for start in range(0, len(row), group_size):
                row[start : start + group_size] = slow_prox(row[start : start + group_size], strength)
    return new_OI


def objective(new_OI: Tensor, weight_OI: Tensor, gram_II: Tensor, group_size: int, strength: float) -> float:
    unit_II = gram_II / torch.linalg.eigvalsh(gram_II)[-1]
    largest = sum(float(part.abs().amax(1).double().sum()) for part in new_OI.split(group_size, 1))
    return 0.5 * calibration_error(new_OI.double() - weight_OI.double(), unit_II) ** 2 + strength * largest


@pytest.mark.parametrize("strength", [1e-3, 0.3, 5.0, 1e3])
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_the_clip_level_is_that_of_a_projection_by_sorting(size: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(size)
    v_OGS = torch.randn(9, 5, size, generator=generator, dtype=torch.float64)
    v_OGS[0] = v_OGS[0].round()  # ties, and zeros
    v_OGS[1, 0] = 0
    expected = torch.stack([torch.stack([slow_prox(v, strength) for v in row]) for row in v_OGS])
    guesses = (None, torch.zeros(9, 5).double(), v_OGS.abs().amax(2), torch.full((9, 5), 1e6).double())
    for guess_OG in guesses:
        level = clip_level(v_OGS.abs(), strength, guess_OG)[:, :, None]
        torch.testing.assert_close(v_OGS.clamp(-level, level), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_magr_equals_the_slow_reference(
    shape: tuple[int, int], group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raylora.quant.magr._ELEMENTS_AT_ONCE", 500)  # several parts
    weight_OI, gram_II = layer(*shape)
    got = shrink(weight_OI, gram_II, group_size, strength=0.02, iterations=60)
    expected_OI = slow_magr(weight_OI, gram_II, group_size, 0.02, 60)
    assert got.iterations == 60
    torch.testing.assert_close(got.weight_OI.double(), expected_OI, rtol=0, atol=2e-5)
    assert got.objective == pytest.approx(objective(expected_OI, weight_OI, gram_II, group_size, 0.02), rel=1e-4)


def test_threads_change_nothing_but_the_time() -> None:
    weight_OI, gram_II = layer(48, 40)
    threads, got = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got.append(magr(weight_OI, gram_II, 8, strength=0.02))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_iteration_lowers_the_objective(group_size: int) -> None:
    weight_OI, gram_II = layer(48, 40)
    values = [objective(weight_OI, weight_OI, gram_II, group_size, 0.05)]
    for iterations in range(1, 30):
        new_OI = magr(weight_OI, gram_II, group_size, strength=0.05, iterations=iterations)
        values.append(objective(new_OI, weight_OI, gram_II, group_size, 0.05))
    assert all(after < before for before, after in zip(values, values[1:], strict=False))


@pytest.mark.parametrize(("group_size", "strength"), [(8, 1e-4), (40, 1e-3), (64, 1e-3)])
def test_the_default_strengths_lower_every_row_s_maxima(group_size: int, strength: float) -> None:
    weight_OI, gram_II = layer(48, 40)
    kept_OI = weight_OI.clone()
    new_OI = magr(weight_OI, gram_II, group_size)
    assert torch.equal(new_OI, magr(weight_OI, gram_II, group_size, strength))
    assert torch.equal(weight_OI, kept_OI)
    # One group may rise to make up for another; their sum, which is what the objective holds, falls in every row.
    before_O, after_O = (sum(g.abs().amax(1) for g in w.split(group_size, 1)) for w in (weight_OI, new_OI))
    assert bool((after_O < before_O).all())
    assert calibration_error(new_OI - weight_OI, gram_II) < 0.02 * calibration_error(weight_OI, gram_II)


def test_grids_are_finer_after_magr() -> None:
    weight_OI, gram_II = layer(48, 40)
    for group_size in (8, 40):
        after, before = (
            fit_grid(w, 2, group_size)[0].mean() for w in (magr(weight_OI, gram_II, group_size, 0.01), weight_OI)
        )
        assert after < 0.98 * before


def test_stopping_early_costs_little() -> None:
    weight_OI, gram_II = layer(48, 40)
    whole = shrink(weight_OI, gram_II, 8, strength=0.05, iterations=2000)
    last, taken = float("inf"), 0
    for tolerance, cost in ((1e-3, 0.04), (1e-4, 4e-3), (1e-5, 1e-3)):  # measured: 0.029, 0.0030, 0.0007
        early = shrink(weight_OI, gram_II, 8, strength=0.05, iterations=2000, tolerance=tolerance)
        assert taken < early.iterations < 500
        assert whole.objective <= early.objective < min(last, whole.objective * (1 + cost))
        last, taken = early.objective, early.iterations


def test_the_top_eigenvalue_is_found() -> None:
    for inputs, scale in ((40, 1.0), (48, 1e12), (40, 1e-30)):
        _, gram_II = layer(48, inputs)
        expected = float(torch.linalg.eigvalsh(gram_II)[-1]) * scale
        assert top_eigenvalue(gram_II * scale) == pytest.approx(expected, rel=1e-3)
    assert top_eigenvalue(torch.zeros(4, 4)) == 0


def test_a_gram_of_zeros_changes_nothing() -> None:
    weight_OI, _ = layer(48, 40)
    got = shrink(weight_OI, torch.zeros(40, 40), 8)
    assert torch.equal(got.weight_OI, weight_OI)
    assert got.iterations == 0


def test_bad_input_is_refused() -> None:
    weight_OI, gram_II = layer(48, 40)
    with pytest.raises(BaseError, match="v_proj: 48 inputs, and a Gram matrix of"):
        magr(weight_OI.T, gram_II, 8, name="v_proj")
    with pytest.raises(BaseError, match="v_proj: the weight has NaN"):
        magr(weight_OI * float("inf"), gram_II, 8, name="v_proj")
    with pytest.raises(BaseError, match="group_size: -1"):
        magr(weight_OI, gram_II, -1)
