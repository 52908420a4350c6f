"""Ensemble selection: members are added one by one, with replacement, while the mixture's validation NLL falls.

Caruana, Niculescu-Mizil, Crew and Ksikes, "Ensemble selection from libraries of models" (ICML 2004). It begins with the
best single member, and where no addition lowers the NLL it ends, so that the NLL falls with every step.

Shapes: M members.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raylora.ensemble.objectives import Objective

LEAST_GAIN = 1e-12
"""By what an addition must lower the NLL, as a share of it: rounding must not look like a gain."""


@dataclass(frozen=True)
class Step:
    """One addition."""

    index: int
    """Of the member among those that are chosen from."""
    nll: float
    """Of the mixture with it, on the validation rows."""
    member: str = ""
    """Its name."""


def select_greedily(objective: Objective, size: int) -> list[Step]:
    """Return at most ``size`` additions, at least one; of members that do equally well the first is added."""
    count_M = torch.zeros(objective.members, dtype=torch.float64)
    found: list[Step] = []
    while len(found) < size:
        tried = []
        for m in range(objective.members):
            count_M[m] += 1
            tried.append(objective.nll(count_M / (len(found) + 1)))
            count_M[m] -= 1
        least = min(tried)
        best = next(m for m, nll in enumerate(tried) if nll <= least + LEAST_GAIN * max(1.0, abs(least)))
        if found and not tried[best] < found[-1].nll - LEAST_GAIN * max(1.0, abs(found[-1].nll)):
            break
        count_M[best] += 1
        found.append(Step(best, tried[best]))
    return found
