"""A run's sets, read and tokenized once: kept in this process, and beside the run for its workers.

``<storage_path>/tokenized/<key>`` holds the sets of one content and one tokenizer. A worker that finds them there
reads no text at all.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

from raylora.data.sets import DataSets, load_sets
from raylora.data.task import Task
from raylora.data.tokenized import pack_sets, sets_key, unpack_sets
from raylora.errors import StoreError
from raylora.spec import RunSpec, SetSpec
from raylora.store.run_store import RunStore

logger = logging.getLogger(__name__)

FOLDER = "tokenized"
_IN_MEMORY = 4
_loaded: OrderedDict[str, DataSets] = OrderedDict()
"""The latest sets by key: a run, its student and its check ahead read the same ones."""


def sets_of(
    spec: RunSpec, task: Task, tokenizer: Any, run: RunStore, transfer: SetSpec | None = None, keep: bool = False
) -> DataSets:
    """Return every set of a run; a student's training set has the transfer rows.

    Args:
        run: beside which the sets are kept.
        transfer: has a teacher's training set grow by the same rows.
        keep: write them there; without it nothing is written.

    Raises:
        DataError: as :func:`raylora.data.sets.load_sets`.
    """
    extra = spec.distill_from.transfer if spec.distill_from is not None else transfer
    key = sets_key(spec.data, spec.evaluation, task.spec, tokenizer, extra)
    if key is None:
        return load_sets(spec.data, spec.evaluation, task, tokenizer, transfer=extra)
    beside = RunStore(f"{run.uri.rpartition('/')[0]}/{FOLDER}")
    sets = _loaded.get(key) or _kept(beside, key)
    if sets is None:
        sets = load_sets(spec.data, spec.evaluation, task, tokenizer, transfer=extra)
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
