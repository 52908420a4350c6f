"""A finished run as a teacher: its members' outputs for every row of the transfer set, made once, shard by shard.

Making targets is a run of the same state machine whose jobs are shards of rows: it is spread over workers, survives
their loss and is taken up again like any other. Shapes: M members, N rows of a shard, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from raylora import control
from raylora.data.task import Example
from raylora.distill import (
    Keys,
    MemberTargets,
    TokenTargets,
    TokenTargetsWriter,
    concatenate,
    read_targets,
    targets_class,
)
from raylora.engine.model.checkpoint import load_tokenizer
from raylora.engine.model.gang import GangPlace
from raylora.engine.model.model_files import record_models
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.run.asking import AskingSession
from raylora.engine.run.finished_members import adapters_of, read_members
from raylora.engine.training.distillation_loss import read_outputs, task_of, taught_content
from raylora.engine.training.inputs import sets_of
from raylora.engine.training.predict import OnRows, predict
from raylora.errors import Interrupted, StoreError
from raylora.placement.plan import Plan
from raylora.progress import Activity, OnProgress, RowCounter
from raylora.records import TargetFacts
from raylora.spec import RunSpec, SetSpec
from raylora.store.run_store import RunStore

SHARD_ROWS = 256
FACTS = "targets.json"


@dataclass(frozen=True)
class TargetJob:
    """Who teaches, and on what: all that a worker must know beside the teacher's spec."""

    run_uri: str
    digest: str
    """Of the teacher: see :func:`raylora.engine.run.finished_members.teacher_digest`."""
    packs: tuple[tuple[str, ...], ...]
    """Its members, by what shares a forward."""
    transfer: SetSpec | None
    tokens: tuple[int, float] | None = None
    """For language models, how many tokens are kept per position and at what temperature."""
    shard_rows: int = SHARD_ROWS
    weights: tuple[float, ...] | None = None
    """What each of :attr:`members` weighs; None where all weigh alike."""
    temperature: float = 1.0
    """What every member's logits are divided by."""

    @property
    def members(self) -> list[str]:
        """The members' names, in order."""
        return sorted(name for pack in self.packs for name in pack)

    def make_session(
        self, spec: RunSpec, store: RunStore, cpus: int, gpus: int, place: GangPlace | None = None
    ) -> TargetSession:
        """Return what a worker makes the targets on; each has a whole base."""
        return TargetSession(spec, store, cpus, gpus, self)


@dataclass(frozen=True)
class TargetPlan:
    """Checked and ready to be carried out, as :class:`raylora.engine.run.plan_run.Prepared` is for training."""

    spec: RunSpec
    store: RunStore
    """Of the targets."""
    plan: Plan
    target_job: TargetJob
    shards: tuple[str, ...]
    rows: int
    base: None = None

    @property
    def is_done(self) -> bool:
        """Whether all targets are there; then nobody needs to be asked."""
        return bool((self.store.read_json(FACTS) or {}).get("done"))

    def begin(self) -> None:
        """Write what the targets will be; the first thing that touches the disk."""
        self.store.write_json(FACTS, {
            "done": False, "teacher": self.target_job.digest, "members": self.target_job.members, "rows": self.rows,
            "shards": list(self.shards), "tokens": self.target_job.tokens, "temperature": self.target_job.temperature,
        })
        task = task_of(self.spec)
        tokenizer, teacher = load_tokenizer(self.spec.base, task), RunStore(self.target_job.run_uri)
        sets_of(self.spec, task, tokenizer, teacher, self.target_job.transfer, keep=True)
        record_models(self.spec, self.store, teacher)

    def start_event(self, workers: list[str]) -> control.RunStarted:
        """Return the event that begins the work or takes it up again; every shard is needed."""
        return control.RunStarted(
            jobs={name: [name] for name in self.shards}, workers=workers, required=list(self.shards),
            min_members=len(self.shards), max_failures=self.spec.checkpointing.max_failures,
        )

    @property
    def assignment(self) -> TargetJob:
        """What its workers are told."""
        return self.target_job


