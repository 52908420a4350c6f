"""One temperature, fitted on the validation split, that makes confidences honest.

An ensemble has one T shared by its members: each member's logits are divided by T, then averaged, and T minimizes the
NLL of that pooled prediction. (A T per member would make each member honest and the average of them underconfident.)

Shapes: M members, N rows, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from raylora.ensemble.aggregate import aggregate_logits
from raylora.ensemble.groups import Group
from raylora.ensemble.metrics import score_rows
from raylora.ensemble.predictions import Predictions
from raylora.ensemble.threads import one_thread
from raylora.errors import DataError

LOWEST, HIGHEST = 0.05, 20.0


@dataclass(frozen=True)
class Temperature:
    """The fitted temperature and the validation NLL without and with it."""

    value: float
    nll_before: float
    nll_after: float
    degenerate: bool
    """The split could not tell: NLL fell all the way to the edge of the range, so T stays 1."""


def fit_temperature(
    logits_MNC: Tensor, labels_N: Tensor, rule: str = "mean_probabilities", name: str = "validation",
    weights_M: Tensor | None = None,
) -> Temperature:
    """Return the T in [0.05, 20] with the least NLL of the pooled prediction; DataError as in ``score_rows``.

    A split that is predicted perfectly wants T -> 0, one that is predicted worse than by chance wants T -> infinity.
    Neither optimum would survive new data, so both leave T = 1 and say so.
    """
    from scipy.optimize import minimize_scalar  # slow to import, which a prediction need not wait for

    def nll(log_temperature: float) -> float:
        log_probs_NC = aggregate_logits(logits_MNC, rule, math.exp(log_temperature), weights_M)
        return float(score_rows(log_probs_NC, labels_N, name).nll_N.mean())

    # The pooled NLL need not have one valley, so a coarse grid finds the deepest before the search refines it.
    grid = np.linspace(math.log(LOWEST), math.log(HIGHEST), 31)
    best = int(np.argmin([nll(point) for point in grid]))
    before = nll(0.0)
    if best in (0, len(grid) - 1):
        return Temperature(1.0, before, before, degenerate=True)
    found = minimize_scalar(nll, bounds=(grid[best - 1], grid[best + 1]), method="bounded", options={"xatol": 1e-6})
    if found.fun >= before:
        return Temperature(1.0, before, before, degenerate=False)
    return Temperature(math.exp(found.x), before, float(found.fun), degenerate=False)


def tempered(group: Group) -> tuple[list[Predictions], Temperature]:
    """Return a model's predictions at the temperature of its validation rows, and that temperature.

    Guo et al., arXiv 1706.04599, section 4.2. Of one model the NLL is convex in 1/T, so that the search, which ends
    when it knows log T to 1e-6, finds the least there is. Where the rows do not tell, T is 1.

    Args:
        group: one member's predictions of classes; a set with the role ``validation`` among them.

    Raises:
        DataError: there is no validation set, or its labels fit no class.
    """
    validation = next((part for part in group if part.role == "validation"), None)
    if validation is None:
        raise DataError("there are no validation rows to fit a temperature on", "predict them too")
    with one_thread():
        fitted = fit_temperature(validation.values, validation.labels(), name=validation.name)
    return [
        replace(part, values=(part.values.double() / fitted.value).float(), expected_entropy_MN=None) for part in group
    ], fitted
