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
from raylora.engine.run.evaluation import with_roles
from raylora.engine.run.finished_members import members_digest
from raylora.ensemble.answer_metrics import NORMALIZATIONS, Doubts, describe_answers, describe_doubts, score_answers
from raylora.ensemble.weights import MemberWeights
from raylora.spec import EvaluationSpec, GenerationSpec, RunSpec
from raylora.store.run_store import RunStore

FACTS = "answers.json"
DOUBTS = ("mean_nll", "mean_entropy", "mean_mutual_information", "disagreement")
_SHOWN = 8
"""Answers of the surest and of the least sure that a report shows."""
Records = Sequence[Mapping[str, Any]]


def evaluation_job(
    spec: RunSpec, store: RunStore, speakers: MemberWeights, settings: GenerationSpec, sets: DataSets
) -> AnswerJob:
    """Return what a run's members who speak are asked for its evaluation. Raises: StoreError for a damaged member."""
    return AnswerJob(
        store.uri, speakers.names, members_digest(spec, store, speakers.names), tuple(asked_sets(sets)), settings.rows,
        max_new_tokens=settings.max_new_tokens, each_member=True, weights=speakers.mixed,
    )


def asked_sets(sets: DataSets) -> dict[str, str]:
    """Return the sets that an evaluation asks, with their roles."""
    return {loaded.name: role for loaded, role in with_roles(sets) if role != "validation"}


def describe(
    evaluation: EvaluationSpec, settings: GenerationSpec, seed: int, sets: DataSets, shelf: ShardShelf, members: int
) -> dict[str, Any]:
    """Return what the committed answers of an evaluation are worth. Raises: StoreError for a damaged shard."""
    of_set: dict[str, list[dict[str, Any]]] = {}
    for name, record in shelf.records():
        of_set.setdefault(name, []).append(record)
    worth = _Worth(evaluation, settings, seed, members)
    roles = asked_sets(sets)
    test = of_set[sets.test.name]
    return {
        "settings": settings.model_dump(mode="json"), "members": members,
        "sets": {
            name: {"role": roles[name], **worth.of(records, test if roles[name] == "out_of_distribution" else None)}
            for name, records in of_set.items()
        },
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

    def of(self, records: Records, familiar: Records | None = None) -> dict[str, Any]:
        """Return the ensemble's and its members' numbers on one set, and the answers that are shown to people.

        Args:
            familiar: of the test set, from which a foreign set is to be told.
        """
        voices = [self._voice(records, m) for m in range(-1, self.members)]
        usual = None if familiar is None else [self._voice(familiar, m) for m in range(-1, self.members)]
        references = [record["reference"] for record in records]
        described = [
            self._described(said, references, None if usual is None else usual[n]) for n, said in enumerate(voices)
        ]
        answers = voices[0]
        right_N = self._right(answers, references)
        order = _column(answers, "mean_nll").argsort(stable=True).tolist()
        shown = [*order[:_SHOWN], *order[max(_SHOWN, len(order) - _SHOWN) :]]
        return {
            "ensemble": described[0], "members": described[1:],
            "shown": [{**records[n], "answer": answers[n], "members": None, "right": right_N[n]} for n in shown],
        }

    def _voice(self, records: Records, member: int) -> list[dict[str, Any]]:
        """Return what one member says, or, for -1, the ensemble with the members' disagreement."""
        if member >= 0:
            return [record["members"][member] for record in records]
        return [{**record["answer"], "disagreement": self._disagreement(record)} for record in records]

    def _disagreement(self, record: Mapping[str, Any]) -> float:
        """Return the share of members whose own answer is another than the ensemble's, once normalized."""
        text = self.normalize(record["answer"]["text"])
        return statistics.fmean(self.normalize(one["text"]) != text for one in record["members"])

    def _right(self, answers: Records, references: Sequence[str | None]) -> list[float | None]:
        """Return the first metric of each answer; of one without a reference None."""
        first = self.settings.metrics[0]
        return [
            None if known is None else float(score_answers([one["text"]], [known], [first], self.normalize)[first][0])
            for one, known in zip(answers, references, strict=True)
        ]

    def _described(
        self, said: Records, references: Sequence[str | None], familiar: Records | None
    ) -> dict[str, Any]:
        doubts, known = _doubts(said), [text for text in references if text is not None]
        usual = None if familiar is None else _doubts(familiar)
        asked = (self.evaluation.bootstrap_samples, self.evaluation.confidence, self.seed)
        found = {"answers": len(said), **describe_doubts(doubts, usual, *asked)}
        if len(known) < len(references):
            return found
        scores = score_answers([one["text"] for one in said], known, self.settings.metrics, self.normalize)
        sure_N = _column(said, "nll").neg().exp()
        return found | describe_answers(scores, Doubts(doubts, sure_N), self.evaluation.bins, *asked)


def _doubts(said: Records) -> dict[str, Tensor]:
    return {name: _column(said, name) for name in DOUBTS if all(name in one for one in said)}


def _column(records: Records, name: str) -> Tensor:
    return torch.tensor([float(cast(float, record[name])) for record in records], dtype=torch.float64)
