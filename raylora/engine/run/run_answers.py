"""Answers as a part of a run: its workers write them when its members are finished, over the base that they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raylora.data.sets import DataSets
from raylora.data.task import Task
from raylora.engine.generation.generator import Generator
from raylora.engine.generation.questions import answers_obstacle, check_lengths
from raylora.engine.model.base import Base
from raylora.engine.run.answer_job import ANSWERS, SHARDS, AnswerJob
from raylora.engine.run.answer_summary import FACTS, asked_sets, describe, evaluation_job, numbers_of
from raylora.engine.run.answering import Shard, ShardShelf, make_shards, shards_of, writer_of
from raylora.engine.run.roster import read_state
from raylora.engine.run.speakers import fit_speakers
from raylora.engine.training.answer_validation import watched_by_answers
from raylora.engine.training.member_plan import PlanRole, member_plans_of
from raylora.errors import SpecError, StoreError
from raylora.progress import OnProgress, Span
from raylora.records import ShardTiming
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore


def run_shards(spec: RunSpec, sets: DataSets) -> dict[str, Shard]:
    """Return the shards that a run answers by name; none where its spec asks for no answers."""
    settings = spec.evaluation.generation
    return {} if settings is None else shards_of(sets, list(asked_sets(sets)), settings.rows)


def check_generation(spec: RunSpec, task: Task, config: Any, tokenizer: Any, sets: DataSets) -> None:
    """Refuse to have answers written where there are none to compare with, or where they do not fit the model.

    Raises:
        SpecError: the task's rows hold no answers, or a set only asks and is not answered.
        DataError: a row with its answer is longer than the model reads.
    """
    settings = spec.evaluation.generation
    if settings is None:
        asking = next((loaded.name for loaded in sets.all() if loaded.only_asks), None)
        if asking is not None:
            raise SpecError(
                f"evaluation.out_of_distribution.{asking}: its rows hold no answers: nothing is measured on them",
                "add evaluation.generation, which has them answered, or give rows with answers",
            )
        return
    obstacle = answers_obstacle(task)
    if obstacle:
        raise SpecError(f"evaluation.generation: {obstacle}", "leave it out, or use task.kind instruction with "
                        "train_on: completion")
    asked = [(shard.set_name, shard.examples) for shard in run_shards(spec, sets).values()]
    if watched_by_answers(member_plans_of(spec)):
        asked.append(("validation", sets.validation.examples[: settings.rows]))
    for name, examples in asked:
        check_lengths(config, tokenizer, name, examples, settings.max_new_tokens)


@dataclass(frozen=True)
class _Asked:
    """Members that are asked, and where their answers go."""

    job: AnswerJob
    shelf: ShardShelf


@dataclass(frozen=True)
class Answered:
    """What a run's answers came to."""

    numbers: dict[str, Any]
    """What of ``answers.json`` stands in the run's metrics."""
    timings: Sequence[ShardTiming]
    """What it took to write them."""


class RunAnswers:
    """The answers of one run's members, on one worker."""

    def __init__(self, spec: RunSpec, store: RunStore, task: Task, base: Base, sets: DataSets) -> None:
        self.spec, self.store, self.task, self.base, self.sets = spec, store, task, base, sets
        self.shards = run_shards(spec, sets)
        self._asked: _Asked | None = None
        self._writer: Generator | None = None

    def make(
        self, names: Sequence[str], report: OnProgress, should_stop: Callable[[], int], span: Span
    ) -> None:
        """Answer the rows of shards that are not committed. Raises: Interrupted; StoreError for a damaged member."""
        if self._asked is None:
            self._asked = self._ask(self._finished())
        asked = self._asked
        if self._writer is None and set(names).intersection(asked.shelf.missing()):
            self._writer = writer_of(self.spec, self.store, self.base, self.task, asked.job.members, asked.job.weights)
        if self._writer is not None:
            batch = self.spec.evaluation.batch
            make_shards(self._writer, asked.job, asked.shelf, names, batch, report, should_stop, span)

    def conclude(self, members: Sequence[str]) -> Answered | None:
        """Write ``answers.json``, and return what the run's metrics say of it; None where nothing was asked.

        Raises:
            StoreError: an answer is missing or damaged.
        """
        settings = self.spec.evaluation.generation
        if settings is None:
            return None
        asked = self._ask(members)
        missing = asked.shelf.missing()
        if missing:
            failed = read_state(self.store).failed_units
            why = next((f": {failed[name]}" for name in missing if name in failed), "")
            raise StoreError(
                f"{self.store.uri}: {len(missing)} of {len(self.shards)} shards of answers are not written, such as "
                f"{missing[0]}{why}", f"raylora resume {self.store.uri}",
            )
        found = describe(
            self.spec.evaluation, settings, self.spec.data.seed, self.sets, asked.shelf, len(asked.job.members)
        )
        self.store.write_json(FACTS, found)
        return Answered(numbers_of(found), asked.shelf.timings())

    def _finished(self) -> list[str]:
        plans = (plan for plan in member_plans_of(self.spec) if plan.role is PlanRole.MEMBER)
        return [plan.name for plan in plans if self.store.has_result(plan.folder)]

    def _ask(self, members: Sequence[str]) -> _Asked:
        assert self.spec.evaluation.generation is not None
        speakers = fit_speakers(self.store, self.spec, members)
        job = evaluation_job(self.spec, self.store, speakers, self.spec.evaluation.generation, self.sets)
        return _Asked(job, ShardShelf(self.store, f"{ANSWERS}/{job.key()}/{SHARDS}", self.shards))
