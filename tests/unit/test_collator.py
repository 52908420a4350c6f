"""Batches that are padded once, in a background thread, are those that members would make one after another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from joined_batches import join

from raylora.data.order import Order
from raylora.data.task import Batch, collate_pack, pad_id
from raylora.engine.training import collator as collator_module
from raylora.engine.training.collator import Collator

LM = {"kind": "language_modeling", "max_length": 32}


def assert_same(one: Batch, two: Batch) -> None:
    for name, value in vars(one).items():
        other = getattr(two, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def orders_of(parts: Any) -> dict[str, Order]:
    rows = len(parts.sets.train.examples)
    return {f"member-{k:03d}": Order(rows, 4, seed=k) for k in range(3)}


def reference(parts: Any, number: int, orders: dict[str, Order]) -> Batch:
    batches = [
        parts.task.collate([parts.sets.train.examples[i] for i in order.indices(number)], parts.base.tokenizer)
        for order in orders.values()
    ]
    return join(batches, pad_id(parts.base.tokenizer), parts.task.padding_side(parts.base.is_decoder))


@pytest.mark.parametrize(("kind", "task"), [("bert", None), ("llama", LM)])
def test_a_batch_padded_once_equals_one_padded_twice(
    kind: str, task: Any, make_parts: Callable[..., Any], tiny_model: Any
) -> None:
    parts = make_parts(
        base__source=tiny_model(kind), adapter__target_modules="auto", **({"task": task} if task else {})
    )
    orders = orders_of(parts)
    padded_differently = 0
    for number in range(6):
        expected = reference(parts, number, orders)
        examples = [[parts.sets.train.examples[i] for i in order.indices(number)] for order in orders.values()]
        assert_same(collate_pack(parts.task, examples, parts.base.tokenizer), expected)
        padded_differently += len(set(expected.lengths_K)) > 1
    assert padded_differently or task  # blocks of a language model are all of one length


def test_batches_come_one_ahead_from_another_thread_and_members_may_leave(
    make_parts: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, threads, made = make_parts(), set(), []
    real = collator_module.collate_pack

    def noted(*arguments: Any) -> Batch:
        threads.add(threading.current_thread().name)
        made.append(len(arguments[1]))
        return real(*arguments)

    monkeypatch.setattr(collator_module, "collate_pack", noted)
    orders = orders_of(parts)
    with Collator(parts.model, parts.sets.train.examples, micro_batches=5) as collator:
        for number in range(5):
            if number == 3:
                orders = {name: order for name, order in orders.items() if name != "member-001"}
            assert_same(collator.batch(number, orders), reference(parts, number, orders))
    assert made == [3, 3, 3, 3, 2, 2]  # the fourth was made ahead for three and thrown away; nothing after the last
    assert all(name.startswith("collator") for name in threads)
    assert not [t for t in threading.enumerate() if t.name.startswith("collator")]


def test_an_error_in_the_thread_reaches_the_step(
    make_parts: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts()

    def broken(*arguments: Any) -> Batch:
        raise ValueError("cannot be padded")

    monkeypatch.setattr(collator_module, "collate_pack", broken)
    with pytest.raises(ValueError, match="cannot be padded"):
        parts.trainer().run(lambda t: None, lambda p: None, lambda: 0)
