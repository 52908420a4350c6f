"""Early stopping by what members answer: each writes its own, the best state stays, and a resume changes nothing."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gangs import Case, run_gang
from run_helpers import assert_bit_equal, members, run, stop_at

from raylora.adapters.packed import make_pack, stack
from raylora.data.task import Example
from raylora.engine.run.plan_run import prepare
from raylora.ensemble.answer_metrics import NORMALIZATIONS, score_answers
from raylora.errors import DataError, Interrupted, RunDirectoryError, SpecError
from raylora.spec import build_spec
from raylora.store.run_store import RunStore

GENERATION = {"max_new_tokens": 4, "rows": 10, "normalize": "space"}


@pytest.fixture
def changes(tiny_model: Callable[[str], str], tmp_path: Path) -> dict[str, Any]:
    """Return what makes the small spec one whose members soon answer in turns right and wrong."""
    rows = [{"prompt": f"Say {n}", "completion": "yes" if n % 3 else f"no {n}"} for n in range(64)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base__source": tiny_model("llama"), "adapter__target_modules": "all-linear", "ensemble__members": 3,
        "task": {"kind": "instruction", "max_length": 64, "template": "none"},
        "optimization": {"lr": 0.02, "epochs": 6, "micro_batch": 8, "schedule": "constant"},
        "data": {"train": {"files": str(path)}, "train_rows": 24, "validation_rows": 12, "test_rows": 4},
        "evaluation": {"bootstrap_samples": 0, "generation": GENERATION},
        "ensemble__regularizers": {"early_stopping": {"metric": "f1", "patience": 2}},
    }


def answers_alone(parts: Any, member: Any, examples: list[Example], most: int) -> list[str]:
    """Let one member answer token by token, row by row, without a cache."""
    pack = make_pack(parts.adapter, parts.base.sites, stack([member]))
    tokenizer, said = parts.base.tokenizer, []
    for example in examples:
        ids, new = list(example.sequences[0][: example.target_ranges[-1][0]]), []
        for _ in range(most):
            batch = parts.task.collate([Example("x", (tuple(ids + new),), None, (1,))], tokenizer)
            with torch.no_grad(), parts.base.slot.use(pack):
                logits = parts.base.model(**batch.model_inputs(), use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token in parts.task.ends(tokenizer):
                break
            new.append(token)
        said.append(tokenizer.decode(new, skip_special_tokens=True))
    return said


def test_what_is_watched_is_what_each_member_writes_alone(
    make_parts: Callable[..., Any], changes: dict[str, Any]
) -> None:
    parts = make_parts(**changes)
    trainer, seen = parts.trainer(), []
    rows = parts.sets.validation.examples[: GENERATION["rows"]]
    references = [
        parts.base.tokenizer.decode(e.sequences[0][slice(*e.target_ranges[-1])], skip_special_tokens=True) for e in rows
    ]

    def look(trainer: Any, epoch: int) -> None:
        for state in trainer.states:
            if "validation_f1" in state.history[-1] and state.history[-1]["step"] == trainer.step:
                said = answers_alone(parts, state.whole(), rows, GENERATION["max_new_tokens"])
                expected = float(score_answers(said, references, ["f1"], NORMALIZATIONS["space"])["f1"].mean())
                seen.append((state.history[-1]["validation_f1"], expected))

    told: list[str] = []
    trainer.run(lambda t: None, lambda p: told.extend(p.news), lambda: 0, look)
    assert len(seen) >= 9 and len({found for found, _ in seen}) > 3
    assert all(found == pytest.approx(expected) for found, expected in seen)
    for state in trainer.states:
        curve = [point["validation_f1"] for point in state.history if "validation_f1" in point]
        assert state.best_value == max(curve)  # more is better
        assert state.stopped_at is None or len(curve) == curve.index(max(curve)) + 3
        assert all("validation_nll" in point for point in state.history if "validation_f1" in point)
    assert any(state.stopped_at for state in trainer.states)
    assert any(re.search(r"validation NLL [\d.]+, F1 0\.\d+", line) for line in told)


@pytest.mark.slow
def test_a_resume_stops_where_the_whole_run_stops(make_spec: Callable[..., Any], changes: dict[str, Any]) -> None:
    whole = make_spec(name="whole", **changes)
    run(whole)
    store = RunStore.for_spec(whole)
    facts = [json.loads(store.load_result(f"members/{name}")["member.json"]) for name in members(whole)]
    assert any(fact["stopped_at"] for fact in facts)
    for step in (3, 7):
        broken = make_spec(name=f"broken-{step}")
        with pytest.raises(Interrupted):
            run(broken, stop_at(step))
        run(broken)
        assert_bit_equal(members(whole), members(broken))
        again = RunStore.for_spec(broken)
        assert [json.loads(again.load_result(f"members/{name}")["member.json"])["history"]
                for name in members(broken)] == [fact["history"] for fact in facts]


@pytest.mark.slow
@pytest.mark.parametrize(("partners", "output_layer"), [(1, "whole"), (2, "whole"), (1, "parts"), (2, "parts")])
def test_ranks_that_share_a_split_base_answer_as_workers_of_their_own(
    make_spec: Callable[..., Any], content: dict[str, Any], changes: dict[str, Any], partners: int,
    output_layer: str,
) -> None:
    """Answers end at different tokens, so that the ranks pass the base unequally often."""
    alone = make_spec(name="alone", **{
        **changes, "ensemble__members": 2, "evaluation__generation": {**GENERATION, "max_new_tokens": 9},
        "placement__members_per_worker": 1, "data__train_rows": 16, "data__test_rows": 34,
        "evaluation__generation__rows": 34, "placement__output_layer": output_layer,
    })
    run(alone)
    together = make_spec(name="together")
    one, two = prepare(together).answers
    pairs = [["member-000"], ["member-001"]] if partners == 1 else [["member-000"]] * 2
    jobs: list[dict[str, list[str]]] = [{"job-00": pair} for pair in pairs]
    if partners == 2:
        for own in jobs:
            own["job-01"] = ["member-001"]
    shards = [[one], [two]] if partners == 1 else [[one, two]] * 2
    for own, names in zip(jobs, shards, strict=True):
        own["answers-000"] = names
    run_gang([Case(copy.deepcopy(content), jobs)], 2, partners=partners)
    found, expected = (
        {file.parent.name: [json.loads(line) for line in file.read_text().splitlines()]
         for file in Path(RunStore.for_spec(spec).uri).glob("answers/*/shards/*/answers.jsonl")}
        for spec in (together, alone)
    )
    assert found.keys() == expected.keys() == {one, two}
    if partners == 1:
        assert_bit_equal(members(alone), members(together))
        assert found == expected
    else:  # shares of a batch are added up in another order
        assert sum(map(len, found.values())) == 34


@pytest.mark.slow
def test_how_answers_were_judged_stays_as_members_were_stopped_by_it(
    make_spec: Callable[..., Any], changes: dict[str, Any]
) -> None:
    spec = make_spec(**{**changes, "optimization__epochs": 1})
    run(spec)

    def changed(**settings: Any) -> Any:
        content = spec.model_dump(mode="json")
        content["evaluation"]["generation"].update(settings)
        return build_spec(content)

    for settings in ({"rows": 4}, {"normalize": "squad"}, {"max_new_tokens": 3}):
        with pytest.raises(RunDirectoryError, match="members were stopped early by what they answered"):
            prepare(changed(**settings))
    prepare(changed(metrics=["f1", "exact_match"]))


@pytest.mark.parametrize(("more", "said"), [
    ({"evaluation__generation": None}, "f1 is of written answers, and evaluation.generation"),
    ({"task__train_on": "all", "evaluation__generation": None}, "instruction has no f1"),
    ({"ensemble__regularizers": {"early_stopping": {"metric": "rmse"}}},
     "use nll or exact_match or f1 or contains or number or choice"),
    ({"evaluation__generation": {"max_new_tokens": 3_000}}, "row"),
])
def test_a_metric_that_nothing_is_written_for_is_refused(
    make_spec: Callable[..., Any], changes: dict[str, Any], tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    spec = make_spec(**changes)
    assert prepare(spec).spec == spec
    with pytest.raises((SpecError, DataError), match=re.escape(said)):
        prepare(make_spec(**more))
    assert not (tmp_path / "runs").exists()
