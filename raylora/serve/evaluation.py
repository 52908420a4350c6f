"""How right a finished ensemble's answers are: it answers its own evaluation sets, and is compared with references.

What is asked is what stands before a row's last answer, token by token as in training; that answer is the reference.
The answers are committed shard by shard, so that what was cut off goes on, and the numbers go into ``answers.json``.

Shapes: M members, N rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from raylora.data.sets import LoadedSet
from raylora.data.task import Asks, Example
from raylora.engine.generation.decoder import Sampling
from raylora.engine.generation.generator import Generator, agreement_of, text_of
from raylora.engine.run.evaluation import evaluated_sets
from raylora.engine.training.inputs import sets_of
from raylora.ensemble.answer_metrics import Doubts, check_metrics, describe_answers, score_answers
from raylora.errors import UsageError
from raylora.serve.predictor import LoadedEnsemble, load_ensemble
from raylora.store.run_store import RunStore

FACTS = "answers.json"
SHARD_ROWS = 32
_SHOWN = 8
"""Answers of the surest and of the least sure that a report shows."""
DOUBTS = ("mean_nll", "mean_entropy", "mean_mutual_information", "disagreement")


@dataclass(frozen=True)
class AnswerSettings:
    """What is answered and how it is scored."""

    metrics: tuple[str, ...] = ("exact_match",)
    """By the first one an answer is right or wrong."""
    max_new_tokens: int = 64
    rows: int = 200
    """Of each set, at most; its first ones."""

    def key(self) -> str:
        """Return what tells answers written under other settings apart; metrics are read off them afterwards."""
        return hashlib.sha256(json.dumps([self.max_new_tokens, SHARD_ROWS]).encode()).hexdigest()[:8]


def evaluate_answers(
    run: str, settings: AnswerSettings, on_row: Callable[[str, int, int], None] = lambda name, done, of: None,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Write what the ensemble and each member answer to every evaluation set, greedily, and return what it is worth.

    Args:
        on_row: told of each set how many rows are answered, of how many.

    Raises:
        UsageError: the run's rows have no answers, or an unknown metric.
        DataError: a prompt with its answer is longer than the model reads.
    """
    check_metrics(settings.metrics)
    ensemble = load_ensemble(run, allow_missing=allow_missing)
    store = RunStore(run)
    task = ensemble.task
    if not isinstance(task, Asks) or getattr(task.spec, "train_on", "") != "completion":
        raise UsageError(f"a {task.spec.kind} run has no answers to compare with",
                         "task.kind instruction with train_on: completion has")
    sets = sets_of(ensemble.spec, task, ensemble.base.tokenizer, store)
    found: dict[str, Any] = {"settings": asdict(settings), "members": ensemble.members, "sets": {}}
    for loaded, role in evaluated_sets(sets):
        if role != "validation":
            records = list(_answered(ensemble, store, settings, loaded, on_row))
            found["sets"][loaded.name] = {"role": role, **_described(ensemble, settings, records)}
    store.write_json(FACTS, found)
    return found


def _answered(
    ensemble: LoadedEnsemble, store: RunStore, settings: AnswerSettings, loaded: LoadedSet,
    on_row: Callable[[str, int, int], None],
) -> Iterator[dict[str, Any]]:
    """Yield a record per row, from what is committed as far as it is."""
    examples = loaded.examples[: settings.rows]
    writer = ensemble.generator()
    for start in range(0, len(examples), SHARD_ROWS):
        chosen = examples[start : start + SHARD_ROWS]
        on_row(loaded.name, start, len(examples))
        content = hashlib.sha256(json.dumps([[e.id, e.sequences] for e in chosen]).encode()).hexdigest()[:12]
        folder = f"answers/{settings.key()}/{loaded.name}/{start:06d}-{content}"
        if not store.has_result(folder):
            records = _write(writer, chosen, settings)
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            store.commit_result(folder, {"answers.jsonl": lines.encode()})
        yield from map(json.loads, store.load_result(folder)["answers.jsonl"].decode().splitlines())
    on_row(loaded.name, len(examples), len(examples))


def _write(writer: Generator, examples: Sequence[Example], settings: AnswerSettings) -> list[dict[str, Any]]:
    asked = [list(example.sequences[0][: example.target_ranges[-1][0]]) for example in examples]
    names = [example.id for example in examples]
    voices = [
        writer.written(asked, names, Sampling(settings.max_new_tokens, each_member=each)) for each in (False, True)
    ]
    return [
        {
            "id": example.id, "prompt": text_of(writer.tokenizer, prompt), "reference": _reference(writer, example),
            "answer": {**answer.record(), "disagreement": 1 - agreement_of(answer, own)},
            "members": [{key: value for key, value in one.record().items() if key != "tokens"} for one in own],
        }
        for example, prompt, (answer,), own in zip(examples, asked, *voices, strict=True)
    ]


def _reference(writer: Generator, example: Example) -> str:
    first, last = example.target_ranges[-1]
    return text_of(writer.tokenizer, example.sequences[0][first:last])


def _described(
    ensemble: LoadedEnsemble, settings: AnswerSettings, records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the ensemble's and its members' numbers, and the answers that are shown to people."""
    references = [record["reference"] for record in records]
    answers = [record["answer"] for record in records]
    evaluation = ensemble.spec.evaluation

    def described(said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        scores = score_answers([one["text"] for one in said], references, settings.metrics)
        sure_N = _column(said, "nll").neg().exp()
        doubts = {name: _column(said, name) for name in DOUBTS if all(name in one for one in said)}
        return describe_answers(scores, Doubts(doubts, sure_N), evaluation.bins, evaluation.bootstrap_samples,
                                evaluation.confidence, ensemble.spec.data.seed)

    members = [described([record["members"][m] for record in records]) for m in range(ensemble.members)]
    right_N = score_answers([one["text"] for one in answers], references, settings.metrics[:1])[settings.metrics[0]]
    order = _column(answers, "mean_nll").argsort(stable=True).tolist()
    shown = [*order[:_SHOWN], *order[max(_SHOWN, len(order) - _SHOWN) :]]
    return {
        "ensemble": described(answers), "members": members,
        "shown": [{**records[n], "members": None, "right": float(right_N[n])} for n in shown],
    }


def _column(records: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    return torch.tensor([float(cast(float, record[name])) for record in records], dtype=torch.float64)
