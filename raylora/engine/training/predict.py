"""What members say about a set: scores of every member for every row, in the rows' own order.

Shapes: M members, N rows or target tokens, C classes, B model rows, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from raylora.adapters.packed import member_count
from raylora.data.order import derive_seed
from raylora.data.task import CutsRows, Example, Task
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.training.distillation_loss import read_outputs
from raylora.ensemble.outputs import output_of
from raylora.ensemble.predictions import Predictions, Role
from raylora.spec import EvaluationSpec

OnRows = Callable[[int, int], None]


def predict(
    model: PackedModel, stacked: Mapping[str, Tensor], examples: Sequence[Example],
    batch: int, dropout_seeds: Sequence[int] | None = None, report: OnRows = lambda done, of: None,
) -> tuple[Tensor, list[str]]:
    """Return (values, ids): outputs M x N x C, or log-probabilities M x N of every target token.

    Outputs are logits for all but some students (:func:`~raylora.engine.training.distillation_loss.read_outputs`),
    or for C = 1 values.

    Rows of like length are batched together, since padding is computed too, and put back in order.

    Args:
        batch: model rows per forward, shared out among the M members.
        report: told after each batch how many rows are done, and of how many.
        dropout_seeds: keeps the adapter dropout on, one stream per member (Monte-Carlo dropout).
    """
    members, output = member_count(stacked), output_of(model.task.output)
    document = model.task.document if isinstance(model.task, CutsRows) else str
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for indices in batches_by_length(examples, max(1, batch // members)):
        chosen = [examples[i] for i in indices]
        seeds = [derive_seed(s, examples[indices[0]].id) for s in dropout_seeds] if dropout_seeds else None
        scores, joined = model.scores(stacked, model.task.collate(chosen, model.base.tokenizer), seeds)
        scores_MN = scores.float().cpu().view(members, len(chosen), *scores.shape[1:])
        mask_BT = joined.target_mask_BT
        mask_BT = mask_BT.cpu() if output.per_token and mask_BT is not None else None
        for position, index in enumerate(indices):
            found[index] = _row(scores_MN[:, position], mask_BT, position, document(chosen[position].id))
        report(len(found), len(examples))
    rows = [found[i] for i in range(len(examples))]
    join = torch.cat if output.per_token else torch.stack
    return join([values for values, _ in rows], dim=1), [row_id for _, ids in rows for row_id in ids]


def predict_set(
    model: PackedModel, stacked: Mapping[str, Tensor], examples: Sequence[Example],
    name: str, role: Role, batch: int, dropout_seeds: Sequence[int] | None = None,
    report: OnRows = lambda done, of: None,
) -> Predictions:
    """Return checked predictions of one named set."""
    values, ids = predict(model, stacked, examples, batch, dropout_seeds, report)
    values, expected_MN = read_outputs(model.task, values)
    return as_predictions(model.task, examples, name, role, values, ids, expected_MN)


def as_predictions(
    task: Task, examples: Sequence[Example], name: str, role: Role, values: Tensor, ids: Sequence[str] | None = None,
    expected_entropy_MN: Tensor | None = None,
) -> Predictions:
    """Return checked predictions of one named set from what members say of its rows.

    Args:
        ids: where a row is answered token by token, one per token; by default one per row.
    """
    labels = [example.label for example in examples if example.label is not None]
    output = output_of(task.output)
    labeled = not output.per_token and len(labels) == len(examples)
    return output.predictions(
        name=name, role=role, ids=[example.id for example in examples] if ids is None else list(ids), values=values,
        labels_N=torch.tensor(labels) if labeled else None, expected_entropy_MN=expected_entropy_MN,
    )


def validation_metrics(
    model: PackedModel, stacked: Mapping[str, Tensor], examples: Sequence[Example],
    evaluation: EvaluationSpec,
) -> list[dict[str, float]]:
    """Return each member's metrics on the validation split, those that the task's output names."""
    found = predict_set(model, stacked, examples, "validation", "validation", evaluation.batch)
    return output_of(model.task.output).validation_metrics(found, evaluation)


def batches_by_length(examples: Sequence[Example], rows: int) -> Iterator[list[int]]:
    """Yield the indices of so many rows of like length at a time, the longest first."""
    by_length = sorted(range(len(examples)), key=lambda i: (-max(map(len, examples[i].sequences)), i))
    for start in range(0, len(by_length), rows):
        yield by_length[start : start + rows]


def _row(scores_M: Tensor, mask_BT: Tensor | None, position: int, row_id: str) -> tuple[Tensor, list[str]]:
    """Return one row's scores, and its id once, or once per target token."""
    if mask_BT is None:
        return scores_M, [row_id]
    kept_T = mask_BT[position].clone()
    kept_T[0] = False  # nothing stands before the first token, so nothing predicts it
    return scores_M[:, kept_T], [row_id] * int(kept_T.sum())
