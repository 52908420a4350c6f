"""Stacking of predictive distributions: the simplex weights with the least NLL on validation rows.

Yao, Vehtari, Simpson and Gelman, "Using stacking to average Bayesian predictive distributions" (Bayesian Analysis
13(3), 2018), with the logarithmic score, on held-out rows instead of leave-one-out densities. The problem is convex; an
interior-point method follows its central path to the end, and what is returned is certified:

    nll(w) - min nll <= w . g - min_m g_m,  g the gradient at w,

which is zero where the conditions of Karush, Kuhn and Tucker hold.

Shapes: M members.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.ensemble.objectives import Objective
from raylora.errors import RayloraError

TOLERANCE = 1e-7
"""By how much the NLL may exceed the least there is, in nats per row, or as a share of it where it is above one."""
_LAST_BARRIER = 1e-10
_LEAST_FALL = 1e-9
"""In nats per row: a regression's weights and noise are fitted by turns until a turn gains less."""
_UNSEEN = 1e-10
"""A Newton step that gains less, as a share of the NLL, is taken as it is: rounding hides whether the NLL falls."""
_SMALLEST = 1e-6
"""A smaller weight is taken for none, where the certificate allows it."""
_NEWTON_STEPS = 60
_ROUNDS = 100
"""At most, of fitting weights and a regression's noise by turns."""


@dataclass(frozen=True, eq=False)
class Stacked:
    """The weights, not negative and one in all, with their NLL and what it may exceed the least by."""

    weights_M: Tensor
    nll: float
    gap: float


def stack_weights(objective: Objective) -> Stacked:
    """Return the certified weights; members who say just the same of every row share their weight equally.

    A regression's weights are certified at the noise that fits them: weights and noise are fitted by turns, which never
    raises the NLL, until it falls no more.

    Raises:
        RayloraError: the certificate failed, which would be a bug.
    """
    first_M = objective.alike()
    distinct = sorted(set(first_M))
    reduced = objective.of(distinct)
    weights_M, gap = _fit(reduced)
    shares = [first_M.count(m) for m in distinct]
    place = {m: k for k, m in enumerate(distinct)}
    spread_M = torch.stack([weights_M[place[m]] / shares[place[m]] for m in first_M])
    nll = objective.nll(spread_M)
    if not gap <= TOLERANCE * max(1.0, abs(nll)):
        raise RayloraError(f"stacked weights miss the least NLL by up to {gap:.1e}",
                           "this is a bug in raylora: report it")
    return Stacked(spread_M, nll, gap)


def gap_of(objective: Objective, weights_M: Tensor) -> float:
    """Return by how much the NLL of weights can at most exceed the least there is: its linear lower bound says so."""
    gradient_M = objective.derivatives(weights_M).gradient_M
    return float((weights_M @ gradient_M - gradient_M.min()).clamp(min=0))


def _fit(objective: Objective) -> tuple[Tensor, float]:
    """Return the weights and their gap."""
    weights_M = torch.full((objective.members,), 1 / objective.members, dtype=torch.float64)
    gap, least = 0.0, objective.nll(weights_M)
    for number in range(_ROUNDS if objective.members > 1 else 0):
        fixed = objective.at(weights_M)
        tried_M = _minimize(fixed)
        nll = objective.nll(tried_M)
        if number == 0 or nll < least - _LEAST_FALL:
            weights_M, gap, fell = tried_M, gap_of(fixed, tried_M), nll < least - _LEAST_FALL
            least = nll
        else:
            break
        if fixed is objective or not fell:  # nothing is fitted beside the weights, or they were the best already
            break
    return weights_M, gap


def _minimize(objective: Objective) -> Tensor:
    """Follow ``nll(w) - mu sum log w`` from a large mu to a small one, and set what is all but zero to zero."""
    members = objective.members
    weights_M = torch.full((members,), 1 / members, dtype=torch.float64)
    barrier = 1e-2
    while barrier >= _LAST_BARRIER / members:
        weights_M = _center(objective, weights_M, barrier)
        barrier *= 0.1
    dropped_M = torch.where(weights_M < _SMALLEST, 0.0, weights_M)
    dropped_M = dropped_M / dropped_M.sum()
    candidates = [dropped_M, weights_M / weights_M.sum()]
    return next((one for one in candidates if gap_of(objective, one) <= TOLERANCE / 10), candidates[-1])


def _center(objective: Objective, weights_M: Tensor, barrier: float) -> Tensor:
    """Return the minimum of ``nll(w) - barrier sum log w`` on the simplex, by Newton's method."""
    members = len(weights_M)
    system = torch.zeros((members + 1, members + 1), dtype=torch.float64)
    system[:members, members] = system[members, :members] = 1.0

    def value(at_M: Tensor) -> float:
        return objective.nll(at_M) - barrier * float(at_M.log().sum())

    for _ in range(_NEWTON_STEPS):
        found = objective.derivatives(weights_M)
        # In the scale of the weights: w = weights * (1 + u) keeps the system well-conditioned near the boundary.
        gradient_M = weights_M * found.gradient_M - barrier
        system[:members, :members] = weights_M[:, None] * found.hessian_MM * weights_M + barrier * torch.eye(
            members, dtype=torch.float64
        )
        system[:members, members] = system[members, :members] = weights_M
        right = torch.cat([-gradient_M, torch.zeros(1, dtype=torch.float64)])
        step_M = torch.linalg.solve(system, right)[:members]
        decrement = -float(gradient_M @ step_M)
        if decrement <= 1e-6 * barrier:
            break
        size = min(1.0, 0.95 / max(1e-300, float(-step_M.min())))
        before = value(weights_M)
        unseen = decrement <= _UNSEEN * max(1.0, abs(before))
        while size > 1e-10:
            tried_M = weights_M * (1 + size * step_M)
            tried_M = tried_M / tried_M.sum()
            if unseen or value(tried_M) <= before - 0.1 * size * decrement:
                break
            size *= 0.5
        else:
            break
        weights_M = tried_M
    return weights_M
