"""Ranks that compute on a GPU: a base split over them, members on two of them, and a base filled from its file.

A machine with one GPU is enough: two ranks share it over gloo, since NCCL wants a GPU for each. NCCL itself carries a
gang of one, which partitions and gathers as a larger one does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gangs import Case, run_gang
from run_helpers import members

from raylora.engine.model.base import load_base
from raylora.engine.quantization.quantize_base import ensure_prepared
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.distillation_loss import task_of
from raylora.spec import RunSpec, build_spec
from raylora.store.run_store import RunStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MakeSpec = Callable[..., RunSpec]

CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "nf4": {"base": {"quantization": "nf4"}},
    "3 bits": {"base": {"quantization": {"kind": "rtn", "bits": 3, "group_size": 16}}},
    "bfloat16, dropout, blocks run again": {
        "base": {"quantization": "nf4", "dtype": "bfloat16"}, "adapter": {"dropout": 0.1},
        "placement": {"recompute": True},
    },
    "a reference, and members that stop early": {
        "optimization": {"epochs": 4, "steps": None},
        "ensemble": {"regularizers": {"kl": {"beta": 0.5}, "early_stopping": {"metric": "nll", "patience": 1}}},
    },
}
IN_PARTS: dict[str, dict[str, Any]] = {
    "an output layer in parts": {
        "base": {"quantization": "nf4"}, "adapter": {"target_modules": None},
        "task": {"kind": "language_modeling", "max_length": 24, "labels": None},
        "placement": {"output_layer": "parts"}, "ensemble": {"regularizers": {"kl": {"beta": 0.5}}},
    },
}


def cases_in(folder: Path, content: dict[str, Any], names: list[str], groups: int, partners: int = 1) -> list[Case]:
    """Return runs of two members for each group of partners, begun, with everybody's share."""
    found = []
    for number, name in enumerate(names):
        own = json.loads(json.dumps(content))
        for section, values in {**CASES, **IN_PARTS}[name].items():
            own[section] = {k: v for k, v in {**own[section], **values}.items() if v is not None}
        own["placement"]["gpus_per_worker"] = 1
        own["storage_path"], own["name"] = str(folder), f"case-{number}"
        own["ensemble"]["members"] = 2 * groups
        prepared = prepare(build_spec(own))
        if prepared.base is not None:
            ensure_prepared(prepared.spec.base, task_of(prepared.spec), prepared.base, torch.device("cuda"))
        prepared.begin()
        units = [unit.name for unit in prepared.units]
        shares = [units[group::groups] for group in range(groups) for _ in range(partners)]
        found.append(Case(own, [{f"job-rank-{rank}": share} for rank, share in enumerate(shares)]))
    return found


def share_held(session: Any, rank: int) -> float:
    """Return a rank's share of the base's stored bytes between two passes; all of it is on the GPU."""
    parameters = list(session.base.model.parameters())
    assert all(p.ds_tensor.is_cuda for p in parameters)
    whole = sum(p.ds_numel * p.element_size() for p in parameters)
    return sum(p.ds_tensor.ds_numel * p.ds_tensor.element_size() for p in parameters) / whole


def assert_members_close(one: Case, two: Case, name: str, atol: float) -> None:
    """Compare the members of two runs to a tolerance: attention's backward pass on a GPU adds in any order."""
    expected, found = (members(RunStore.for_spec(build_spec(case.content)).uri) for case in (one, two))
    assert expected.keys() == found.keys() and len(expected) >= 2, name
    for member, tensors in expected.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(
                found[member][key], tensor, rtol=1e-2, atol=atol, msg=lambda m, k=f"{name} {member} {key}": f"{k}: {m}"
            )


@pytest.mark.parametrize(("ranks", "backend"), [(2, "gloo"), (1, "")], ids=["two over gloo", "one over nccl"])
def test_members_over_a_split_base_equal_those_over_a_whole_one(
    ranks: int, backend: str, content: dict[str, Any], tmp_path: Path
) -> None:
    names = list(CASES)
    alone, together = (cases_in(tmp_path / where, content, names, ranks) for where in ("alone", "together"))
    run_gang(alone, ranks, is_split=False, gpus=1)
    held = run_gang(together, ranks, check=share_held, gpus=1, backend=backend)
    for number, name in enumerate(names):
        assert max(held[number]) <= 1 / ranks + 0.05, name
        assert_members_close(alone[number], together[number], name, atol=2e-2 if "bfloat16" in name else 5e-4)


@pytest.mark.parametrize(("ranks", "backend"), [(2, "gloo"), (1, "")], ids=["two over gloo", "one over nccl"])
@pytest.mark.parametrize("source", ["llama", "gpt2"])
def test_an_output_layer_in_parts_is_passed_in_the_same_way_where_ranks_share_it(
    source: str, ranks: int, backend: str, content: dict[str, Any], tiny_model: Callable[[str], str], tmp_path: Path
) -> None:
    content["base"]["source"], names = tiny_model(source), list(IN_PARTS)
    alone, together = (cases_in(tmp_path / where, content, names, ranks) for where in ("alone", "together"))
    run_gang(alone, ranks, is_split=False, gpus=1)
    run_gang(together, ranks, gpus=1, backend=backend)
    assert_members_close(alone[0], together[0], names[0], atol=5e-4)


def test_members_of_partners_equal_those_of_one_rank_to_tolerance(content: dict[str, Any], tmp_path: Path) -> None:
    content["optimization"]["zero_stage"] = 2
    names = ["dense", "nf4"]
    alone, together = cases_in(tmp_path / "alone", content, names, 1), cases_in(
        tmp_path / "together", content, names, 1, partners=2
    )
    run_gang(alone, 1, is_split=False, gpus=1)
    run_gang(together, 2, is_split=False, partners=2, gpus=1, backend="gloo")
    for number, name in enumerate(names):
        assert_members_close(alone[number], together[number], name, atol=5e-4)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_base_is_filled_from_its_file_in_pieces(quantization: str, make_spec: MakeSpec) -> None:
    spec = make_spec(base__source="pypi:minilm-l6", base__quantization=quantization)
    task, device = task_of(spec), torch.device("cuda")
    load_base(spec.base, spec.adapter, task, device)  # makes the file
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    base = load_base(spec.base, spec.adapter, task, device)
    largest = max(p.numel() * p.element_size() for p in base.model.parameters())
    assert torch.cuda.memory_allocated() - before <= 1.02 * base.size_bytes
    assert torch.cuda.max_memory_allocated() - before <= 1.02 * base.size_bytes + largest
