"""The teacher answers every row that its student is taught on, and the student learns those answers it may trust.

Answers are written as shards of a run, by as many workers as there are; what is kept of them is then committed once,
beside targets, and read by every worker of the student.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylora.data.answered import prompt_length
from raylora.data.task import Example, Task
from raylora.distill import AnsweredRows, AsksTeacher, Keys, LearnsAnswers, Loss
from raylora.engine.generation.questions import answers_obstacle, check_lengths
from raylora.engine.model.checkpoint import load_config, load_tokenizer
from raylora.engine.run.answer_job import AnswerJob
from raylora.engine.run.answer_plan import FACTS, AnswerPlan, plan_answers
from raylora.engine.run.finished_members import members_digest
from raylora.engine.run.plan_run import Prepared
from raylora.engine.training.distillation_loss import targets_uri
from raylora.engine.training.inputs import ANSWERED, sets_of
from raylora.ensemble.answer_metrics import normalized
from raylora.ensemble.weights import MemberWeights
from raylora.errors import SpecError
from raylora.records import TargetFacts
from raylora.spec import AnswersSpec, DistillSpec, RunSpec
from raylora.store.run_store import RunStore


@dataclass(frozen=True)
class TaughtAnswers:
    """Checked and ready: how the teacher answers, and which of its answers are learned."""

    plan: AnswerPlan
    settings: AnswersSpec
    key: str
    """Of the folder of what is kept, beside targets."""
    digest: str
    """Of the teacher."""
    content_of: Mapping[str, str]
    """Of every row that is asked, in order: a hash of what the teacher reads."""
    max_length: int
    """Of a student's row, in tokens."""

    @property
    def store(self) -> RunStore:
        """Where what is kept lies."""
        return RunStore(targets_uri(self.plan.job.run_uri, self.key))

    @property
    def is_done(self) -> bool:
        """Whether it is known what the student learns."""
        return self.store.has_result(ANSWERED)

    def conclude(self) -> None:
        """Choose from the answers, all of which are there, and commit the choice. Raises: StoreError."""
        records = [record for _, record in self.plan.shelf().records()]
        examples = [example for shard in self.plan.shards.values() for example in shard.examples]
        left_out = self.left_out(records, examples)
        answers = {record["id"]: tokens_of(record) for record in records if record["id"] not in left_out}
        keys = Keys(list(self.content_of), list(self.content_of.values()))
        self.store.commit_result(ANSWERED, AnsweredRows(keys, self.digest, answers, left_out).to_files())

    def left_out(self, records: Sequence[Mapping[str, Any]], examples: Sequence[Example]) -> dict[str, str]:
        """Return the rows whose answers are not learned, and why: cut off, too long, or not sure enough."""
        found: dict[str, str] = {}
        kept = []
        for record, example in zip(records, examples, strict=True):
            if record["answer"]["finish"] == "length":
                found[record["id"]] = "unfinished"
            elif prompt_length(example) + len(record["answer"]["tokens"]) > self.max_length:
                found[record["id"]] = "too_long"
            elif self.settings.min_agreement and agreement(record) < self.settings.min_agreement:
                found[record["id"]] = "unsure"
            else:
                kept.append(record)
        surest_first = sorted(kept, key=lambda record: float(record["answer"]["mean_nll"]))
        unsure = surest_first[math.ceil(self.settings.surest * len(kept)) :]
        return found | {record["id"]: "unsure" for record in unsure}

    def facts(self) -> TargetFacts:
        """Return who answered how many rows, and how many of the answers are learned."""
        rows = AnsweredRows.read(self.store.load_result(ANSWERED))
        made = self.plan.store.read_json(FACTS) or {}
        return {
            "rows": len(rows.keys), "members": list(self.plan.job.members), "answers": len(rows.answers),
            "left_out": rows.counts, **({"made_s": made["made_s"]} if "made_s" in made else {}),
        }


def taught_answers(
    prepared: Prepared, settings: DistillSpec, teachers: MemberWeights, digest: str, content_of: Mapping[str, str]
) -> TaughtAnswers | None:
    """Return how a finished run answers the rows that its student is taught on, or None where it does not.

    Raises:
        DataError: a row with its answer is longer than the teacher reads.
    """
    if settings.answers is None:
        return None
    spec, asked = prepared.spec, settings.answers
    job = AnswerJob(
        prepared.store.uri, teachers.names, members_digest(spec, prepared.store, teachers.names), ("train",),
        transfer=settings.transfer, max_new_tokens=asked.max_new_tokens, temperature=asked.temperature,
        top_p=asked.top_p, seed=asked.seed, each_member=asked.min_agreement > 0,
        weights=teachers.mixed,
    )
    max_length = (settings.student.task or spec.task).max_length
    parts = [digest, job.key(), list(content_of.items()), asked.surest, asked.min_agreement, max_length]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return TaughtAnswers(plan_answers(prepared, job), asked, key, digest, content_of, max_length)


def check_answering(settings: DistillSpec, task: Task, loss: Loss) -> None:
    """Refuse answers that nobody would learn, or that nobody writes. Raises: SpecError."""
    if settings.answers is None:
        if isinstance(loss, LearnsAnswers):
            raise SpecError(
                "distill.loss: answers learns what the teacher writes, and distill.answers is not there",
                "add `answers: {}` to distill, or use gkd or topk_kl",
            )
        return
    if not isinstance(loss, LearnsAnswers | AsksTeacher):
        raise SpecError(
            f"distill.answers: {settings.loss.kind} learns from targets that are made for the rows' own answers",
            "use distill.loss.kind answers or gkd, or leave distill.answers out",
        )
    obstacle = answers_obstacle(task)
    if obstacle:
        raise SpecError(
            f"distill.answers: {obstacle}", "task.kind instruction with train_on: completion has prompts to be answered"
        )


def check_prompts(spec: RunSpec, settings: DistillSpec, task: Task) -> None:
    """Refuse rows that with an answer are longer than the teacher reads, before it is trained. Raises: DataError."""
    if settings.answers is None:
        return
    tokenizer = load_tokenizer(spec.base, task)
    sets = sets_of(spec, task, tokenizer, RunStore.for_spec(spec), settings.transfer, asks=True)
    check_lengths(
        load_config(spec.base), tokenizer, "distill.answers.max_new_tokens: train", sets.train.examples,
        settings.answers.max_new_tokens,
    )


def tokens_of(record: Mapping[str, Any]) -> Sequence[int]:
    """Return an answer's tokens, with the one that ended it."""
    return tuple(token["id"] for token in record["answer"]["tokens"])


def agreement(record: Mapping[str, Any]) -> float:
    """Return the share of members whose own answer is the ensemble's, once normalized."""
    text = normalized(record["answer"]["text"])
    return statistics.fmean(normalized(one["text"]) == text for one in record["members"])
