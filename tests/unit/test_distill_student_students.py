"""Who can be a student: other architectures and tokenizers, every family of adapter, quantized bases, ensembles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sweeps import sweep

from raylora.engine.distillation.plan import prepare_distillation
from raylora.engine.model.checkpoint import load_tokenizer
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.distillation_loss import load_targets, task_of
from raylora.spec import DistillSpec, RunSpec
from raylora.store.run_store import RunStore

LORA = {"kind": "lora", "rank": 2, "alpha": 4, "target_modules": ["query", "value"]}
GPT2 = {"kind": "lora", "rank": 2, "alpha": 4, "target_modules": ["c_attn"]}
STUDENTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "other tokenizer": ("gpt2", {}, GPT2),
    "mos": ("bert", {}, {"kind": "mos", "equivalent_rank": 2, "rank": 2, "private_rank": 1,
                         "target_modules": ["query", "value"]}),
    "peft": ("bert", {}, {"kind": "peft", "method": "LORA", "target_modules": ["query", "value"],
                          "options": {"r": 2, "lora_alpha": 4, "use_dora": True}}),
    "full": ("bert", {}, {"kind": "full"}),
    "nf4": ("bert", {"quantization": "nf4"}, LORA),
    "rtn": ("bert", {"quantization": {"kind": "rtn", "bits": 4, "group_size": 16}}, LORA),
}


@pytest.fixture
def teacher(make_spec: Callable[..., Any], trained: Callable[[Any], str]) -> RunSpec:
    """Return the spec of a finished run of two members."""
    spec: RunSpec = make_spec(evaluation__bootstrap_samples=0, optimization__steps=2)
    trained(spec)
    return spec


def taught(teacher: RunSpec, student: dict[str, Any], **changes: Any) -> RunSpec:
    """Return the spec of a student that has been taught."""
    settings = DistillSpec.model_validate({"student": student, "costs": False, "alone": False, **changes})
    work = prepare_distillation(RunStore.for_spec(teacher).uri, settings)
    run_in_process(work.targets)
    run_in_process(prepare(work.student))
    return work.student


@pytest.mark.parametrize("name", sweep(STUDENTS, ["other tokenizer", "mos"]))
def test_a_student_may_be_another_model(teacher: RunSpec, tiny_model: Callable[[str], str], name: str) -> None:
    architecture, more, adapter = STUDENTS[name]
    base = {"source": tiny_model(architecture), "dtype": "float32", "quantization": "none", **more}
    student = taught(teacher, {"base": base, "adapter": adapter})
    members = RunStore.for_spec(student).read_json("metrics.json")["members"]
    tested = members[0]["eval"]["test"]
    assert tested["rows"] == 24 and 0 < tested["nll"] < 2
    assert RunStore.for_spec(student).read_spec().adapter.kind == adapter["kind"]


@pytest.mark.slow
def test_two_tokenizers_read_the_same_rows(teacher: RunSpec, tiny_model: Callable[[str], str]) -> None:
    base = {"source": tiny_model("gpt2"), "dtype": "float32", "quantization": "none"}
    student = taught(teacher, {"base": base, "adapter": GPT2})
    ours, theirs = (load_tokenizer(spec.base, task_of(spec)) for spec in (teacher, student))
    text = "A film to remember."
    assert ours(text)["input_ids"] != theirs(text)["input_ids"]
    assert student.distill_from is not None
    keys = load_targets(RunStore(f"{RunStore.for_spec(teacher).uri}/targets/{student.distill_from.targets}")).keys
    assert len(keys) == 40  # every training row, whichever tokenizer reads it


def test_students_may_be_an_ensemble(teacher: RunSpec, tiny_model: Callable[[str], str]) -> None:
    base = {"source": tiny_model("bert"), "dtype": "float32", "quantization": "none"}
    student = taught(teacher, {"base": base, "adapter": LORA, "members": 3, "seed": 5})
    metrics = RunStore.for_spec(student).read_json("metrics.json")
    nll = torch.tensor([member["eval"]["test"]["nll"] for member in metrics["members"]])
    assert len(nll) == 3 and len(set(nll.tolist())) == 3  # seeds of their own
    assert metrics["ensemble"]["eval"]["test"]["nll"] <= float(nll.mean())
    assert metrics["ensemble"]["eval"]["test"]["mutual_information"] > 0
