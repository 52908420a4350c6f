"""Rows and the members' answers to them, shard by shard: a shard is some rows of one set, and is committed whole.

A shard's name holds its rows' numbers and a hash of their tokens, so that no other rows are mistaken for them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raylora.data.sets import DataSets
from raylora.data.task import Example, Task
from raylora.engine.generation.decoder import Sampling
from raylora.engine.generation.generator import Generator
from raylora.engine.generation.questions import answer_records
from raylora.engine.model.base import Base
from raylora.engine.model.machine import peak_device_bytes, peak_memory_bytes
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.run.answer_job import SHARD_ROWS, AnswerJob
from raylora.engine.run.finished_members import adapters_of, read_members
from raylora.errors import Interrupted, StoreError
from raylora.progress import Activity, OnProgress, RowCounter, Span
from raylora.records import ShardTiming
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore

FILE, WRITING = "answers.jsonl", "writing.json"
"""The files of a shard: the answers, and what it took to write them."""


def writer_of(
    spec: RunSpec, store: RunStore, base: Base, task: Task, members: Sequence[str],
    weights: Sequence[float] | None = None,
) -> Generator:
    """Return finished members, who weigh alike or as is said, as a writer over their base.

    Raises:
        StoreError: a member is damaged.
        UsageError: the task's model does not write.
    """
    stacked = read_members(spec, store, base, members)
    weights_M = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return Generator(PackedModel(base, adapters_of(spec, members), task), stacked, spec.ensemble.aggregate, weights_M)


@dataclass(frozen=True)
class Shard:
    """Some rows of one set."""

    name: str
    set_name: str
    examples: Sequence[Example]


def shards_of(
    sets: DataSets, names: Sequence[str], most_rows: int | None, shard_rows: int = SHARD_ROWS
) -> dict[str, Shard]:
    """Return the shards of named sets by name, set by set; of each set its first rows, at most so many."""
    of_name = {loaded.name: loaded.examples for loaded in sets.all()}
    found = {}
    for set_name in names:
        chosen = of_name[set_name][:most_rows]
        for first in range(0, len(chosen), shard_rows):
            examples = chosen[first : first + shard_rows]
            rows = json.dumps([[one.id, one.sequences, one.target_ranges] for one in examples])
            content = hashlib.sha256(rows.encode()).hexdigest()[:12]
            name = f"{set_name}-{first:07d}-{first + len(examples) - 1:07d}-{content}"
            found[name] = Shard(name, set_name, examples)
    return found


class ShardShelf:
    """Where the shards of one job are, or will be."""

    def __init__(self, store: RunStore, folder: str, shards: Mapping[str, Shard]) -> None:
        """Take the shards that there should be; ``folder`` is within the store."""
        self.store, self.folder, self.shards = store, folder, shards
        self._writings: dict[str, bytes | None] = {}
        """Of each shard that was read, so that no file is read, and fetched, once more for it."""

    def missing(self) -> list[str]:
        """Return the shards that are not committed, or not whole."""
        return [name for name in self.shards if not self.store.has_result(f"{self.folder}/{name}")]

    def commit(self, name: str, records: Sequence[Mapping[str, Any]], writing: ShardTiming) -> None:
        """Commit a shard's records, and what it took to write them."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        files = {FILE: lines.encode(), WRITING: json.dumps(writing).encode()}
        self._writings.pop(name, None)
        self.store.commit_result(f"{self.folder}/{name}", files)

    def timings(self) -> list[ShardTiming]:
        """Return what it took to write each shard; nothing where some were written before that was kept.

        Raises:
            StoreError: a shard is missing or damaged.
        """
        for name in self.shards:
            if name not in self._writings:
                self._read(name)
        known = [json.loads(content) for name in self.shards if (content := self._writings[name]) is not None]
        return known if len(known) == len(self.shards) else []

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each row's set and record, in order; records are those of :func:`answer_records`.

        Raises:
            StoreError: a shard is missing or damaged.
        """
        for name, shard in self.shards.items():
            records = [json.loads(line) for line in self._read(name)[FILE].splitlines()]
            if [record["id"] for record in records] != [one.id for one in shard.examples]:
                raise StoreError(f"{self.store.uri}/{self.folder}/{name}: holds answers to other rows", "delete it")
            yield from ((shard.set_name, record) for record in records)

    def _read(self, name: str) -> dict[str, bytes]:
        files = self.store.load_result(f"{self.folder}/{name}")
        self._writings[name] = files.get(WRITING)
        return files


def make_shards(
    writer: Generator, job: AnswerJob, shelf: ShardShelf, names: Sequence[str], batch: int, report: OnProgress,
    should_stop: Callable[[], int], span: Span,
) -> None:
    """Answer the rows of shards that are not there yet, and commit each.

    Args:
        batch: model rows per forward pass, shared out among the members.

    Raises:
        Interrupted: the shards so far are committed.
        DataError: a prompt with its answer is longer than the model reads.
    """
    sampling = Sampling(job.max_new_tokens, job.temperature, job.top_p, job.seed)
    for name in names:
        if should_stop():
            raise Interrupted("stopped between two shards of answers", signal_number=should_stop())
        if shelf.store.has_result(f"{shelf.folder}/{name}"):
            continue
        examples = shelf.shards[name].examples
        counter = RowCounter(Activity.ANSWERING, len(examples), report)
        records = answer_records(writer, examples, sampling, job.each_member, batch, counter)
        writing = ShardTiming({
            "answer_s": counter.seconds,
            "answer_tokens": counter.tokens,
            "peak_rss_bytes": peak_memory_bytes(),
            "peak_device_bytes": peak_device_bytes(writer.model.base.device),
            "pid": os.getpid(),
        })
        with span("checkpoint"):
            shelf.commit(name, records, writing)
