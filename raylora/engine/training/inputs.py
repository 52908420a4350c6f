"""A run's sets, read and tokenized once: kept in this process, and beside the run for its workers.

``<storage_path>/tokenized/<key>`` holds the sets of one content and one tokenizer. Which key a run's are kept under is
written down in the run, so that a worker finds them by that: it reads no text at all, and need not see any.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

from raylora.data.answered import with_answers
from raylora.data.sets import DataSets, load_sets
from raylora.data.task import Task
from raylora.data.tokenized import content_key, pack_sets, sets_key, unpack_sets, wish_key
from raylora.distill import AnsweredRows
from raylora.engine.training.distillation_loss import targets_uri, taught_content
from raylora.errors import DataError, StoreError
from raylora.spec import RunSpec, SetSpec
from raylora.store.commit import MANIFEST
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
    asks: bool = False, as_begun: bool = False,
) -> DataSets:
    """Return every set of a run; a student's training set has the transfer rows, and what the teacher answered.

    Args:
        run: the run's store, beside which the sets are kept.
        transfer: has a teacher's training set grow by the same rows.
        keep: write them there; without it nothing is written.
        asks: read only what the transfer rows ask.
        as_begun: take what is kept of this run without looking for the text, as workers do.

    Raises:
        DataError: as :func:`raylora.data.sets.load_sets`, or the answers are to other rows.
        StoreError: the answers are missing or damaged.
    """
    source = spec.distill_from
    if source is None:
        return _asked(spec, task, tokenizer, run, transfer, keep, asks, as_begun)
    sets = _asked(spec, task, tokenizer, run, source.transfer, keep, source.answers is not None, as_begun)
    if source.answers is None or source.answers == AHEAD:
        return sets
    answers = RunStore(targets_uri(run.uri.rpartition("/")[0], source.answers))
    found = AnsweredRows.read(answers.load_shared(ANSWERED))
    found.check(source.teacher, taught_content(sets, task))
    return with_answers(sets, found.answers)


def _asked(
    spec: RunSpec, task: Task, tokenizer: Any, run: RunStore, extra: SetSpec | None, keep: bool, asks: bool,
    as_begun: bool,
) -> DataSets:
    """Return the sets as they were read, from where they are kept if they are."""
    beside = RunStore(f"{run.uri.rpartition('/')[0]}/{FOLDER}")
    note = f"{FOLDER}/{wish_key(spec.data, spec.evaluation, task.spec, tokenizer, extra, asks)}.json"
    noted = _noted(run, note) if as_begun or keep else None
    key = noted if as_begun else None
    if key is None or not beside.storage.exists(f"{key}/{MANIFEST}"):
        key = sets_key(spec.data, spec.evaluation, task.spec, tokenizer, extra, asks=asks)
    sets = (_loaded.get(key) or _kept(beside, key)) if key is not None else None
    if sets is None:
        try:
            sets = load_sets(spec.data, spec.evaluation, task, tokenizer, transfer=extra, asks=asks)
        except DataError as error:
            if not as_begun or noted is None:
                raise
            raise StoreError(
                f"{beside.uri}/{noted}: the run's tokenized rows are damaged or missing, and their text is not to be "
                f"had here: {error.message}", "resume the run where the text is: they are made again",
            ) from error
    else:
        task.check(tokenizer)
    if keep:
        key = _keep(beside, key, sets)
        if key != noted:
            run.write_json(note, {"key": key})
    if key is not None:
        _remember(key, sets)
    return sets


def _keep(beside: RunStore, key: str | None, sets: DataSets) -> str:
    """Commit sets beside the run unless they are there, and return their key."""
    if key is not None and beside.has_result(key):
        return key
    packed = pack_sets(sets)
    key = key or content_key(packed)
    if not beside.has_result(key):
        beside.commit_result(key, packed)
    return key


def _noted(run: RunStore, note: str) -> str | None:
    found = run.read_json(note)
    return str(found["key"]) if found else None


def _remember(key: str, sets: DataSets) -> None:
    _loaded[key] = sets
    _loaded.move_to_end(key)
    while len(_loaded) > _IN_MEMORY:
        _loaded.popitem(last=False)


def _kept(beside: RunStore, key: str) -> DataSets | None:
    if not beside.storage.exists(f"{key}/{MANIFEST}"):
        return None
    try:
        return unpack_sets(beside.load_shared(key))
    except StoreError as error:  # the text is still there: it is read again
        logger.warning("tokenized sets are damaged and are made again: %s", error)
        return None
