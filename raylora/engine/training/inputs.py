"""A run's sets, read and tokenized once: kept in this process, and beside the run for its workers.

``<storage_path>/tokenized/<key>`` holds the sets of one content and one tokenizer. A worker that finds them there
reads no text at all.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

from raylora.data.answered import with_answers
from raylora.data.sets import DataSets, load_sets
from raylora.data.task import Task
from raylora.data.tokenized import pack_sets, sets_key, unpack_sets
from raylora.distill import AnsweredRows
from raylora.engine.training.distillation_loss import targets_uri, taught_content
from raylora.errors import StoreError
from raylora.spec import RunSpec, SetSpec
from raylora.store.run_store import RunStore

logger = logging.getLogger(__name__)

FOLDER = "tokenized"
ANSWERED = "answered"
"""Where a teacher's answers are committed in their folder."""
AHEAD = "ahead"
"""Stands for answers, targets and a teacher that are not there yet, where a student is only checked."""
_IN_MEMORY = 4
_loaded: OrderedDict[str, DataSets] = OrderedDict()
"""The latest sets by key: a run, its student and its check ahead read the same ones."""


def sets_of(
    spec: RunSpec, task: Task, tokenizer: Any, run: RunStore, transfer: SetSpec | None = None, keep: bool = False,
    asks: bool = False,
) -> DataSets:
    """Return every set of a run; a student's training set has the transfer rows, and what the teacher answered.

    Args:
        run: the run's store, beside which the sets are kept.
        transfer: has a teacher's training set grow by the same rows.
        keep: write them there; without it nothing is written.
        asks: read only what the transfer rows ask.

    Raises:
        DataError: as :func:`raylora.data.sets.load_sets`, or the answers are to other rows.
        StoreError: the answers are missing or damaged.
    """
    source = spec.distill_from
    if source is None:
        return _asked(spec, task, tokenizer, run, transfer, keep, asks)
    sets = _asked(spec, task, tokenizer, run, source.transfer, keep, source.answers is not None)
    if source.answers is None or source.answers == AHEAD:
        return sets
    answers = RunStore(targets_uri(run.uri.rpartition("/")[0], source.answers))
    found = AnsweredRows.read(answers.load_result(ANSWERED))
    found.check(source.teacher, taught_content(sets, task))
    return with_answers(sets, found.answers)


def _asked(
    spec: RunSpec, task: Task, tokenizer: Any, run: RunStore, extra: SetSpec | None, keep: bool, asks: bool
) -> DataSets:
    """Return the sets as they were read, from where they are kept if they are."""
    key = sets_key(spec.data, spec.evaluation, task.spec, tokenizer, extra, asks=asks)
    if key is None:
        return load_sets(spec.data, spec.evaluation, task, tokenizer, transfer=extra, asks=asks)
    beside = RunStore(f"{run.uri.rpartition('/')[0]}/{FOLDER}")
    sets = _loaded.get(key) or _kept(beside, key)
    if sets is None:
        sets = load_sets(spec.data, spec.evaluation, task, tokenizer, transfer=extra, asks=asks)
    else:
        task.check(tokenizer)
    _loaded[key] = sets
    _loaded.move_to_end(key)
    while len(_loaded) > _IN_MEMORY:
        _loaded.popitem(last=False)
    if keep and not beside.has_result(key):
        beside.commit_result(key, pack_sets(sets))
    return sets


def _kept(beside: RunStore, key: str) -> DataSets | None:
    if not beside.storage.exists(f"{key}/MANIFEST.json"):
        return None
    try:
        return unpack_sets(beside.load_result(key))
    except StoreError as error:  # the text is still there: it is read again
        logger.warning("tokenized sets are damaged and are made again: %s", error)
        return None
