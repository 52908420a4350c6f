"""Blocks that are run again in the backward pass: the same members, and fewer activations kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members, run
from sweeps import sweep

from raylora.adapters.packed import stack
from raylora.engine.model.recompute import recompute_blocks
from raylora.engine.run.plan_run import prepare
from raylora.errors import SpecError

LANGUAGE = {"task": {"kind": "language_modeling", "max_length": 24}}
CASES: dict[str, dict[str, Any]] = {
    "dropout and a reference": {"adapter__dropout": 0.1, "ensemble__regularizers": {"kl": {"beta": 0.5}}},
    "nf4": {"base__quantization": "nf4", "adapter__target_modules": "all-linear"},
    "shared pools": {"adapter": {"kind": "mos", "rank": 2}},
    "dora": {"adapter": {"kind": "dora"}},
    "the last block": {"adapter__layers": {"last": 1}, "ensemble__data_order": "shared"},
    "llama": {"source": "llama", **LANGUAGE, "adapter": {"kind": "lora"}},
    "gpt2": {"source": "gpt2", **LANGUAGE, "adapter": {"kind": "lora"}},
}


@pytest.mark.parametrize("name", sweep(CASES, ["dropout and a reference", "nf4"]))
def test_members_are_the_same(name: str, make_spec: Callable[..., Any], tiny_model: Any, tmp_path: Any) -> None:
    changes = dict(CASES[name])
    if "source" in changes:
        changes["base__source"] = tiny_model(changes.pop("source"))
    plain = make_spec(storage_path=str(tmp_path / "plain"), **changes)
    again = make_spec(storage_path=str(tmp_path / "again"), placement__recompute=True)
    assert plain.digest() == again.digest(), "it decides memory and time, and nothing of the result"
    run(plain)
    run(again)
    assert_bit_equal(members(plain), members(again))


def kept_bytes(parts: Any) -> int:
    """Return the bytes that a pass keeps for its backward pass, each memory once."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    pack = stack([parts.member(unit) for unit in parts.units])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        parts.model.gradients(pack, parts.pack(parts.batch(0, 8), parts.batch(8, 8)), [1, 2])
    base = {t.untyped_storage().data_ptr() for t in parts.base.model.parameters()}
    return sum(size for start, size in kept.items() if start not in base)


def test_activations_are_not_kept(make_parts: Callable[..., Any]) -> None:
    plain = make_parts(adapter__target_modules="all-linear")
    before = kept_bytes(plain)
    recompute_blocks(plain.base.model)
    assert kept_bytes(plain) < before / 4


def test_whole_models_are_refused(make_spec: Callable[..., Any]) -> None:
    with pytest.raises(SpecError, match="placement.recompute"):
        prepare(make_spec(adapter={"kind": "full"}, placement__recompute=True))
