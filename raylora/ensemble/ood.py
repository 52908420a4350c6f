"""Telling foreign inputs from familiar ones by how unsure the ensemble is.

Every score is oriented so that larger means more foreign; an AUROC of 1.0 is perfect detection, 0.5 is guessing.

Shapes: M members, N rows (of the test set), K rows (of the foreign set), S draws, U distinct scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from raylora.ensemble.aggregate import aggregate_logits
from raylora.ensemble.bootstrap import row_draws
from raylora.ensemble.uncertainty import decompose
from raylora.records import Histograms

SCORES = ("max_probability", "predictive_entropy", "mutual_information")


def foreign_scores(
    logits_MNC: Tensor, rule: str, expected_entropy_MN: Tensor | None = None, weights_M: Tensor | None = None
) -> dict[str, Tensor]:
    """Return each score per row, N; mutual information is left out for one ordinary member, where it is always zero."""
    parts = decompose(logits_MNC, expected_entropy_MN=expected_entropy_MN, weights_M=weights_M)
    scores = {
        "max_probability": 1 - aggregate_logits(logits_MNC, rule, weights_M=weights_M).exp().max(dim=1).values,
        "predictive_entropy": parts.predictive_entropy_N,
        "mutual_information": parts.mutual_information_N,
    }
    if logits_MNC.shape[0] == 1 and expected_entropy_MN is None:
        del scores["mutual_information"]
    # Twelve digits, as for confidences: the order in which members are summed must not break ties.
    return {name: values_N.round(decimals=12) for name, values_N in scores.items()}


def auroc(familiar_N: Tensor, foreign_K: Tensor) -> float:
    """Return the probability that a foreign row scores above a familiar one, ties counted half."""
    from sklearn.metrics import roc_auc_score  # a second to import, which a prediction need not wait for

    truth = np.r_[np.zeros(len(familiar_N)), np.ones(len(foreign_K))]
    return float(roc_auc_score(truth, torch.cat([familiar_N, foreign_K]).numpy()))


def bootstrap_auroc(familiar_N: Tensor, foreign_K: Tensor, samples: int, seed: int) -> Tensor:
    """Return the AUROC over resamples of both sets, S."""
    # Equally large sets would otherwise be resampled with one and the same draw.
    pairs = zip(_draw_all(len(familiar_N), samples, seed), _draw_all(len(foreign_K), samples, seed + 1), strict=True)
    _, code = torch.unique(torch.cat([familiar_N, foreign_K]), return_inverse=True)
    distinct = int(code.max()) + 1
    familiar_code_N, foreign_code_K = code[: len(familiar_N)], code[len(familiar_N) :]
    values = []
    for draw_N, draw_K in pairs:
        familiar_U = torch.bincount(familiar_code_N[draw_N], minlength=distinct).double()
        foreign_U = torch.bincount(foreign_code_K[draw_K], minlength=distinct).double()
        below_U = familiar_U.cumsum(0) - familiar_U / 2
        values.append((foreign_U * below_U).sum() / (len(familiar_N) * len(foreign_K)))
    return torch.stack(values)


def _draw_all(rows: int, samples: int, seed: int) -> Iterator[Tensor]:
    return (draw_N for draws_SN in row_draws(rows, samples, seed) for draw_N in draws_SN)


def histograms(familiar_N: Tensor, foreign_K: Tensor, bins: int = 30) -> Histograms:
    """Return shared bin edges and, for either set, the share of its rows in each bin."""
    both = torch.cat([familiar_N, foreign_K]).numpy()
    edges = np.linspace(both.min(), max(both.max(), both.min() + 1e-9), bins + 1)
    shares = [np.histogram(part.numpy(), bins=edges)[0] / len(part) for part in (familiar_N, foreign_K)]
    return {"edges": edges.tolist(), "test": shares[0].tolist(), "foreign": shares[1].tolist()}
