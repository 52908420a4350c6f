"""Bootstrap intervals over rows: how much a number would move on another sample of the same data.

Draws depend on the seed and the number of rows alone, so two models scored on one set are compared on the same
resamples, and the interval of their difference is a paired one. Training seeds are not resampled.

Shapes: S draws, N rows, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from raylora.ensemble.metrics import CLASS_METRICS, RowScores, draw_metrics

CHUNK = 2_000_000
"""Row indices held at once: bounds the memory of many resamples of a large set."""


Kernel = Callable[[Tensor], dict[str, Tensor]]
"""Row indices S x N -> each metric over those rows, S."""


def row_draws(rows: int, samples: int, seed: int) -> Iterator[Tensor]:
    """Yield chunks of row indices drawn with replacement, S x N, ``samples`` in all."""
    generator = np.random.default_rng([seed, rows])
    step = max(1, CHUNK // rows)
    for start in range(0, samples, step):
        yield torch.from_numpy(generator.integers(0, rows, size=(min(step, samples - start), rows)))


def bootstrap_metrics(
    scores: RowScores, bins: int, samples: int, seed: int, names: Sequence[str] = CLASS_METRICS
) -> dict[str, Tensor]:
    """Return each named metric over ``samples`` resamples of the rows, S."""
    return resampled(lambda draws_SN: draw_metrics(scores, draws_SN, bins, names), len(scores.nll_N), samples, seed)


def resampled(kernel: Kernel, rows: int, samples: int, seed: int) -> dict[str, Tensor]:
    """Return each metric of a kernel over ``samples`` resamples of the rows, S."""
    chunks = [kernel(draws_SN) for draws_SN in row_draws(rows, samples, seed)]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def bootstrap_token_nll(nll_N: Tensor, ids: Sequence[str], samples: int, seed: int) -> Tensor:
    """Return the mean token NLL over resamples of whole documents, S: tokens of one text are not independent."""
    document_N = torch.from_numpy(np.unique(np.asarray(ids), return_inverse=True)[1])
    total_D = torch.bincount(document_N, weights=nll_N)
    count_D = torch.bincount(document_N).to(torch.float64)
    chunks = [
        total_D[draws_SD].sum(dim=1) / count_D[draws_SD].sum(dim=1)
        for draws_SD in row_draws(len(total_D), samples, seed)
    ]
    return torch.cat(chunks)


def interval(values_S: Tensor, confidence: float) -> list[float]:
    """Return the central percentile interval ``[low, high]`` of resampled values."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values_S.numpy(), [tail, 1 - tail])
    return [float(low), float(high)]


def interval_if_defined(values_S: Tensor, confidence: float) -> list[float] | None:
    """Return the interval, or None if some resample had no such number: a correlation of equal values is none."""
    return None if bool(values_S.isnan().any()) else interval(values_S, confidence)
