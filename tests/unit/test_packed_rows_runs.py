"""Runs that pack their rows: the members of runs that do not, what they say of padding, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gangs import Case, run_gang
from run_helpers import assert_bit_equal, members, run, stop_at

from raylora.engine.run.plan_run import prepare
from raylora.errors import Interrupted, SpecError
from raylora.placement.estimate import MemberShape
from raylora.spec import build_spec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]


@pytest.fixture
def make_run(make_spec: Make, tiny_model: Callable[[str], str], tmp_path: Path) -> Make:
    """Return a function to a run of two members of a tiny llama on rows of 2 to 24 tokens."""
    file = tmp_path / "rows.jsonl"
    text = "the film is long and the end of it comes late but who saw the first one will not mind at all"
    rows = ({"text": f"{n} {text[: 4 + n * n % 61]}"} for n in range(40))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes: Any) -> Any:
        return make_spec(**{
            "base": {"source": tiny_model("llama"), "dtype": "float32", "quantization": "none"},
            "adapter": {"kind": "lora", "rank": 4, "alpha": 8}, "task": {"kind": "language_modeling", "max_length": 24},
            "data": {"train": {"files": str(file)}, "validation_rows": 4, "test_rows": 4},
            "optimization": {"optimizer": "sgd", "lr": 0.5, "steps": 6, "micro_batch": 7, "accumulation": 2},
            "evaluation": {"bootstrap_samples": 0}, **changes,
        })

    return make


def test_members_are_those_of_a_run_that_packs_nothing(make_run: Make) -> None:
    said: list[str] = []
    tokens: dict[str, list[int]] = {"apart": [], "packed": []}
    for name in tokens:
        spec = make_run(name=name, optimization__pack_rows=name == "packed")

        def note(progress: Any, name: str = name) -> None:
            tokens[name].append(progress.tokens)
            said.extend(line for line in progress.news if line.startswith("rows packed: "))

        run(spec, note)
    assert tokens["apart"] == tokens["packed"] and len(tokens["packed"]) == 6
    one, other = members(make_run(name="apart", optimization__pack_rows=False)), members(make_run(name="packed"))
    for member, tensors in one.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(other[member][key], tensor, rtol=1e-4, atol=1e-6)
    (line,) = said
    assert line in prepare(make_run(name="next", optimization__pack_rows=True)).notes


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.slow
def test_a_run_that_is_stopped_resumes_to_bit_equal_members(make_run: Make, stop: int) -> None:
    changes = {
        "adapter__dropout": 0.1, "checkpointing": {"every_steps": 2}, "ensemble__regularizers": {"kl": {"beta": 0.1}},
        "optimization__pack_rows": True,
    }
    whole = make_run(name="whole", **changes)
    run(whole)
    broken = make_run(name="broken", **changes)
    with pytest.raises(Interrupted):
        run(broken, stop_at(stop))
    assert RunStore.for_spec(broken).checkpoint_steps("member-000")[-1] == stop
    run(broken)
    assert_bit_equal(members(whole), members(broken))


def test_a_plan_counts_sequences(make_run: Make) -> None:
    plain, packed = prepare(make_run()), prepare(make_run(optimization__pack_rows=True))
    one, other = plain.demand.member, packed.demand.member
    assert isinstance(other, MemberShape) and one.rows == 7 and other.rows < 7 and other.time <= 24
    assert other.tokens < one.tokens and other.evaluated_tokens == one.evaluated_tokens
    assert packed.plan.parts.logits < plain.plan.parts.logits
    assert not any(note.startswith("rows packed") for note in plain.notes)


def test_it_is_part_of_a_runs_identity_only_where_it_is_on(make_run: Make) -> None:
    plain, packed = make_run(), make_run(optimization__pack_rows=True)
    assert "pack_rows" not in plain.identity()["optimization"] and plain.digest() != packed.digest()


def test_rows_that_are_answered_once_are_not_packed(make_spec: Make) -> None:
    with pytest.raises(SpecError, match="optimization.pack_rows: a model of classification answers once per sequence"):
        prepare(make_spec(optimization__pack_rows=True))


def test_a_cache_of_rows_and_packing_are_refused_together(make_run: Make) -> None:
    with pytest.raises(SpecError, match="cache_trunk keeps rows in sequences of their own"):
        make_run(optimization__pack_rows=True, optimization__cache_trunk=True)


@pytest.mark.parametrize("where", ["adapter__dropout", "baselines__mc_dropout"])
def test_dropout_is_not_shared_out_among_workers(where: str, make_run: Make) -> None:
    changes = {where: 0.1 if where == "adapter__dropout" else {"dropout": 0.1}}
    shared = {"optimization__pack_rows": True, "placement__data_parallel": 2}
    with pytest.raises(SpecError, match="placement.data_parallel: with optimization.pack_rows"):
        prepare(make_run(**shared, **changes))


def test_rows_of_like_length_are_packed_too(make_run: Make) -> None:
    spec = make_run(optimization__pack_rows=True, optimization__group_by_length=True)
    (note,) = (note for note in prepare(spec).notes if note.startswith("rows packed"))
    assert note.endswith("%")


@pytest.mark.slow
@pytest.mark.parametrize("is_split", [True, False], ids=["over a split base", "sharing every batch"])
def test_ranks_of_a_gang_pack_rows(is_split: bool, make_run: Make, tmp_path: Path) -> None:
    cases = []
    for folder in ("together", "alone"):
        spec = make_run(storage_path=str(tmp_path / folder), optimization__pack_rows=True)
        prepared = prepare(spec)
        prepared.begin()
        units = [unit.name for unit in prepared.units]
        shares = [units] if folder == "alone" else [[units[0]], [units[1]]] if is_split else [units, units]
        cases.append(Case(spec.model_dump(mode="json"), [{f"job-{n}": share} for n, share in enumerate(shares)]))
    run_gang(cases[:1], 2, is_split=is_split, partners=1 if is_split else 2)
    run_gang(cases[1:], 1, is_split=False)
    together, alone = (members(RunStore.for_spec(build_spec(case.content)).uri) for case in cases)
    for name, tensors in alone.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(together[name][key], tensor, rtol=1e-4, atol=1e-6)
