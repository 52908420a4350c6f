"""What a worker's memory goes to, against counts by hand and against tensors that are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from raylora.connection import nodes_of
from raylora.engine.model.base import load_base
from raylora.engine.run.plan_run import local_inventory, prepare
from raylora.placement.estimate import MemberShape, ModelShape, activation_bytes, logit_bytes, parts_of
from raylora.placement.inventory import Gpu

LLAMA = ModelShape(
    block_bytes=800, embedding_bytes=90, largest_table_bytes=50, workspace_bytes=7, layers=4, hidden=8, heads=2,
    intermediate=16, vocabulary=100, compute_bytes=2, is_gated=True,
)
MEMBER = MemberShape(parameters=10, rows=3, time=5, has_token_logits=True, input_widths=24)


def test_the_parts_of_a_gated_block_by_hand() -> None:
    # two norms in float32; q, k, v; the softmax in float32 and again in bfloat16; gate, up and their product
    kept = 2 * 8 * 4 + 3 * 8 * 2 + 2 * 5 * (2 + 4) + 3 * 16 * 2
    counted = 15 * (4 * kept + kept + 24 * 2)
    assert counted < activation_bytes(LLAMA, MEMBER, on_gpu=False) < 1.5 * counted  # and what the heap takes
    fused = kept - 2 * 5 * (2 + 4) + 8 * 2  # attention's output in place of every softmax
    assert activation_bytes(LLAMA, MEMBER, on_gpu=True) == 15 * (4 * fused + fused + 24 * 2)
    again = activation_bytes(LLAMA, MEMBER, on_gpu=True, recomputed=True)
    assert again == 15 * (4 * 8 * 2 + 2 * fused) < activation_bytes(LLAMA, MEMBER, on_gpu=True)
    assert logit_bytes(LLAMA, MEMBER) == 15 * 100 * (3 * 2 + 12)
    chunked = replace(MEMBER, logit_chunk=20)
    assert logit_bytes(LLAMA, chunked) == 2 * 15 * 100 * (2 + 12) + 15 * 8 * 3 * 2
    assert logit_bytes(LLAMA, chunked, 3, on_gpu=True) == 20 * 100 * (2 + 12) + 3 * 15 * 8 * 3 * 2


def test_a_pack_multiplies_what_members_have_and_nothing_else() -> None:
    one, three = parts_of(LLAMA, MEMBER, 1), parts_of(LLAMA, MEMBER, 3)
    assert (three.base, three.embeddings, three.workspace, three.runtime) == (800, 90, 7, one.runtime)
    for name in ("adapters", "optimizer", "activations", "logits"):
        assert getattr(three, name) == 3 * getattr(one, name) > 0
    assert one.total == sum(one.by_name().values()) == one.shared + one.own and one.shared == 890


def test_a_split_base_is_held_in_parts_and_gathered() -> None:
    split = parts_of(LLAMA, MEMBER, 1, ranks=4)
    assert (split.base, split.embeddings, split.gathered) == (200, 23, 2 * 200)
    tables = ModelShape(block_bytes=8, layers=4, largest_table_bytes=50)
    assert parts_of(tables, MEMBER, 1, ranks=2).gathered == 50


def test_an_output_layer_in_parts_is_a_part_and_a_block_at_once() -> None:
    model = ModelShape(
        block_bytes=80, layers=4, largest_table_bytes=500, largest_beside_output_bytes=30, output_part_bytes=15,
        output_bytes=500,
    )
    assert parts_of(model, MEMBER, 1, ranks=2).gathered == 500
    in_parts = replace(model, output_in_parts=True)
    assert parts_of(in_parts, MEMBER, 1, ranks=2).gathered == 2 * 20
    assert parts_of(replace(in_parts, output_part_bytes=33), MEMBER, 1, ranks=2).gathered == 20 + 33
    assert parts_of(replace(in_parts, largest_beside_output_bytes=90), MEMBER, 1, ranks=2).gathered == 90
    assert parts_of(in_parts, MEMBER, 1).gathered == 0


def test_an_evaluation_counts_where_its_logits_are_more_than_training_keeps() -> None:
    assert parts_of(LLAMA, MEMBER, 1).evaluation == 0
    read = MemberShape(has_token_logits=True, evaluated_tokens=1000)
    assert parts_of(LLAMA, read, 1).evaluation == 1000 * 100 * (2 * 2 + 8)
    assert parts_of(LLAMA, replace(read, logit_chunk=20), 1).evaluation == 20 * 100 * (2 * 2 + 8)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_base_takes_what_the_shell_says(
    kind: str, quantization: str, make_spec: Callable[..., Any], tiny_model: Callable[[str], str]
) -> None:
    spec = make_spec(
        base__source=tiny_model(kind), base__quantization=quantization, base__dtype="bfloat16",
        adapter__target_modules="all-linear", **({"task": {"kind": "language_modeling", "max_length": 24}}
                                                 if kind == "llama" else {}),
    )
    prepared = prepare(spec, local_inventory(in_process=True))
    session = prepared.make_session(1, 0)
    base = load_base(spec.base, spec.adapter, session.task, session.device)
    held: dict[int, int] = {}
    for module in base.model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        tensors += [*vars(state).values(), *vars(state.state2).values()] if state is not None else []
        tensors += [getattr(getattr(module, "weight", None), "SCB", None)]
        held |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors if hasattr(tensor, "data_ptr")}
    parts = prepared.plan.parts
    # members' heads and the positions' buffers are not told apart here, nor are tables that layers share
    assert parts.shared == pytest.approx(sum(held.values()), rel=0.05)


def test_rays_nodes_are_told_apart_and_what_is_not_known_is_said() -> None:
    def node(name: str, **has: float) -> dict[str, Any]:
        resources = {key.replace("__", ":"): value for key, value in has.items()}
        return {"NodeManagerAddress": name, "Resources": resources}

    asked: list[str | None] = []

    def memory_of(kind: str | None) -> int:
        asked.append(kind)
        return {"accelerator_type:H200": 141, "accelerator_type:L4": 24, None: 40}[kind] * 10**9

    alive = [
        node("a", CPU=8, memory=1e9, GPU=2, accelerator_type__H200=1), node("b", CPU=4, memory=2e9),
        node("c", CPU=8, memory=1e9, GPU=1, accelerator_type__H200=1), node("d", CPU=8, GPU=1, accelerator_type__L4=1),
    ]
    nodes, assumed = nodes_of(alive, memory_of)
    assert asked == ["accelerator_type:H200", "accelerator_type:L4"] and assumed == ()
    assert [found.gpus for found in nodes] == [(Gpu(141 * 10**9),) * 2, (), (Gpu(141 * 10**9),), (Gpu(24 * 10**9),)]
    assert [found.name for found in nodes] == ["a", "b", "c", "d"] and nodes[1].memory_bytes == 2 * 10**9
    _, assumed = nodes_of([node("e", CPU=8, GPU=4)], memory_of)
    assert assumed == ("all GPUs whose kind Ray does not know have 40 GB, as the first",)
