"""An output layer in parts of the vocabulary gives what the whole one gives, also where each rank has a share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gangs import free_address, ready_processes
from test_token_head import assert_equals_float64, small_model

from raylora.adapters.packed import stack
from raylora.engine.model.base import load_base
from raylora.engine.model.blocks import find_blocks
from raylora.engine.model.gang import Gang, GangPlace
from raylora.engine.model.output_parts import OutputInParts, _stored_bytes, pass_in_parts, split_output
from raylora.engine.model.split_table import SplitTable
from raylora.engine.model.token_head import ChunkedHead, find_token_head
from raylora.engine.run.plan_run import prepare
from raylora.errors import BaseError, SpecError
from raylora.placement.estimate import MOST_OUTPUT_PARTS, output_part_rows
from raylora.quant.split import SplitLinear
from raylora.spec.members import KLSpec

CPU = torch.device("cpu")
LANGUAGE = {"task": {"kind": "language_modeling", "max_length": 24}}
Make = Callable[..., Any]


# --- against float64 ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rows", [1, 10, 99, 200])
def test_the_layer_equals_a_reference_in_float64(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    linear = torch.nn.Linear(8, 99)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    layer = OutputInParts(linear.to(dtype).requires_grad_(False), rows)
    states = torch.randn(3, 4, 8, generator=generator).to(dtype).requires_grad_()
    towards = torch.randn(3, 4, 99, generator=generator).to(dtype)
    logits = layer(states)
    (found,) = torch.autograd.grad(logits, states, towards)
    assert logits.dtype == found.dtype == dtype and layer(states[:0]).shape == (0, 4, 99)
    weight_VD, bias_V = linear.weight.double(), linear.bias.double()
    expected = F.linear(states.double(), weight_VD, bias_V), towards.double() @ weight_VD
    for one, other in zip((logits, found), expected, strict=True):
        assert float(((one.double() - other).norm() / other.norm()).detach()) < tolerance


@pytest.mark.parametrize("name", ["likelihood", "top k", "KL"])
def test_losses_and_gradients_equal_a_reference_in_float64(name: str) -> None:
    assert_equals_float64(name, rows=5, cap=2.0, prepare=lambda model: pass_in_parts(model, 7))


def test_parts_are_alike_and_at_most_a_block() -> None:
    for vocabulary, row_bytes, block_bytes in ((49152, 2304, 1_860_000), (99, 64, 640), (1000, 8, 1), (50, 8, 10**9)):
        rows = output_part_rows(vocabulary, row_bytes, block_bytes)
        parts = -(-vocabulary // rows)
        assert parts <= MOST_OUTPUT_PARTS and parts * rows - vocabulary < parts
        assert rows * row_bytes <= block_bytes or parts > MOST_OUTPUT_PARTS / 2
    assert output_part_rows(50, 8, 10**9) == 50, "a table that is smaller than a block is one part"


@pytest.mark.parametrize("kind", ["none", "nf4", "int8", {"kind": "rtn", "bits": 3, "group_size": 32}], ids=str)
def test_a_block_counts_as_it_is_stored_and_is_split(kind: Any, make_parts: Make, tiny_model: Any) -> None:
    parts = make_parts(base={"source": tiny_model("llama"), "dtype": "float32", "quantization": kind},
                       adapter={"kind": "none"}, **LANGUAGE)
    block, quantizer = find_blocks(parts.base.model)[0].module, parts.base.quantizer
    counted = _stored_bytes(block, quantizer)
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, SplitLinear(child, quantizer))
    assert counted == sum(p.nbytes for p in block.parameters()) > 0


# --- members --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_members_are_those_of_a_whole_output_layer_to_tolerance(kind: str, make_parts: Make, tiny_model: Any) -> None:
    changes = {"base__source": tiny_model(kind), "adapter": {"kind": "lora"}, **LANGUAGE}
    whole = make_parts(**changes, placement__output_layer="whole")
    parts = make_parts(**changes, placement__output_layer="parts")
    layer = parts.base.model.get_output_embeddings()
    assert isinstance(layer, OutputInParts) and layer.rows < layer.vocabulary / 20
    members = stack([whole.member(unit, trained=0.1) for unit in whole.units])
    batch, kl = whole.pack(whole.batch(0, 3), whole.batch(3, 3)), KLSpec(beta=0.5)
    expected, found = (one.model.gradients(members, batch, [1, 2], kl) for one in (whole, parts))
    assert found.losses_K == pytest.approx(expected.losses_K, rel=1e-5)
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(*(one.model.scores(members, whole.batch())[0] for one in (parts, whole)))


def test_a_teacher_over_the_same_weights_has_its_output_layer_in_one_piece(make_parts: Make, tiny_model: Any) -> None:
    parts = make_parts(
        base__source=tiny_model("llama"), adapter={"kind": "lora"}, placement__output_layer="parts", **LANGUAGE
    )
    shared = load_base(parts.spec.base, parts.spec.adapter, parts.task, CPU, sharing=parts.base)
    own, other = (one.model.get_output_embeddings() for one in (parts.base, shared))
    assert isinstance(shared.token_head, ChunkedHead) and isinstance(other, torch.nn.Linear)
    assert other.weight.data_ptr() == own.weight.data_ptr()
    members = stack([parts.member(unit, trained=0.1) for unit in parts.units])
    mine, theirs = (
        list(model.token_states(members, parts.batch())) for model in (parts.model, replace(parts.model, base=shared))
    )
    assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
    torch.testing.assert_close(parts.base.token_head.logits(mine[0]), shared.token_head.logits(mine[0]))


@pytest.mark.parametrize(("changes", "says"), [
    ({}, "task.kind classification is not scored token by token"),
    ({"base__source": "llama", "adapter": {"kind": "full"}, **LANGUAGE}, "adapter.kind full have output layers of"),
    ({"base__source": "llama", "adapter__target_modules": ["lm_head"], **LANGUAGE}, "adapts the output layer"),
])
def test_what_has_no_output_layer_to_pass_in_parts_is_refused(
    changes: dict[str, Any], says: str, make_spec: Make, make_parts: Make, tiny_model: Any
) -> None:
    if "base__source" in changes:
        changes = {**changes, "base__source": tiny_model(changes["base__source"])}
    spec = make_spec(**changes, placement__output_layer="parts")
    with pytest.raises(SpecError, match="placement.output_layer: parts: ") as caught:
        prepare(spec)
    assert says in str(caught.value)
    with pytest.raises(BaseError, match="placement.output_layer: parts: "):  # and whoever loads it all the same
        make_parts()


def test_a_model_that_changes_its_logits_is_refused_by_name(
    make_parts: Make, tiny_model: Any, tmp_path: Any
) -> None:
    import shutil

    folder = tmp_path / "cohere"
    shutil.copytree(tiny_model("llama"), folder)
    model = small_model("cohere", logit_scale=0.25)
    model.resize_token_embeddings(16500, mean_resizing=False)
    model.save_pretrained(folder)
    with pytest.raises(BaseError, match=r"placement.output_layer: parts: CohereForCausalLM: its logits are changed"):
        make_parts(base__source=str(folder), adapter={"kind": "lora", "target_modules": ["q_proj"]},
                   placement__output_layer="parts", **LANGUAGE)


# --- a table on several ranks ---------------------------------------------------------------------------
def tables() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randn(103, 6, generator=generator)
    drawn[5, 2] = -0.0
    return [drawn, drawn.to(torch.bfloat16)]


def noted(gathers: list[int], gather: Any, part: int, buffer_B: torch.Tensor) -> Any:
    gathers.append(buffer_B.nbytes)
    return gather(part, buffer_B)


def share(rank: int, ranks: int, address: str, said: Any) -> None:
    """Ask a split table for rows and parts, unequally often, and say what came."""
    torch.set_num_threads(1)
    gang, found = Gang(GangPlace(rank, ranks, address), CPU), []
    for table_VD in tables():
        own = table_VD if rank == 0 else torch.full_like(table_VD, torch.nan)  # nobody else's is read
        table = SplitTable(own, 26, gang, CPU)
        gathers: list[int] = []
        table.gather = partial(noted, gathers, table.gather)  # type: ignore[method-assign]
        ids_N = torch.arange(103).roll(rank)[: 103 if rank else 5]
        rows_ND = table.look_up(ids_N)
        equal = torch.equal(rows_ND.view(torch.uint8), table_VD[ids_N].view(torch.uint8))
        table.enter()
        for _ in range(rank * 2):
            whole = torch.cat([part_RD.clone() for _, part_RD in table.parts()])
            equal = equal and torch.equal(whole.view(torch.uint8), table_VD.view(torch.uint8))
        table.leave()
        try:
            next(table.parts())
            refused = False
        except RuntimeError:
            refused = True
        found.append((equal, len(gathers), max(gathers), table.own_PKB.nbytes / table_VD.nbytes, refused))
    equal, error = True, ""
    for kind in ("gemma3", "gpt2"):
        model = small_model(kind)
        head = find_token_head(model, {"use_cache": False}, CPU)
        pass_in_parts(model, 33)
        with torch.no_grad():
            expected = model(torch.arange(20).view(2, 10)).logits
            split_output(model, gang, CPU)
            equal = equal and torch.equal(model(torch.arange(20).view(2, 10)).logits, expected)
        equal = equal and not any(p.shape == (99, 16) for p in model.parameters())
        try:
            head.logits(torch.zeros(1, 16))
        except RuntimeError as refused_too:
            error = str(refused_too)
    said.put((rank, found, (equal, error)))


def test_ranks_share_a_table_and_ask_for_it_unequally_often() -> None:
    context, address = ready_processes(), free_address()
    said: Any = context.Queue()
    processes = [context.Process(target=share, args=(rank, 3, address, said)) for rank in range(3)]
    for process in processes:
        process.start()
    try:
        heard = [said.get(timeout=120) for _ in processes]
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    for _, of_tables, (equal, error) in heard:
        assert equal and "within a pass that all of its ranks make" in error
        for table_VD, (is_equal, gathers, most, held, refused) in zip(tables(), of_tables, strict=True):
            assert is_equal and refused
            assert gathers == 4 * 4, "as often as the rank that asks most"
            assert most == 27 * 6 * table_VD.dtype.itemsize  # 26 rows, of which three ranks have nine each
            assert held == pytest.approx(4 * 9 / 103)
