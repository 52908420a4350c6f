"""What the planner counts for answers, against the caches that are there and against counts by hand."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raylora.adapters.packed import stack
from raylora.data.answered import prompt_length
from raylora.engine.generation import reading
from raylora.engine.generation.decoder import Sampling
from raylora.engine.generation.generator import Generator
from raylora.engine.generation.questions import answer_records
from raylora.engine.run.answer_demand import caches_of
from raylora.engine.run.plan_run import local_inventory, prepare
from raylora.engine.training.own_answers import OwnAnswers
from raylora.placement.answering import AnswerShape, CacheShape, cached_bytes
from raylora.placement.estimate import ADAPTER_BYTES, MemberShape, ModelShape, Parts, answer_bytes, parts_of

Make = Callable[..., Any]


@pytest.fixture
def spec_changes(tiny_model: Callable[[str], str], tmp_path: Path) -> Make:
    """Return a function from an architecture to the changes of a run with prompts of 10 tokens and fewer."""
    rows = [{"prompt": f"Say {'one more ' * (n % 5)}{n}", "completion": "yes"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def of(kind: str, **changes: Any) -> dict[str, Any]:
        return {
            "base__source": tiny_model(kind), "adapter__target_modules": "all-linear",
            "task": {"kind": "instruction", "max_length": 64, "template": "none"},
            "data": {"train": {"files": str(tmp_path / "rows.jsonl")}, "train_rows": 8, "validation_rows": 2,
                     "test_rows": 5},
            "ensemble__members": 3, **changes,
        }

    return of


class Held:
    """The most bytes that caches have held together, whenever something was read or remembered twice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most, self.lanes = 0, list[Any]()
        passed, fork = reading.pass_lanes, reading.Reading.fork

        def watched_pass(*arguments: Any, **named: Any) -> Any:
            logits = passed(*arguments, **named)
            self.look(arguments[1])
            return logits

        def watched_fork(one: Any) -> Any:
            twin = fork(one)
            self.look(twin._lanes)
            return twin

        monkeypatch.setattr(reading, "pass_lanes", watched_pass)
        monkeypatch.setattr(reading.Reading, "fork", watched_fork)

    def look(self, lanes: Any) -> None:
        """Add up what the lanes hold that were seen so far and are still there."""
        self.lanes += [weakref.ref(lane) for lane in lanes]
        there = [lane for lane in (found() for found in self.lanes) if lane is not None]
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for lane in there for layer in lane.cache.layers if layer.is_initialized
            for tensor in (layer.keys, layer.values)
        }
        self.most = max(self.most, sum(held.values()))


