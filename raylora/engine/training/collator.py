"""Batches made ready in a background thread, while the step before them computes.

Shapes: K members of a pack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from raylora.data.order import Order
from raylora.data.packed_rows import pack_rows
from raylora.data.task import Batch, Example, WeighsExamples, collate_pack, take_part
from raylora.engine.model.packed_model import PackedModel

OwnRows = Mapping[tuple[int, str], Sequence[Example]]
"""By micro-batch and member: rows that take the place of those which the member's order says."""
_Key = tuple[int, tuple[str, ...], bool]


class Collator:
    """Collates micro-batch after micro-batch of a pack's members, one ahead of what is asked for.

    One thread does all of it, so that a member's order is never read by two. What was made ahead for members of
    whom one has left since is thrown away; what is asked for is always made from these members and this number.
    """

    def __init__(
        self, model: PackedModel, examples: Sequence[Example], micro_batches: int, accumulation: int = 1,
        packs_rows: bool = False,
    ) -> None:
        """Take the training examples, and how many micro-batches a run has in all, and an optimizer step.

        Args:
            packs_rows: put several short rows into one sequence.
        """
        self._model, self._examples, self._packs_rows = model, examples, packs_rows
        self._micro_batches, self._accumulation = micro_batches, accumulation
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="collator")
        self._ahead: tuple[_Key, Future[Batch]] | None = None

    def __enter__(self) -> Collator:
        return self

    def __exit__(self, *details: Any) -> None:
        self._thread.shutdown(cancel_futures=True)

    def batch(self, number: int, orders_K: Mapping[str, Order], own: OwnRows | None = None) -> Batch:
        """Return micro-batch ``number`` (from 0) of members by name, in that order, padded once to the longest.

        Args:
            own: what members wrote for this optimizer step, for all of its micro-batches.
        """
        own = own or {}
        key = self._key(number, orders_K, own)
        ahead, self._ahead = self._ahead, None
        wanted = ahead[1] if ahead is not None and ahead[0] == key else self._submit(number, orders_K, own)
        if number + 1 < self._micro_batches:
            self._ahead = self._key(number + 1, orders_K, own), self._submit(number + 1, orders_K, own)
        return wanted.result()

    def _key(self, number: int, orders_K: Mapping[str, Order], own: OwnRows) -> _Key:
        return number, tuple(orders_K), any((number, name) in own for name in orders_K)

    def _submit(self, number: int, orders_K: Mapping[str, Order], own: OwnRows) -> Future[Batch]:
        return self._thread.submit(self._collate, number, orders_K, own)

    def rows(self, number: int, orders_K: Mapping[str, Order]) -> list[Sequence[Example]]:
        """Return each member's examples of a micro-batch, as its order says."""
        return self._thread.submit(
            lambda: [self._rows(number, name, order, {}) for name, order in orders_K.items()]
        ).result()

    def _rows(self, number: int, name: str, order: Order, own: OwnRows) -> Sequence[Example]:
        found = own.get((number, name))
        return found if found is not None else [self._examples[i] for i in order.indices(number)]

    def _collate(self, number: int, orders_K: Mapping[str, Order], own: OwnRows) -> Batch:
        examples_K = [self._rows(number, name, order, own) for name, order in orders_K.items()]
        batch = collate_pack(self._model.task, examples_K, self._model.base.tokenizer)
        weights = [weight for name, order in orders_K.items() for weight in self._weights(number, name, order, own)]
        if weights:
            batch = replace(batch, weight_N=torch.tensor(weights))
        if own:
            batch = replace(batch, own_K=tuple((number, name) in own for name in orders_K))
        gang = self._model.base.gang
        if gang is not None and gang.partners.size > 1:
            batch = take_part(batch, gang.partners.index, gang.partners.size)
        if self._packs_rows:  # each part for itself: it has the same examples as without
            batch = pack_rows(batch, self._model.task.spec.max_length)
        return batch.pin_memory() if self._model.base.device.type == "cuda" else batch

    def _weights(self, number: int, name: str, order: Order, own: OwnRows) -> list[float]:
        """Return what one member's examples count for, so that a step's loss is the mean over all that they weigh.

        Nothing where all count the same. A step averages its micro-batches, and each of those its examples.
        """
        task = self._model.task
        if not isinstance(task, WeighsExamples):
            return []
        begin = number - number % self._accumulation
        step = [
            [task.weight(example) for example in self._rows(begin + n, name, order, own)]
            for n in range(self._accumulation)
        ]
        known = [[weight for weight in micro if weight is not None] for micro in step]
        total, here = sum(map(sum, known)), known[number - begin]
        return [weight * len(here) * self._accumulation / total for weight in here]
