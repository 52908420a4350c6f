"""A regression's predictive distribution: every member's value, and one noise around all of them.

    p(y | x) = sum_m w_m N(y; v_m(x), s^2),  w_m = 1/M unless weights were fitted

A homoscedastic deep ensemble (arXiv 1612.01474): members are trained by squared error, and the noise that they leave
is one number, fitted on the validation split. Its mean is the mean of the values; its variance is s^2, what no member
can tell, plus the variance of the values, what the members disagree about.

Shapes: M members, N rows, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from raylora.ensemble.aggregate import log_mean_exp, mean

FLOOR = 1e-3
"""The least noise that a fit may find, as a share of the labels' spread: without it, members that hit every label of
the validation split would be certain of everything."""


@dataclass(frozen=True)
class Noise:
    """The fitted standard deviation of the noise, in the label's units, and the validation NLL with it."""

    std: float
    nll: float
    degenerate: bool
    """The fit was stopped by its floor: the validation labels were predicted all but exactly."""


def fit_noise(real_MN: Tensor, labels_N: Tensor, weights_M: Tensor | None = None) -> Noise:
    """Return the noise with the least NLL of the mixture on these rows.

    Setting the derivative to zero makes s^2 a weighted mean of the members' squared errors, row by row. So it lies
    between the mean over rows of the least and of the greatest of them; for one member that is its mean squared error.
    """
    from scipy.optimize import minimize_scalar  # slow to import, which a prediction need not wait for

    error_MN = (real_MN.double() - labels_N.double()) ** 2
    low, high = (float(bound_N.mean()) ** 0.5 for bound_N in (error_MN.amin(dim=0), error_MN.amax(dim=0)))
    spread = float(labels_N.double().std(correction=0)) or max(1.0, float(labels_N.abs().max()))
    floor = FLOOR * spread
    low, high = max(low, floor), max(high, floor)

    def nll(log_std: float) -> float:
        return float(mixture_nll(real_MN, labels_N, math.exp(log_std), weights_M).mean())

    # Where members disagree widely the likelihood may have two peaks: a coarse grid finds the higher one first.
    grid = np.linspace(math.log(low), math.log(high), 31)
    values = [nll(point) for point in grid] if high > low else [nll(grid[0])]
    best = int(np.argmin(values))
    found, least = float(grid[best]), values[best]
    if high > low:
        bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
        refined = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-9})
        if refined.fun < least:
            found, least = float(refined.x), float(refined.fun)
    std = math.exp(found)
    return Noise(std, least, degenerate=std <= floor * (1 + 1e-6))


def mixture_nll(real_MN: Tensor, labels_N: Tensor, noise_std: float, weights_M: Tensor | None = None) -> Tensor:
    """Return ``-log sum_m w_m N(y; v_m, s^2)`` of each row, N in float64; by default ``w_m = 1/M``."""
    return -log_mean_exp(log_density(real_MN, labels_N, noise_std), weights_M)


def log_density(real_MN: Tensor, labels_N: Tensor, noise_std: float) -> Tensor:
    """Return ``log N(y; v_m, s^2)``, M x N in float64."""
    scaled_MN = (real_MN.double() - labels_N.double()) / noise_std
    return -0.5 * scaled_MN**2 - math.log(noise_std) - 0.5 * math.log(2 * math.pi)


def epistemic_std(real_MN: Tensor, weights_M: Tensor | None = None) -> Tensor:
    """Return the standard deviation over the members, N in float64: of these M, not of a population they stand for."""
    if weights_M is None:
        return real_MN.double().std(dim=0, correction=0)
    real_MN = real_MN.double()
    return mean((real_MN - mean(real_MN, weights_M)) ** 2, weights_M).sqrt()


def total_std(real_MN: Tensor, noise_std: float, weights_M: Tensor | None = None) -> Tensor:
    """Return the standard deviation of the mixture, N: ``sqrt(s^2 + epistemic^2)``."""
    return (noise_std**2 + epistemic_std(real_MN, weights_M) ** 2).sqrt()


def half_width(level: float) -> float:
    """Return how many standard deviations the central interval of a Gaussian reaches either way."""
    return float(ndtri(0.5 + level / 2))


def coverage(
    real_MN: Tensor, labels_N: Tensor, noise_std: float, levels: Sequence[float], weights_M: Tensor | None = None
) -> Tensor:
    """Return which labels lie in the central interval at each level, L x N.

    The interval is that of the Gaussian with the mixture's mean and variance, which says more plainly than the
    mixture's quantiles what it is made of.
    """
    error_N = (mean(real_MN.double(), weights_M) - labels_N.double()).abs()
    distance_N = error_N / total_std(real_MN, noise_std, weights_M)
    return distance_N <= torch.tensor([half_width(level) for level in levels], dtype=torch.float64)[:, None]
