"""A finished run is asked: answers to rows of its sets, made once, shard by shard, by as many workers as there are.

As making a teacher's targets, it is a run of the same state machine whose jobs are shards of rows.

    >>> plan = plan_answers(prepare(spec, inventory, look=True), AnswerJob(uri, members, digest, ("train",)))
    >>> run_in_process(plan)  # or on a cluster; what is committed already is not written again
    >>> for set_name, record in plan.shelf().records(): ...  # record["answer"]["text"], ["tokens"], ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from raylora import control
from raylora.data.sets import DataSets
from raylora.engine.generation.questions import check_answers, check_lengths
from raylora.engine.model.checkpoint import load_config, load_tokenizer
from raylora.engine.model.model_files import record_models
from raylora.engine.run.answer_job import ANSWERS, SHARDS, AnswerJob
from raylora.engine.run.answer_summary import FACTS as ANSWERS_FACTS
from raylora.engine.run.answer_summary import describe, evaluation_job
from raylora.engine.run.answering import Shard, ShardShelf, make_shards, shards_of, writer_of
from raylora.engine.run.asking import AskingSession
from raylora.engine.run.plan_run import Prepared, prepare
from raylora.engine.run.roster import read_roster
from raylora.engine.run.speakers import read_speakers
from raylora.engine.training.distillation_loss import task_of
from raylora.engine.training.inputs import sets_of
from raylora.placement.inventory import Inventory
from raylora.placement.plan import Plan
from raylora.progress import OnProgress
from raylora.spec import GenerationSpec, RunSpec
from raylora.store.run_store import RunStore

FACTS = "answered.json"


@dataclass(frozen=True)
class AnswerPlan:
    """Checked and ready to be carried out, as :class:`raylora.engine.run.plan_run.Prepared` is for training."""

    spec: RunSpec
    store: RunStore
    """Of the answers."""
    plan: Plan
    job: AnswerJob
    shards: Mapping[str, Shard]
    base: None = None

    @property
    def assignment(self) -> AnswerJob:
        """What its workers are told."""
        return self.job

    @property
    def rows(self) -> int:
        """How many rows are answered in all."""
        return sum(len(shard.examples) for shard in self.shards.values())

    @property
    def is_done(self) -> bool:
        """Whether all answers are there; then nobody needs to be asked."""
        return not self.shelf().missing()

    def shelf(self) -> ShardShelf:
        """Return where the answers are, or will be."""
        return ShardShelf(self.store, SHARDS, self.shards)

    def begin(self) -> None:
        """Write what will be answered, and how; the first thing that touches the disk."""
        self.store.write_json(FACTS, _facts(self.job, self.rows) | {"done": False})
        task, run = task_of(self.spec), RunStore(self.job.run_uri)
        sets_of(self.spec, task, load_tokenizer(self.spec.base, task), run, self.job.transfer, keep=True, asks=True)
        record_models(self.spec, self.store, run)

    def start_event(self, workers: list[str]) -> control.RunStarted:
        """Return the event that begins the work or takes it up again; every shard is needed."""
        names = list(self.shards)
        return control.RunStarted(
            jobs={name: [name] for name in names}, workers=workers, required=names, min_members=len(names),
            max_failures=self.spec.checkpointing.max_failures, reopened=self.shelf().missing(),
        )


def plan_answers(prepared: Prepared, job: AnswerJob) -> AnswerPlan:
    """Return the plan of a job whose run has been prepared, for as many of the run's workers as find a shard.

    Raises:
        UsageError: the run's model does not write.
        DataError: a row with its answer is longer than the model reads.
    """
    spec, task = prepared.spec, task_of(prepared.spec)
    tokenizer, run = load_tokenizer(spec.base, task), RunStore(job.run_uri)
    sets = prepared.sets if job.transfer is None else sets_of(spec, task, tokenizer, run, job.transfer, asks=True)
    shards = shards_of(sets, job.sets, job.rows, job.shard_rows)
    config = load_config(spec.base)
    for shard in shards.values():
        check_lengths(config, tokenizer, shard.set_name, shard.examples, job.max_new_tokens)
    processes = prepared.plan.workers * prepared.plan.ranks + prepared.plan.later_workers
    plan = replace(prepared.plan, workers=min(processes, len(shards)), ranks=1, partners=1, later_workers=0)
    return AnswerPlan(spec, RunStore(f"{job.run_uri}/{ANSWERS}/{job.key()}"), plan, job, shards)


def plan_evaluation(
    run: str, settings: GenerationSpec, inventory: Inventory | None = None, allow_missing: bool = False
) -> Evaluation:
    """Check that a finished run can answer its evaluation sets, and plan it.

    Args:
        allow_missing: go on without members that are damaged, missing or not finished.

    Raises:
        UsageError: the run's rows have no answers.
        StoreError, RunDirectoryError: a member is damaged, or not finished.
        DataError: a row with its answer is longer than the model reads.
    """
    store = RunStore(run)
    spec = store.spec_in_place()
    check_answers(task_of(spec))
    speakers = read_speakers(store, spec, read_roster(store).members(allow_missing))
    prepared = prepare(spec, inventory, look=True)
    job = evaluation_job(spec, store, speakers.weights, settings, prepared.sets)
    return Evaluation(settings, store, prepared.sets, plan_answers(prepared, job))


@dataclass(frozen=True)
class Evaluation:
    """A finished run that answers its evaluation sets, and is compared with them."""

    settings: GenerationSpec
    store: RunStore
    """Of the run."""
    sets: DataSets
    answers: AnswerPlan

    def conclude(self) -> dict[str, Any]:
        """Write what the answers are worth to the run's ``answers.json``, and return it. Raises: StoreError."""
        spec, job = self.answers.spec, self.answers.job
        found = describe(
            spec.evaluation, self.settings, spec.data.seed, self.sets, self.answers.shelf(), len(job.members)
        )
        self.store.write_json(ANSWERS_FACTS, found)
        return found