@pytest.mark.parametrize(("kind", "dtype", "new_tokens", "batch"), [
    ("llama", "bfloat16", 9, 64), ("gpt2", "float32", 9, 6), ("gemma3", "float32", 3, 64), ("gemma3", "float32", 9, 64),
])
def test_caches_take_what_is_counted(
    kind: str, dtype: str, new_tokens: int, batch: int, spec_changes: Make, make_parts: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = make_parts(**spec_changes(kind, base__dtype=dtype, evaluation__batch=batch,
                                      evaluation__generation={"max_new_tokens": new_tokens}))
    demand = prepare(parts.spec, local_inventory(in_process=True)).demand
    shape, caches = demand.member.answers, demand.model.caches
    assert shape is not None and shape.rows_of(3) == {64: 5, 6: 2}[batch] and 6 < shape.prompt < 16
    assert [one.window for one in caches] == ([6, 0] if kind == "gemma3" else [0])
    writer = Generator(parts.model, stack([parts.member(unit, trained=0.3) for unit in parts.units]), "mean_logits")
    writer.ends = frozenset()  # nobody leaves, as may be
    held = Held(monkeypatch)
    rows = sorted(parts.sets.test.examples, key=prompt_length, reverse=True)  # the longest beside others
    answer_records(writer, rows, Sampling(new_tokens), True, batch)
    assert held.most == cached_bytes(caches, shape, 3, parts.base.dtype.itemsize) > 0
    assert held.most < answer_bytes(demand.model, shape, 3, on_gpu=False)
    held.most = 0
    answer_records(writer, rows, Sampling(new_tokens), False, batch)
    assert held.most == cached_bytes(caches, replace(shape, ways=1), 3, parts.base.dtype.itemsize)


def test_what_is_written_while_training_is_counted_for_the_pack(spec_changes: Make, make_spec: Make) -> None:
    changes = spec_changes("llama", ensemble__regularizers={"early_stopping": {"metric": "exact_match"}},
                           evaluation__generation={"max_new_tokens": 7, "rows": 1})
    member = prepare(make_spec(**changes), local_inventory(in_process=True)).demand.member
    (within,), after = member.own_answers, member.answers
    assert (within.rows, within.ways, within.members, within.new_tokens) == (1, 1, 0, 7)
    assert (after.rows, after.ways, after.members) == (1, 2, 3)
    assert 2 < within.prompt < 16 and 2 < after.prompt < 16


def test_a_student_that_writes_is_counted_by_its_micro_batch(
    spec_changes: Make, make_parts: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raylora.distill import Writing
    from raylora.engine.run.answer_demand import answers_within

    parts = make_parts(**spec_changes("llama", optimization={"lr": 0.01, "steps": 2, "micro_batch": 2}))
    loss = type("Asking", (), {"writing": Writing(1.0, 0.0, 5, 1.0)})()
    monkeypatch.setattr("raylora.engine.run.answer_demand.loss_of", lambda spec: loss)
    monkeypatch.setattr("raylora.engine.run.answer_demand.AsksTeacher", type(loss))
    (shape,) = answers_within(parts.spec, parts.sets)
    trainer = parts.trainer()
    own = OwnAnswers(parts.model, loss.writing, trainer.stack)
    own.ends = frozenset()
    held = Held(monkeypatch)
    with trainer.collator() as collator:
        own.of_step(0, 2, 1, trainer.states, collator)
    caches = caches_of(parts.base.model.config)
    assert 0 < held.most <= cached_bytes(caches, shape, 3, 4)
    assert held.most > cached_bytes(caches, replace(shape, rows=1), 3, 4)


# --- by hand -------------------------------------------------------------------------------------------------
MODEL = ModelShape(layers=3, hidden=8, heads=2, intermediate=16, vocabulary=100, compute_bytes=2,
                   caches=(CacheShape(width=30, layers=2, window=4), CacheShape(width=20)))


def test_a_window_forgets_when_the_next_token_is_read() -> None:
    shape = AnswerShape(prompt=10, new_tokens=6, rows=8, batch=12, members=3)
    assert [cached_bytes(MODEL.caches, shape, 3, 2, written) for written in (0, 1, 5)] == [
        3 * 4 * 2 * held for held in (30 * 10 + 20 * 10, 30 * 4 + 20 * 11, 30 * 4 + 20 * 15)
    ]
    assert cached_bytes(MODEL.caches, shape, 3, 2) == 24 * 500
    short = replace(shape, prompt=1, ways=2)
    assert cached_bytes(MODEL.caches, short, 3, 2) == 24 * (30 * 4 + 20 * 6 + 30 + 20)
    assert shape.rows_of(2) == 6 and shape.rows_of(1) == 8 and shape.rows_of(50) == 1
    assert replace(shape, batch=0).rows_of(50) == 8


def test_answers_count_where_they_take_more_than_training_keeps_and_are_not_added_to_it() -> None:
    member = MemberShape(parameters=1000, rows=3, time=5, has_token_logits=True)
    trained = parts_of(MODEL, member, 2)
    assert trained.answers == 0

    def beyond(**shapes: Any) -> Parts:
        found = parts_of(MODEL, replace(member, **shapes), 2)
        assert replace(found, answers=0) == trained
        return found

    shape = AnswerShape(prompt=200, new_tokens=50, rows=8)
    state, step = trained.adapters + trained.optimizer, trained.activations + trained.logits
    within = beyond(own_answers=(shape, replace(shape, rows=2)))
    assert within.answers == answer_bytes(MODEL, shape, 2, False) - step > 0
    everyone = replace(shape, members=6)
    after = beyond(answers=everyone)
    assert after.answers == answer_bytes(MODEL, shape, 6, False) + ADAPTER_BYTES * 6 * 1000 - step - state > 0
    assert beyond(answers=everyone, own_answers=(shape,)).answers == max(after.answers, within.answers)
    assert beyond(answers=AnswerShape(prompt=1, new_tokens=1, rows=1, members=2)).answers == 0
