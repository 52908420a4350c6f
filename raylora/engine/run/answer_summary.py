"""What a run's answers to its evaluation sets are worth: the content of ``answers.json``.

Shapes: N answers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from raylora.data.sets import DataSets
from raylora.engine.run.answer_job import AnswerJob
from raylora.engine.run.answering import ShardShelf
from raylora.engine.run.evaluation import evaluated_sets
from raylora.engine.run.finished_members import members_digest
from raylora.ensemble.answer_metrics import NORMALIZATIONS, Doubts, describe_answers, score_answers
from raylora.spec import EvaluationSpec, GenerationSpec, RunSpec
from raylora.store.run_store import RunStore

FACTS = "answers.json"
DOUBTS = ("mean_nll", "mean_entropy", "mean_mutual_information", "disagreement")
_SHOWN = 8
"""Answers of the surest and of the least sure that a report shows."""
Records = Sequence[Mapping[str, Any]]


def evaluation_job(
    spec: RunSpec, store: RunStore, members: Sequence[str], settings: GenerationSpec, sets: DataSets
) -> AnswerJob:
    """Return what finished members of a run are asked for its evaluation. Raises: StoreError for a damaged member."""
    return AnswerJob(
        store.uri, tuple(members), members_digest(spec, store, members), tuple(asked_sets(sets)), settings.rows,
        max_new_tokens=settings.max_new_tokens, each_member=True,
    )


def asked_sets(sets: DataSets) -> dict[str, str]:
    """Return the sets that an evaluation asks, with their roles."""
    return {loaded.name: role for loaded, role in evaluated_sets(sets) if role != "validation"}


def describe(
    evaluation: EvaluationSpec, settings: GenerationSpec, seed: int, sets: DataSets, shelf: ShardShelf, members: int
) -> dict[str, Any]:
    """Return what the committed answers of an evaluation are worth. Raises: StoreError for a damaged shard."""
    of_set: dict[str, list[dict[str, Any]]] = {}
    for name, record in shelf.records():
        of_set.setdefault(name, []).append(record)
    worth = _Worth(evaluation, settings, seed, members)
    roles = asked_sets(sets)
    return {
        "settings": settings.model_dump(mode="json"), "members": members,
        "sets": {name: {"role": roles[name], **worth.of(records)} for name, records in of_set.items()},
    }


def numbers_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an ``answers.json`` that stands in ``metrics.json``: all but the answers that are shown."""
    sets = {name: {key: value for key, value in one.items() if key != "shown"} for name, one in found["sets"].items()}
    return {**found, "sets": sets}


class _Worth:
    """Scores and describes answers as one evaluation's settings say."""

    def __init__(self, evaluation: EvaluationSpec, settings: GenerationSpec, seed: int, members: int) -> None:
        self.evaluation, self.settings, self.seed, self.members = evaluation, settings, seed, members
        self.normalize = NORMALIZATIONS[settings.normalize]

    def of(self, records: Records) -> dict[str, Any]:
        """Return the ensemble's and its members' numbers on one set, and the answers that are shown to people."""
        references = [record["reference"] for record in records]
        answers = [{**record["answer"], "disagreement": self._disagreement(record)} for record in records]
        members = [self._described([record["members"][m] for record in records], references)
                   for m in range(self.members)]
        first = self.settings.metrics[0]
        right_N = score_answers([one["text"] for one in answers], references, [first], self.normalize)[first]
        order = _column(answers, "mean_nll").argsort(stable=True).tolist()
        shown = [*order[:_SHOWN], *order[max(_SHOWN, len(order) - _SHOWN) :]]
        return {
            "ensemble": self._described(answers, references), "members": members,
            "shown": [{**records[n], "answer": answers[n], "members": None, "right": float(right_N[n])} for n in shown],
        }

    def _disagreement(self, record: Mapping[str, Any]) -> float:
        """Return the share of members whose own answer is another than the ensemble's, once normalized."""
        text = self.normalize(record["answer"]["text"])
        return statistics.fmean(self.normalize(one["text"]) != text for one in record["members"])

    def _described(self, said: Records, references: Sequence[str]) -> dict[str, Any]:
        scores = score_answers([one["text"] for one in said], references, self.settings.metrics, self.normalize)
        sure_N = _column(said, "nll").neg().exp()
        doubts = {name: _column(said, name) for name in DOUBTS if all(name in one for one in said)}
        evaluation = self.evaluation
        return describe_answers(scores, Doubts(doubts, sure_N), evaluation.bins, evaluation.bootstrap_samples,
                                evaluation.confidence, self.seed)


def _column(records: Records, name: str) -> Tensor:
    return torch.tensor([float(cast(float, record[name])) for record in records], dtype=torch.float64)
