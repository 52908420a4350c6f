"""Which classes an ensemble takes for which, and which of its wrong answers it was surest of.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raylora.records import ClassScores

MOST_CLASSES = 20
"""With more classes a matrix is neither read nor small: it is left out."""
MOST_ROWS = 10
"""How many single rows are recorded of a set."""


def confusion_matrix(answers_N: Tensor, labels_N: Tensor, classes: int) -> Tensor:
    """Return how often class i (row) was answered with class j (column), C x C in int64."""
    cells_N = labels_N.long() * classes + answers_N.long()
    return torch.bincount(cells_N, minlength=classes**2).view(classes, classes)


def class_scores(confusion_CC: Tensor) -> list[ClassScores]:
    """Return precision, recall, F1 and support of each class; None where a share would be one of nothing."""
    right_C = confusion_CC.diagonal().tolist()
    true_C, said_C = confusion_CC.sum(dim=1).tolist(), confusion_CC.sum(dim=0).tolist()
    return [
        {
            "precision": _share(right, said),
            "recall": _share(right, true),
            "f1": _share(2 * right, true + said),
            "support": true,
        }
        for right, true, said in zip(right_C, true_C, said_C, strict=True)
    ]


def largest(scores_N: Tensor, allowed_N: Tensor, count: int = MOST_ROWS) -> list[int]:
    """Return the allowed rows with the largest scores, largest first; of equal ones the first in the set."""
    # Twelve digits: the order in which members are summed must not decide between rows.
    kept_N = scores_N.double().round(decimals=12).masked_fill(~allowed_N, -torch.inf)
    order_N = torch.sort(kept_N, descending=True, stable=True).indices
    return order_N[: min(count, int(allowed_N.sum()))].tolist()


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