class AnswerSession(AskingSession):
    """Asks a run's members about rows and commits what they answer; it writes nothing else."""

    def __init__(self, spec: RunSpec, store: RunStore, cpus: int, gpus: int, job: AnswerJob) -> None:
        """Take the spec of the members' run and the store of the answers."""
        super().__init__(spec, store, cpus, gpus, job.run_uri)
        self.job = job

    def load(self) -> None:
        """Load base, rows and members.

        Raises:
            RunDirectoryError: the data, or the members, are not what the run was trained with.
        """
        session, job = self.session, self.job
        sets = self.load_sets(job.transfer, asks=True)
        self.shelf = ShardShelf(self.store, SHARDS, shards_of(sets, job.sets, job.rows, job.shard_rows))
        self.writer = writer_of(self.spec, session.store, session.base, session.task, job.members, job.weights)

    def run_job(
        self, job: str, unit_names: Sequence[str], report: OnProgress, should_stop: Callable[[], int]
    ) -> dict[str, str]:
        """Make and commit shards that are not there yet. Raises: Interrupted, DataError."""
        batch = self.spec.evaluation.batch
        make_shards(self.writer, self.job, self.shelf, unit_names, batch, report, should_stop, self.span)
        return {}

    def aggregate(self, units: Sequence[str], started_at: float) -> dict[str, Any]:
        """Check every shard, and write how much was answered. Raises: StoreError for a damaged one."""
        rows = tokens = 0
        for _, record in self.shelf.records():
            rows, tokens = rows + 1, tokens + len(record["answer"]["tokens"])
        facts = _facts(self.job, rows) | {"done": True, "tokens": tokens, "made_s": time.time() - started_at}
        self.store.write_json(FACTS, facts)
        return facts


def _facts(job: AnswerJob, rows: int) -> dict[str, Any]:
    asked = {name: value for name, value in asdict(job).items() if name not in ("run_uri", "transfer")}
    return {**asked, "rows": rows}
