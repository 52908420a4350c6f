"""A base that is split over the ranks of a gang: members bit-equal to those of workers with bases of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gangs import Case, run_gang
from run_helpers import assert_bit_equal, members

from raylora.adapters.base import Site
from raylora.adapters.side_by_side import adapter_of
from raylora.engine.model.gang import GangPlace, Round
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.model.split_table import SplitTable
from raylora.engine.quantization.quantize_base import ensure_prepared
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.distillation_loss import task_of
from raylora.engine.training.trainer import PackTrainer, TrainingSettings
from raylora.errors import BaseError
from raylora.placement import estimate
from raylora.quant.split import SplitEmbedding, SplitLinear
from raylora.spec import build_spec
from raylora.store.run_store import RunStore

CPU = torch.device("cpu")
READS = {"source": "pypi:bbc-news", "samples": 8, "length": 64, "held_out": 0}
LANGUAGE: dict[str, Any] = {"task": {"kind": "language_modeling", "max_length": 24}}
IN_PARTS: dict[str, Any] = {  # rank 0 has two members to rank 1's one, and needs more chunks of positions
    **LANGUAGE, "placement": {"output_layer": "parts"}, "optimization": {"steps": 3},
    "ensemble": {"members": 3, "regularizers": {"kl": {"beta": 0.5}}},
}

CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "nf4": {"base": {"quantization": "nf4"}},
    "nf4 with plain scales": {"base": {"quantization": {"kind": "nf4", "double_quant": False}}},
    "int8": {"base": {"quantization": "int8"}},
    "rtn": {"base": {"quantization": {"kind": "rtn", "bits": 3, "group_size": 24}}},
    "optq with its pair": {"base": {
        "quantization": {"kind": "optq", "bits": 2, "group_size": 16}, "calibration": READS,
        "compensation": {"kind": "cloq", "rank": 4},
    }},
    "bfloat16": {"base": {"quantization": "nf4", "dtype": "bfloat16"}},
    "dropout, and packs of two": {"adapter": {"dropout": 0.1}, "ensemble": {"members": 4}},
    "shared pools": {"adapter": {"kind": "mos", "rank": 2}},
    "a reference, and members that stop early": {
        "optimization": {"epochs": 4, "steps": None},
        "ensemble": {"regularizers": {"kl": {"beta": 0.5}, "early_stopping": {"metric": "nll", "patience": 1}}},
    },
    "blocks that are run again": {"adapter": {"dropout": 0.1}, "placement": {"recompute": True}},
    "heads alone": {"adapter": {"kind": "none"}},
    "tied embeddings": {"source": "tied", **LANGUAGE},
    "gpt2": {"source": "gpt2", **LANGUAGE},
    "an output layer in parts": {"source": "tied", **IN_PARTS},
    "an output layer in parts, with a softcap": {"source": "capped", "base": {"quantization": "nf4"}, **IN_PARTS},
}

ALWAYS = ["a reference, and members that stop early", "an output layer in parts"]


def merged(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(json.dumps(content))
    for section, values in changes.items():
        if section == "task":
            found["task"] = values
        elif section != "source":
            found[section].update(values)
            found[section] = {key: value for key, value in found[section].items() if value is not None}
    if "source" in changes or changes.get("adapter", {}).get("kind") not in (None, "lora", "mos"):
        found["adapter"] = {key: found["adapter"][key] for key in ("kind",)}
    return found


def cases_in(
    folder: Path, content: dict[str, Any], names: list[str], ranks: int, model: Callable[[str], str]
) -> list[Case]:
    """Return the cases with runs that are begun, and their members dealt out to the ranks."""
    found = []
    for number, name in enumerate(names):
        changes = CASES[name]
        own = merged(content, changes)
        own["storage_path"], own["name"] = str(folder), f"case-{number}"
        if "source" in changes:
            own["base"]["source"] = model(changes["source"])
        own["ensemble"]["members"] = max(own["ensemble"]["members"], ranks)
        prepared = prepare(build_spec(own))
        if prepared.base is not None:
            ensure_prepared(prepared.spec.base, task_of(prepared.spec), prepared.base, CPU)
        prepared.begin()
        units = [unit.name for unit in prepared.units]
        found.append(Case(own, [{f"job-{rank:02d}": units[rank::ranks]} for rank in range(ranks)]))
    return found


def predictions(store: RunStore) -> dict[str, bytes]:
    """Return every file that was predicted, by its place in the run."""
    root = Path(store.uri)
    files = sorted(root.glob("predictions/**/*.safetensors"))
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture
def model(tiny_model: Callable[[str], str], tmp_path: Path) -> Callable[[str], str]:
    """Return a function from an architecture's name to a model's folder, with one whose embeddings are tied."""
    def folder_of(name: str) -> str:
        of, changes = {
            "tied": ("llama", {"tie_word_embeddings": True}), "capped": ("gemma3", {"final_logit_softcapping": 2.0}),
        }.get(name, (name, {}))
        if not changes:
            return tiny_model(name)
        import shutil

        import transformers

        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(tiny_model(of), folder)
            config = transformers.AutoConfig.from_pretrained(folder)
            for key, value in changes.items():
                setattr(config, key, value)
            torch.manual_seed(1)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return str(folder)

    return folder_of


def small_chunks() -> None:
    """Pass output layers with few positions at a time, as one would with large vocabularies."""
    estimate.CHUNK_BYTES = 4 * 16384 * 128


def find_blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the blocks of a model whose linear layers have been replaced."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=len))


def what_is_held(session: Any, rank: int) -> dict[str, float]:
    """Return a rank's share of the base's stored bytes between two passes, and what of it is gathered."""
    parameters, tables = list(session.base.model.parameters()), tables_of(session)
    whole = sum(p.ds_numel * p.element_size() for p in parameters)
    held = sum(p.ds_tensor.ds_numel * p.ds_tensor.element_size() for p in parameters)
    whole += sum(table.length * table.width * table.dtype.itemsize for table in tables)
    held += sum(table.own_PKB.nbytes for table in tables)
    blocks = [
        sum(p.ds_numel * p.element_size() for p in block.parameters()) for block in find_blocks_of(session.base.model)
    ]
    between = sum(p.numel() * p.element_size() for p in parameters)
    # The tables of these small models are so large that a part of one may be more than a block.
    piece = max(*blocks, *(p.ds_numel * p.element_size() for p in parameters), *(t.part_bytes for t in tables))
    most, turns = most_gathered(session)
    return {
        "share": held / whole, "gathered": between / max(blocks), "most": most / piece, "turns": turns,
        "largest table": max((table.part_bytes / max(blocks) for table in tables), default=0.0),
    }


def tables_of(session: Any) -> list[SplitTable]:
    return [module for module in session.base.model.modules() if isinstance(module, SplitTable)]


def most_gathered(session: Any) -> tuple[int, float]:
    """Return the most bytes that are whole, or on their way, when any layer is passed; all ranks pass it together.

    Where an output layer is passed in parts, they take a training step together, and how often all parts were gathered
    is told besides.
    """
    parameters, found, gathers = list(session.base.model.parameters()), [0], [0]

    def note(*arguments: Any, more: int = 0) -> None:
        there = [p for p in parameters if p.ds_status.name != "NOT_AVAILABLE"]
        found.append(more + sum(p.ds_numel * p.element_size() for p in there))

    def noted(gather: Any, part: int, buffer_B: torch.Tensor) -> Any:
        note(more=buffer_B.nbytes)
        gathers[0] += 1
        return gather(part, buffer_B)

    layers = [module for module in session.base.model.modules() if list(module.parameters(recurse=False))]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    for table in tables_of(session):
        table.gather = partial(noted, table.gather)  # type: ignore[method-assign]
    if tables_of(session):
        rank = session.gang.place.rank
        take_step(session, ["member-000", "member-002"] if rank == 0 else ["member-001"])
        session.gang.leave()
    else:
        with session.base.round(Round.FORWARD):
            session.base.gang._join(Round.FORWARD)
    for handle in handles:
        handle.remove()
    return max(found), gathers[0] / max([1, *(len(table.own_PKB) for table in tables_of(session))])


def take_step(session: Any, names: list[str]) -> None:
    """Train some of a session's members for one step."""
    plans = [session.plans[name] for name in names]
    model = PackedModel(session.base, adapter_of(plans[0].adapter), session.task)
    trainer = PackTrainer(model, TrainingSettings.of(session.spec), plans, session.sets.train.examples, [])
    with trainer.collator() as collator:
        trainer.take_step(collator)


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        pytest.param(2, ALWAYS, id="2"),
        pytest.param(4, ["dense"], id="4", marks=pytest.mark.slow),
        pytest.param(2, [name for name in CASES if name not in ALWAYS], id="2, the others", marks=pytest.mark.slow),
        pytest.param(
            4, ["tied embeddings", "int8", "an output layer in parts"], id="4, others", marks=pytest.mark.slow
        ),
    ],
)
def test_members_equal_those_of_workers_with_bases_of_their_own(
    ranks: int, names: list[str], content: dict[str, Any], model: Callable[[str], str], tmp_path: Path
) -> None:
    """Uneven work is part of it: members stop early, and a rank with a shorter job joins the others' passes."""
    alone, together = (cases_in(tmp_path / where, content, names, ranks, model) for where in ("alone", "together"))
    run_gang(alone, ranks, is_split=False, before=small_chunks)
    held = run_gang(together, ranks, check=what_is_held, before=small_chunks)
    for number, name in enumerate(names):
        one, two = (RunStore.for_spec(build_spec(cases[number].content)) for cases in (alone, together))
        assert_bit_equal(members(one.uri), members(two.uri), name)
        assert predictions(one) == predictions(two) and predictions(one), name
        for said in held[number]:
            assert said["share"] <= 1 / ranks + 0.05, name
            assert said["gathered"] <= 2, name
            assert said["most"] <= 2, name  # what is passed, and what is fetched ahead
        if CASES[name].get("placement", {}).get("output_layer") == "parts":
            # Logits, a reference's and a gradient for every chunk: one of rank 1's, and more of rank 0's.
            turns = {said["turns"] for said in held[number]}
            assert len(turns) == 1 and max(turns) >= 6 and max(turns) % 3 == 0, name
            assert all(0 < said["largest table"] <= (8 if "softcap" in name else 1) for said in held[number]), name