class TargetSession(AskingSession):
    """Asks a run's members about rows and commits what they say; it writes nothing else."""

    def __init__(self, spec: RunSpec, store: RunStore, cpus: int, gpus: int, target_job: TargetJob) -> None:
        """Take the teacher's spec and the store of the targets."""
        super().__init__(spec, store, cpus, gpus, target_job.run_uri)
        self.target_job = target_job

    def load(self) -> None:
        """Load base, rows and members.

        Raises:
            RunDirectoryError: the data, or the members, are not what the teacher was trained with.
        """
        sets = self.load_sets(self.target_job.transfer)
        self.examples, self.content_of = sets.train.examples, taught_content(sets, self.session.task)
        self.packs = [
            read_members(self.spec, self.session.store, self.session.base, pack, self._column_names())
            for pack in self.target_job.packs
        ]

    def run_job(
        self, job: str, unit_names: Sequence[str], report: OnProgress, should_stop: Callable[[], int]
    ) -> dict[str, str]:
        """Make and commit shards that are not there yet; what is counted is rows times packs of members.

        Raises:
            Interrupted: the shards so far are committed.
        """
        for name in unit_names:
            if should_stop():
                raise Interrupted("stopped between two shards of targets", signal_number=should_stop())
            if not self.store.has_result(f"shards/{name}"):
                first, last = (int(part) for part in name.split("-")[1:])
                chosen = self.examples[first : last + 1]
                if self.target_job.tokens is not None:
                    rows = RowCounter(Activity.MAKING_TARGETS, len(chosen), report)
                    files = self._tokens(name, chosen, rows)
                else:
                    rows = RowCounter(Activity.MAKING_TARGETS, len(chosen) * len(self.packs), report)
                    files = self._targets(chosen, rows).to_files()
                with self.span("checkpoint"):
                    self.store.commit_result(f"shards/{name}", files)
        return {}

    def _targets(self, examples: Sequence[Example], report: OnRows) -> MemberTargets:
        task, batch = self.session.task, self.spec.evaluation.batch
        model = self._model()
        parts = [predict(model, pack, examples, batch, report=report)[0] for pack in self.packs]
        names = self._column_names()
        order = sorted(range(len(names)), key=names.__getitem__)
        outputs_MNC, ids = torch.cat(parts)[order], [example.id for example in examples]
        keys = Keys(ids, [self.content_of[i] for i in ids])
        values, _ = read_outputs(task, outputs_MNC)
        values = values / self.target_job.temperature
        found = targets_class(task.output).from_outputs(
            keys, values.transpose(0, 1), teacher_digest=self.target_job.digest, label_names=task.label_names,
            members=[number_of(names[index]) for index in order],
        )
        return replace(found, weights=self.target_job.weights)

    def _model(self) -> PackedModel:
        adapters = adapters_of(self.spec, self._column_names())
        return PackedModel(self.session.base, adapters, self.session.task)

    def _column_names(self) -> list[str]:
        return [name for pack in self.target_job.packs for name in pack]

    def _column_weights(self) -> list[float] | None:
        """Return what the members weigh, in the order in which they share forwards."""
        job = self.target_job
        if job.weights is None:
            return None
        weight_of = dict(zip(job.members, job.weights, strict=True))
        return [weight_of[name] for name in self._column_names()]

    @torch.no_grad()
    def _tokens(self, name: str, examples: Sequence[Example], report: OnRows) -> dict[str, bytes]:
        """Return the files of a shard of a language model's targets; logits are cut to the top k as they are made."""
        assert self.target_job.tokens is not None
        files: dict[str, bytes] = {}
        base, task, (k, temperature) = self.session.base, self.session.task, self.target_job.tokens
        model = self._model()
        writer = TokenTargetsWriter(
            files.__setitem__, teacher_digest=self.target_job.digest, k=k, temperature=temperature, prefix=name,
            members=[number_of(member) for member in self.target_job.members], weights=self._column_weights(),
            vocabulary=int(base.model.get_output_embeddings().weight.shape[0]),  # type: ignore[operator]
        )
        with writer:
            for number, example in enumerate(examples, 1):
                batch = task.collate([example], base.tokenizer).to(base.device)
                # Some positions of one member at a time: over a vocabulary, logits are the largest thing here.
                parts = [writer.cut(example.id, each) for each in model.token_logits(self.packs, batch)]
                writer.add_topk(example.id, self.content_of[example.id], concatenate(parts))
                report(number, len(examples))
        return files

    def aggregate(self, units: Sequence[str], started_at: float) -> TargetFacts:
        """Check every shard, one at a time, and declare the targets done. Raises: StoreError for a damaged one."""
        shards = [self._check_shard(name) for name in units]
        facts: dict[str, Any] = {**self.store.read_json(FACTS), "made_s": time.time() - started_at, "done": True}
        if sum(one.pop("rows") for one in shards) != facts["rows"]:
            raise StoreError(f"{self.store.uri}: the shards do not add up to {facts['rows']} rows", "delete the folder")
        for key in shards[0]:
            facts[key] = (max if key == "rounding_error" else sum)(one[key] for one in shards)
        self.store.write_json(FACTS, facts)
        return cast(TargetFacts, facts)

    def _check_shard(self, name: str) -> dict[str, Any]:
        """Return a committed shard's rows and bytes, and of logits the rounding error, of tokens the positions."""
        files = self.store.load_result(f"shards/{name}")
        size_bytes = sum(map(len, files.values()))
        if self.target_job.tokens is None:
            targets = read_targets(files)
            return {"rows": len(targets.keys), "size_bytes": size_bytes, "rounding_error": targets.rounding_error}
        tokens = TokenTargets(files.__getitem__, [name])
        return {"rows": len(tokens.keys), "size_bytes": size_bytes, "positions": tokens.positions}


def shard_names(rows: int, shard_rows: int) -> tuple[str, ...]:
    """Return the shards by their first and last row, so that no other division is mistaken for this one."""
    starts = range(0, rows, shard_rows)
    return tuple(f"rows-{first:07d}-{min(first + shard_rows, rows) - 1:07d}" for first in starts)


def number_of(member: str) -> int:
    """Return a member's number within its run."""
    return int(member.rpartition("-")[2])
