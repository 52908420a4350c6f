"""CLoQ against the paper's closed form, written with a root, its inverse and a whole SVD in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raylora.errors import BaseError
from raylora.init import cloq as module
from raylora.init.cloq import calibration_error, cloq, optimal_error
from raylora.init.loftq import low_rank

SHAPES = ((48, 40), (40, 48), (40, 40))


def problem(outputs: int, inputs: int, rows: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return a residual, calibration inputs and their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x_NI = torch.randn(rows, inputs, generator=generator, dtype=torch.float64) @ mix_II
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x_NI, x_NI.T @ x_NI


def papers_pair(d_OI: Tensor, gram_II: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (A, B, Z) as section 3 of the paper has them, with the root of an eigendecomposition."""
    square_I, u_II = torch.linalg.eigh(gram_II)
    root_II = square_I.sqrt()[:, None] * u_II.T
    p_IS, z_S, v_SO = torch.linalg.svd(root_II @ d_OI.T, full_matrices=False)
    a_IR = torch.linalg.inv(root_II) @ p_IS[:, :rank] * z_S[:rank]
    return a_IR.T, v_SO[:rank].T, z_S


@pytest.mark.parametrize("rank", [1, 7, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pair_is_the_paper_s(shape: tuple[int, int], rank: int) -> None:
    d_OI, _, gram_II = problem(*shape)
    a_RI, b_OR = cloq(d_OI, gram_II, rank, damping=0)
    expected_A, expected_B, _ = papers_pair(d_OI, gram_II, rank)
    assert (a_RI.dtype, b_OR.dtype) == (torch.float32, torch.float32)
    assert (a_RI.shape, b_OR.shape) == ((rank, shape[1]), (shape[0], rank))
    torch.testing.assert_close((b_OR @ a_RI).double(), expected_B @ expected_A, rtol=0, atol=1e-5)
    signs = (a_RI.double() * expected_A).sum(1).sign()
    torch.testing.assert_close(a_RI.double(), expected_A * signs[:, None], rtol=0, atol=1e-4)
    torch.testing.assert_close(b_OR.double(), expected_B * signs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_closed_form_s(shape: tuple[int, int], damping: float) -> None:
    d_OI, x_NI, gram_II = problem(*shape)
    whole_II = module.damped(gram_II, damping)
    z_S = papers_pair(d_OI, whole_II, 1)[2]
    assert calibration_error(d_OI, gram_II) == pytest.approx(float(torch.linalg.norm(x_NI @ d_OI.T)), rel=1e-12)
    for rank in (1, 7, 39):
        expected = float(z_S[rank:].square().sum().sqrt())
        # Squared singular values are subtracted: the digits of the largest are what the smallest can be known to.
        close = pytest.approx(expected, rel=1e-9, abs=1e-9 * float(z_S[0]))
        assert optimal_error(d_OI, gram_II, rank, damping) == close
        a_RI, b_OR = cloq(d_OI, gram_II, rank, damping)
        left = calibration_error(d_OI - b_OR.double() @ a_RI.double(), whole_II)
        rounding = 1e-7 * calibration_error(d_OI, whole_II)  # the pair is float32
        assert left == pytest.approx(expected, rel=1e-6, abs=rounding)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float64_the_error_is_the_closed_form_s_to_nine_digits(shape: tuple[int, int]) -> None:
    d_OI, _, gram_II = problem(*shape)
    for rank in (1, 7, 25):
        _, v_OS = module._top_eigen_exact(d_OI, gram_II)
        left_OI = d_OI - v_OS[:, :rank] @ v_OS[:, :rank].T @ d_OI
        expected = float(papers_pair(d_OI, gram_II, rank)[2][rank:].square().sum().sqrt())
        assert calibration_error(left_OI, gram_II) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_pair_is_better(shape: tuple[int, int]) -> None:
    d_OI, _, gram_II = problem(*shape)
    a_RI, b_OR = (each.double() for each in cloq(d_OI, gram_II, 5, damping=0))
    best = calibration_error(d_OI - b_OR @ a_RI, gram_II)
    assert best < calibration_error(d_OI, gram_II)
    svd_A, svd_B = low_rank(d_OI, 5)
    assert best < calibration_error(d_OI - svd_B @ svd_A, gram_II)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(20):
            moved_A = a_RI + size * torch.randn(a_RI.shape, generator=generator, dtype=torch.float64)
            moved_B = b_OR + size * torch.randn(b_OR.shape, generator=generator, dtype=torch.float64)
            assert best < calibration_error(d_OI - moved_B @ moved_A, gram_II)


@pytest.mark.parametrize("shape", SHAPES)
def test_more_rank_leaves_less_and_full_rank_nothing(shape: tuple[int, int]) -> None:
    d_OI, _, gram_II = problem(*shape)
    errors = []
    for rank in range(1, 41):
        a_RI, b_OR = cloq(d_OI, gram_II, rank)
        errors.append(calibration_error(d_OI - b_OR.double() @ a_RI.double(), gram_II))
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-5 * calibration_error(d_OI, gram_II)


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_splits_have_one_product_and_carry_z_where_they_say(method: module.Method) -> None:
    d_OI, _, gram_II = problem(48, 40)
    pairs = {
        split: cloq(d_OI, gram_II, 3, split=split, method=method) for split in ("right", "balanced", "left")
    }
    for a_RI, b_OR in pairs.values():
        product, expected = b_OR @ a_RI, pairs["right"][1] @ pairs["right"][0]
        torch.testing.assert_close(product, expected, rtol=0, atol=1e-5)
    z_R = papers_pair(d_OI, module.damped(gram_II, 0.01), 3)[2][:3].float()
    for split, power in (("right", 0.0), ("balanced", 0.5), ("left", 1.0)):
        torch.testing.assert_close(torch.linalg.norm(pairs[split][1], dim=0), z_R**power, rtol=1e-4, atol=0)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_rows_than_inputs_are_enough(shape: tuple[int, int], damping: float) -> None:
    d_OI, x_NI, gram_II = problem(*shape, rows=9)
    for split in ("right", "balanced", "left"):
        for rank in (4, 9, 20):  # fewer than, as many as, and more than the inputs span
            a_RI, b_OR = cloq(d_OI, gram_II, rank, damping, split=split)
            assert bool(torch.isfinite(a_RI).all()) and bool(torch.isfinite(b_OR).all())
            left = calibration_error(d_OI - b_OR.double() @ a_RI.double(), gram_II)
            z_S = torch.linalg.svdvals(x_NI @ d_OI.T)
            best, all_of_it = float(z_S[rank:].square().sum().sqrt()), float(torch.linalg.norm(z_S))
            slack = 1e-5 if damping == 0 else 0.05
            assert best - 1e-5 * all_of_it <= left <= best + slack * all_of_it


def test_nothing_to_compensate_gives_zeros() -> None:
    _, _, gram_II = problem(48, 40)
    for d_OI, h_II, damping in ((torch.zeros(48, 40), gram_II, 0.01), (torch.randn(48, 40), torch.zeros(40, 40), 0.0)):
        for split in ("right", "balanced", "left"):
            a_RI, b_OR = cloq(d_OI, h_II, 4, damping, split=split)
            assert not bool((b_OR @ a_RI).any())
            assert bool(torch.isfinite(a_RI).all()) and bool(torch.isfinite(b_OR).all())


def test_unseen_inputs_count_by_the_damping_alone() -> None:
    d_OI, _, _ = problem(48, 40)
    pair = cloq(d_OI, torch.zeros(40, 40), 4)  # the plain norm is all that is left
    svd_A, svd_B = low_rank(d_OI, 4)
    torch.testing.assert_close(pair[1] @ pair[0], svd_B @ svd_A, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(300, 220), (220, 300), (300, 120)])
def test_fast_is_within_half_a_per_cent_of_the_optimum(shape: tuple[int, int]) -> None:
    d_OI, _, gram_II = problem(*shape, rows=1000)  # a flat spectrum, which is the hard one
    for rank in (4, 16):
        a_RI, b_OR = cloq(d_OI, gram_II, rank, damping=0, method="fast")
        left, best = calibration_error(d_OI - b_OR @ a_RI, gram_II), optimal_error(d_OI, gram_II, rank)
        nothing = calibration_error(d_OI, gram_II)
        assert best * (1 - 1e-6) <= left <= best * 1.005
        assert nothing**2 - left**2 >= 0.99 * (nothing**2 - best**2)
        again = cloq(d_OI, gram_II, rank, damping=0, method="fast")
        assert torch.equal(again[0], a_RI)
        other = cloq(d_OI, gram_II, rank, damping=0, method="fast", seed=1)
        assert not torch.equal(other[0], a_RI)


def test_bad_input_is_refused() -> None:
    d_OI, _, gram_II = problem(48, 40)
    with pytest.raises(BaseError, match=r"o_proj: 48 inputs, and a Gram matrix of \(40, 40\)"):
        cloq(d_OI.T, gram_II, 4, name="o_proj")  # the orientation that a square layer would hide
    for rank in (0, 41):
        with pytest.raises(BaseError, match=rf"rank: {rank} for o_proj \(48 x 40\)\n.*use 1 to 40"):
            cloq(d_OI, gram_II, rank, name="o_proj")
    with pytest.raises(BaseError, match="o_proj: the residual has NaN"):
        cloq(d_OI * float("nan"), gram_II, 4, name="o_proj")
    with pytest.raises(BaseError, match="o_proj: the Gram matrix has NaN"):
        cloq(d_OI, gram_II * float("inf"), 4, name="o_proj")
