"""MagR: shrink each group's largest weights where the data will not notice, before quantizing (arXiv 2406.00800).

    min over W'   1/2 ||X (W' - W)^T||_F^2 + a * sum over groups ||w'_group||_inf        X of top singular value 1

by proximal gradient descent with step 1: W' <- prox(W' - (W' - W) H). By Moreau, prox of a * ||.||_inf takes the
projection on the L1 ball of radius a off its argument, which leaves v clipped to [-t, t], where t solves
sum (|v| - t)_+ = a (t = 0 if there is no such t > 0). Only t has to be found.

The authors' result is the 200th iterate, not the optimum: where H is small the weights are still on their way, so a
faster method (momentum, say) would shrink more. Rows do not depend on each other: a few at a time stay in cache, and
each lot has a thread of its own.

Shapes: O outputs, I inputs, G groups per row, S inputs in a group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from raylora.errors import BaseError
from raylora.quant.grid import check_weight, group_count

_ELEMENTS_AT_ONCE = 1 << 18  # 1 MiB in float32
_LOTS = 4  # a multiple of them, so that few threads end together


class Shrunk(NamedTuple):
    """The new weight and how it was reached."""

    weight_OI: Tensor
    iterations: int
    """The most that any rows took."""
    objective: float
    """At the weight returned."""


def magr(
    weight_OI: Tensor, gram_II: Tensor, group_size: int, strength: float | None = None, iterations: int = 200,
    tolerance: float = 0.0, name: str = "weight",
) -> Tensor:
    """Return the weight with smaller group maxima and nearly the same outputs on the calibration inputs.

    ``strength`` is a, by default 1e-3 with one group per row and 1e-4 otherwise. See :func:`shrink` for the rest.
    """
    return shrink(weight_OI, gram_II, group_size, strength, iterations, tolerance, name).weight_OI


def shrink(
    weight_OI: Tensor, gram_II: Tensor, group_size: int, strength: float | None = None, iterations: int = 200,
    tolerance: float = 0.0, name: str = "weight",
) -> Shrunk:
    """Return what :func:`magr` returns and how it was reached.

    Rows stop early once an iteration lowers their objective by no more than ``tolerance`` of it; 0 runs them all. At
    the authors' strengths 200 iterations are far from convergence, so it is fewer ``iterations`` that save time there.
    A Gram matrix of zeros says nothing about the layer, which is then left alone. Raise BaseError for bad input.
    """
    check_weight(weight_OI, name)
    inputs = weight_OI.shape[1]
    groups = group_count(inputs, group_size)
    if tuple(gram_II.shape) != (inputs, inputs):
        raise BaseError(f"{name}: {inputs} inputs, and a Gram matrix of {tuple(gram_II.shape)}")
    if strength is None:
        strength = 1e-3 if groups == 1 else 1e-4
    top = top_eigenvalue(gram_II)
    if top == 0 or strength == 0:
        return Shrunk(weight_OI.detach().float().clone(), 0, 0.0)
    unit_II = (gram_II.double() / top).to(weight_OI.device, torch.float32)
    work = functools.partial(
        _shrink_rows, unit_II=unit_II, group_size=min(group_size, inputs), strength=strength, iterations=iterations,
        tolerance=tolerance,
    )
    parts = _in_threads(work, weight_OI.detach().float())
    return Shrunk(
        torch.cat([part.weight_OI for part in parts]), max(part.iterations for part in parts),
        sum(part.objective for part in parts),
    )


def _in_threads(work: Callable[[Tensor], Shrunk], weight_OI: Tensor) -> list[Shrunk]:
    """Return the work done on the rows, a lot at a time, by as many threads as torch may use.

    Torch's own threads would meet at the end of each small operation, and where another process takes a core even for
    a moment all wait for it: ten times slower on a busy machine. Lots do not depend on the threads, so neither does
    the result.
    """
    if weight_OI.is_cuda:
        return [work(weight_OI)]
    lots = weight_OI.chunk(_LOTS * -(-weight_OI.numel() // (_LOTS * _ELEMENTS_AT_ONCE)))
    threads = torch.get_num_threads()
    if threads == 1:
        return [work(lot_OI) for lot_OI in lots]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, lots))
    finally:
        torch.set_num_threads(threads)  # a thread's own setting is also the default of threads to come


def top_eigenvalue(gram_II: Tensor, most_steps: int = 300) -> float:
    """Return the largest eigenvalue of a positive semidefinite matrix by power iteration, to about 1e-4 of it.

    It is approached from below; the descent bears a step up to twice the exact one.
    """
    matrix_II = gram_II.float()
    size = float(matrix_II.abs().amax()) if matrix_II.numel() else 0.0
    if size == 0:
        return 0.0
    matrix_II = matrix_II / size  # float32 would overflow on the square of a large Gram
    generator = torch.Generator().manual_seed(0)
    vector_I = torch.randn(len(matrix_II), generator=generator).to(matrix_II.device)
    value = 0.0
    for _ in range(most_steps):
        vector_I = matrix_II @ (vector_I / vector_I.norm())
        before, value = value, float(vector_I.norm())
        if abs(value - before) <= 1e-6 * value:
            break
    return value * size


def _shrink_rows(
    weight_OI: Tensor, unit_II: Tensor, group_size: int, strength: float, iterations: int, tolerance: float
) -> Shrunk:
    """Return the result for a few rows, with H already scaled to a top eigenvalue of 1."""
    new_OI, taken = weight_OI.clone(), 0
    level_OG = _in_groups(weight_OI.abs(), group_size).amax(2)
    moved_OI = torch.zeros_like(weight_OI)
    pull_OI = torch.zeros_like(weight_OI)  # (W' - W) H
    value = strength * float(level_OG.sum())
    while taken < iterations:
        taken += 1
        new_OI -= pull_OI
        sizes_OGS = _in_groups(new_OI.abs(), group_size)
        level_OG = clip_level(sizes_OGS, strength, level_OG)
        level_OI = level_OG.repeat_interleave(group_size, 1)[:, : new_OI.shape[1]]
        torch.clamp(new_OI, -level_OI, level_OI, out=new_OI)
        torch.sub(new_OI, weight_OI, out=moved_OI)
        torch.mm(moved_OI, unit_II, out=pull_OI)
        before, value = value, 0.5 * float(torch.vdot(moved_OI.flatten(), pull_OI.flatten()))
        value += strength * float(level_OG.sum())
        if before - value <= tolerance * before and tolerance > 0:
            break
    return Shrunk(new_OI, taken, value)


def clip_level(sizes_OGS: Tensor, strength: float, guess_OG: Tensor | None = None) -> Tensor:
    """Return t_OG >= 0 with sum over S of (sizes - t)_+ = strength, 0 where the sizes add up to less.

    Newton's method from the left: the sum is convex and piecewise linear in t, so that every step stays left of the
    root and takes at least one element out, and once none leaves the root is exact, with no sorting. A guess right of
    the root costs one step, which lands left of it.
    """
    largest_OG = sizes_OGS.amax(2)
    # The root is at least strength / S below the largest element and at most the whole strength.
    level_OG = largest_OG - strength
    if guess_OG is not None:
        level_OG = torch.maximum(level_OG, torch.minimum(guess_OG, largest_OG - strength / sizes_OGS.shape[2]))
    count_OG = torch.full_like(level_OG, -1)
    for _ in range(sizes_OGS.shape[2] + 2):
        over_OGS = (sizes_OGS - level_OG[:, :, None]).relu_()
        excess_OG = over_OGS.sum(2) - strength
        before_OG, count_OG = count_OG, over_OGS.sign_().sum(2).clamp_(min=1)
        level_OG = level_OG + excess_OG / count_OG
        if torch.equal(before_OG, count_OG):
            break
    return level_OG.clamp_(min=0)


def _in_groups(sizes_OI: Tensor, group_size: int) -> Tensor:
    """Return O x G x S; a shorter last group is filled with zeros, which no level above 0 cuts."""
    return F.pad(sizes_OI, (0, -sizes_OI.shape[1] % group_size)).unflatten(1, (-1, group_size))
