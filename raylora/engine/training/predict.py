"""What members say about a set: scores of every member for every row, in the rows' own order.

Shapes: M members, N rows or target tokens, C classes, B model rows, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raylora.adapters.base import Adapter
from raylora.data.order import derive_seed
from raylora.data.task import Example, Task, predicts_value
from raylora.engine.model.base import Base
from raylora.engine.model.packed_model import pack_scores
from raylora.engine.training.distillation_loss import read_outputs
from raylora.ensemble.aggregate import mean_probabilities
from raylora.ensemble.gaussian import fit_noise
from raylora.ensemble.metrics import evaluate
from raylora.ensemble.predictions import Predictions, Role
from raylora.spec import EvaluationSpec

_METRICS = ("nll", "accuracy", "brier", "ece")


def predict(
    base: Base, adapter: Adapter, task: Task, stacked: Mapping[str, Tensor], examples: Sequence[Example],
    batch: int, dropout_seeds: Sequence[int] | None = None, report: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Tensor, list[str]]:
    """Return (values, ids): outputs M x N x C, or log-probabilities M x N of every target token.

    Outputs are logits for all but some students (:func:`~raylora.engine.training.distillation_loss.read_outputs`),
    or for C = 1 values.

    Rows of like length are batched together, since padding is computed too, and put back in order.

    Args:
        batch: model rows per forward, shared out among the M members.
        dropout_seeds: keeps the adapter dropout on, one stream per member (Monte-Carlo dropout).
    """
    members = len(next(iter(stacked.values())))
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for indices in _batches(examples, max(1, batch // members)):
        chosen = [examples[i] for i in indices]
        seeds = [derive_seed(s, examples[indices[0]].id) for s in dropout_seeds] if dropout_seeds else None
        _, scores, joined = pack_scores(
            base, adapter, task, stacked, task.collate(chosen, base.tokenizer), seeds
        )
        scores_MN = scores.float().cpu().view(members, len(chosen), *scores.shape[1:])
        mask_BT = joined.target_mask_BT
        mask_BT = mask_BT.cpu() if task.num_classes is None and mask_BT is not None else None
        for position, index in enumerate(indices):
            found[index] = _row(scores_MN[:, position], mask_BT, position, chosen[position].id)
        report(len(found), len(examples))
    rows = [found[i] for i in range(len(examples))]
    join = torch.stack if task.num_classes is not None else torch.cat
    return join([values for values, _ in rows], dim=1), [row_id for _, ids in rows for row_id in ids]


def predict_set(
    base: Base, adapter: Adapter, task: Task, stacked: Mapping[str, Tensor], examples: Sequence[Example],
    name: str, role: Role, batch: int, dropout_seeds: Sequence[int] | None = None,
) -> Predictions:
    """Return checked predictions of one named set."""
    values, ids = predict(base, adapter, task, stacked, examples, batch, dropout_seeds)
    labels = [example.label for example in examples if example.label is not None]
    labeled = task.num_classes is not None and len(labels) == len(examples)
    if predicts_value(task):
        return Predictions(
            name=name, role=role, ids=ids, labels_N=torch.tensor(labels) if labeled else None, real_MN=values[..., 0]
        )
    values, expected_MN = read_outputs(task, values)
    key: Any = "logits_MNC" if task.num_classes is not None else "token_logprobs_MN"
    return Predictions(
        name=name, role=role, ids=ids, labels_N=torch.tensor(labels) if labeled else None, **{key: values},
        expected_entropy_MN=expected_MN,
    )


def validation_metrics(
    base: Base, adapter: Adapter, task: Task, stacked: Mapping[str, Tensor], examples: Sequence[Example],
    evaluation: EvaluationSpec,
) -> list[dict[str, float]]:
    """Return each member's metrics on the validation split.

    Only ``nll`` for language modeling; ``nll`` and ``rmse`` for a regression, the former with the noise that fits the
    member best on this very split, so that the two rise and fall together.
    """
    found = predict_set(base, adapter, task, stacked, examples, "validation", "validation", evaluation.batch)
    if found.is_language:
        return [{"nll": -float(row_N.double().mean())} for row_N in found.values]
    labels_N = found.labels()
    if found.is_real:
        return [_value_metrics(own_N, labels_N) for own_N in found.values]
    return [
        evaluate(mean_probabilities(logits_NC[None]), labels_N, evaluation.bins, _METRICS)
        for logits_NC in found.logits()
    ]


def _value_metrics(value_N: Tensor, labels_N: Tensor) -> dict[str, float]:
    error_N = value_N.double() - labels_N.double()
    return {"nll": fit_noise(value_N[None], labels_N).nll, "rmse": float((error_N**2).mean().sqrt())}


def _batches(examples: Sequence[Example], rows: int) -> Iterator[list[int]]:
    by_length = sorted(range(len(examples)), key=lambda i: (-max(map(len, examples[i].sequences)), i))
    for start in range(0, len(by_length), rows):
        yield by_length[start : start + rows]


def _row(scores_M: Tensor, mask_BT: Tensor | None, position: int, example_id: str) -> tuple[Tensor, list[str]]:
    """Return one row's scores, and its id once; for language modeling once per target token."""
    if mask_BT is None:
        return scores_M, [example_id]
    kept_T = mask_BT[position].clone()
    kept_T[0] = False  # nothing stands before the first token, so nothing predicts it
    return scores_M[:, kept_T], [example_id.rpartition("#")[0]] * int(kept_T.sum())
