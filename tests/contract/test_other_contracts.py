"""What every registered quantization, task and tracker promises; a new kind is tested by being registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from raylora import registry
from raylora.adapters.packed import stack
from raylora.data.task import Task
from raylora.ensemble.outputs import output_of
from raylora.spec import TaskSpec, TrackerSpec

READS = {"optq": {"source": "pypi:bbc-news", "samples": 8, "length": 64, "held_out": 0}}
"""What kinds that look at data are given to read."""
TASKS: dict[str, dict[str, Any]] = {"classification": {"num_labels": 2}, "multiple_choice": {"options": 2}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", registry.kinds("quantization"))
def test_a_base_loads_on_a_cpu_and_gradients_reach_the_adapters(
    kind: str, dtype: str, make_parts: Callable[..., Any]
) -> None:
    parts = make_parts(base__quantization=kind, base__dtype=dtype, base__calibration=READS.get(kind),
                       adapter__target_modules="all-linear")
    before = {n: p.detach().clone() for n, p in parts.base.model.named_parameters()}
    members = [parts.member(unit, trained=0.05) for unit in parts.units]
    outcome = parts.model.gradients(
        stack(members), [parts.batch(0), parts.batch(4)], [1, 2]
    )
    assert all(0.1 < loss < 5 for loss in outcome.losses_K)
    for gradients in outcome.gradients:
        for name, gradient in gradients.items():
            assert torch.isfinite(gradient).all() and gradient.dtype == torch.float32, name
            assert gradient.any(), name
    after = dict(parts.base.model.named_parameters())
    assert all(torch.equal(before[n], after[n]) and not after[n].requires_grad for n in before)


@pytest.mark.parametrize("kind", registry.kinds("quantization"))
def test_a_quantized_base_predicts_nearly_what_the_base_predicts(kind: str, make_parts: Callable[..., Any]) -> None:
    plain = make_parts()
    quantized = make_parts(base__quantization=kind, base__calibration=READS.get(kind))
    batch = plain.batch(0, 16)
    with torch.no_grad():
        one, two = (
            parts.base.model.bert(**batch.model_inputs()).last_hidden_state for parts in (plain, quantized)
        )
    assert float((one - two).norm() / one.norm()) < 0.25
    assert torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("kind", registry.kinds("quantization"))
def test_its_spec_reads_back_equal(kind: str) -> None:
    spec = registry.load("quantization", kind).Spec()
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("kind", registry.kinds("tracker"))
def test_a_tracker_can_be_asked_whether_it_works_and_built(kind: str) -> None:
    module = registry.load("tracker", kind)
    spec = module.Spec()
    assert isinstance(spec, TrackerSpec) and spec.kind == kind
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec
    assert list(inspect.signature(module.check).parameters) == ["spec"]
    assert list(inspect.signature(module.build).parameters) == ["spec", "run"]


@pytest.mark.parametrize("kind", registry.kinds("task"))
def test_a_task_spec_reads_back_equal_and_declares_a_registered_output(kind: str) -> None:
    module = registry.load("task", kind)
    spec = module.Spec(**TASKS.get(kind, {}))
    assert isinstance(spec, TaskSpec) and spec.kind == kind
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec
    task = module.build(spec)
    assert task.auto_class.startswith("AutoModelFor") and task.columns
    assert task.output in registry.kinds("output") and task.output in registry.kinds("report")
    assert (task.num_outputs == 0) is output_of(task.output).per_token
    assert task.label_names == [] or task.num_outputs == len(task.label_names) >= 2
    methods = {name: say for name, say in vars(Task).items() if inspect.isfunction(say) and not name.startswith("_")}
    assert methods.keys() >= {"model_kwargs", "tokenize", "collate", "scores", "loss"}
    for name, promised in methods.items():  # callable by position and by name as the protocol says
        assert list(inspect.signature(getattr(type(task), name)).parameters) == list(
            inspect.signature(promised).parameters), name
    assert {task.padding_side(False), task.padding_side(True)} <= {"left", "right"}
