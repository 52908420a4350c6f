"""Members and predictions as bytes: nothing is lost, and nothing that is not a number is saved."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from raylora.data.task import CutsRows
from raylora.data.tasks import language_modeling
from raylora.engine.model import serialization
from raylora.engine.training import predict
from raylora.ensemble.outputs.classes import ClassPredictions
from raylora.ensemble.predictions import Predictions
from raylora.errors import StoreError


def some(member: int, name: str = "test", ids: tuple[str, ...] = ("a", "b", "c")) -> Predictions:
    logits = torch.randn(1, len(ids), 2, generator=torch.Generator().manual_seed(member))
    return ClassPredictions(name=name, role="test", ids=list(ids), values=logits, labels_N=torch.tensor([0, 1, 1]))


def test_a_state_reads_back_with_names_that_hold_slashes_and_bars() -> None:
    sections = {"member": {"x.lora_A": torch.randn(2, 3)}, "optimizer": {"x.lora_A|exp_avg": torch.randn(2, 3)}}
    facts = {"step": 3, "history": [{"step": 1.0, "loss": 0.1 + 0.2}], "best_value": None}
    found, same = serialization.unpack_state(serialization.pack_state(sections, facts))
    assert same == facts and found.keys() == sections.keys()
    assert all(torch.equal(found[s][n], sections[s][n]) for s in sections for n in sections[s])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_is_never_saved(value: float) -> None:
    with pytest.raises(StoreError, match=r"member/x is not finite"):
        serialization.pack_state({"member": {"x": torch.tensor([1.0, value])}}, {})


def test_views_and_shared_tensors_are_saved_on_their_own() -> None:
    whole = torch.arange(12.0).view(3, 4)
    state = {"a": whole[1], "b": whole.T, "c": whole}
    found = serialization.unpack_state(serialization.pack_state({"member": state}, {}))[0]["member"]
    assert all(torch.equal(found[n], state[n]) for n in state)


def test_predictions_read_back_equal_and_join_by_member() -> None:
    packed = [serialization.pack_predictions([some(m), some(m, "other")]) for m in range(3)]
    parts = [serialization.unpack_predictions(files) for files in packed]
    joined = serialization.join_members(parts)
    assert [p.name for p in joined] == ["test", "other"] and joined[0].members == 3
    for m in range(3):
        assert torch.equal(joined[0].values[m], some(m).values[0])
    assert torch.equal(joined[0].labels(), some(0).labels())


def test_members_evaluated_on_different_rows_are_not_joined() -> None:
    with pytest.raises(StoreError, match="different rows of set 'test'"):
        serialization.join_members([[some(0)], [replace(some(1), ids=["a", "c", "b"])]])


def test_tokens_bear_their_documents_id_even_where_it_holds_a_hash() -> None:
    scores, mask = torch.zeros(2, 4), torch.tensor([[True, False, True, True]])
    task = language_modeling.build(language_modeling.Spec())
    assert isinstance(task, CutsRows)
    values, ids = predict._row(scores, mask, 0, task.document("issue#12#0"))
    assert ids == ["issue#12"] * 2 and values.shape == (2, 2)