def test_a_whole_weight_is_refused(make_parts: Callable[..., Any]) -> None:
    base = make_parts().base

    base.gang = SimpleNamespace(place=GangPlace(0, 2, "localhost:1"))  # what a rank knows; nobody else is asked
    with pytest.raises(BaseError, match="split over 2 ranks"):
        base.weight_of(base.sites[0].name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_is_looked_up_part_by_part(dtype: torch.dtype) -> None:
    table_VD = torch.randn(103, 7).to(dtype)
    ids_BT = torch.randint(0, 103, (4, 9))
    for rows in (1, 10, 103, 200):
        split = SplitEmbedding(table_VD, rows)
        assert torch.equal(split(ids_BT), torch.nn.functional.embedding(ids_BT, table_VD))
        assert sum(p.nbytes for p in split.parameters()) == table_VD.nbytes
        assert max(p.numel() for p in split.parameters()) == min(rows, 103) * 7 * dtype.itemsize


@pytest.mark.parametrize("kind", ["none", "nf4", "int8", {"kind": "rtn", "bits": 3, "group_size": 24}], ids=str)
def test_a_layer_keeps_nothing_between_its_passes(kind: Any, make_parts: Callable[..., Any]) -> None:
    parts = make_parts(base__quantization=kind, adapter__target_modules="all-linear")
    site: Site = parts.base.sites[0]
    linear = parts.base.model.get_submodule(site.name).base
    x_NI = torch.randn(6, site.in_features, requires_grad=True)
    weight_NO = torch.randn(6, site.out_features)
    (linear(x_NI) * weight_NO).sum().backward()
    expected, x_NI.grad = x_NI.grad, None
    expected_y = linear(x_NI).detach()
    layer = SplitLinear(linear, parts.base.quantizer)
    held = {name: parameter.data for name, parameter in layer.named_parameters()}
    y_NO = layer(x_NI)
    for parameter in layer.parameters():  # gone after the forward pass ...
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    for name, parameter in layer.named_parameters():  # ... and back, elsewhere, before the backward one
        parameter.data = held[name].clone()
    (y_NO * weight_NO).sum().backward()
    assert torch.equal(y_NO, expected_y) and torch.equal(x_NI.grad, expected)

