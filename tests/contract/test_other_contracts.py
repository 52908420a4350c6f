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
        stack(members), parts.pack(parts.batch(0), parts.batch(4)), [1, 2]
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


QUANTIZATIONS: list[Any] = [
    *({"kind": kind} for kind in registry.kinds("quantization")),
    {"kind": "nf4", "double_quant": False},
    {"kind": "rtn", "bits": 3, "group_size": 24},
    {"kind": "rtn", "bits": 2, "group_size": "channel"},
]


def linears_of(parts: Any) -> list[Any]:
    """Return the frozen linear layers below the adapters of every block, which any kind quantizes."""
    found = [parts.base.model.get_submodule(site.name).base for site in parts.base.sites if site.block is not None]
    assert len(found) == 12
    return found


def held_tensors(linear: Any) -> dict[int, torch.Tensor]:
    """Return all that a layer keeps of its weight, each memory once: parameters, buffers, and bitsandbytes' state."""
    held = [tensor for name, tensor in (*linear.named_parameters(), *linear.named_buffers()) if name != "bias"]
    states = [getattr(linear.weight, "quant_state", None), getattr(linear, "state", None)]
    states += [getattr(state, "state2", None) for state in states]
    held += [tensor for state in states if state is not None for tensor in vars(state).values()
             if isinstance(tensor, torch.Tensor)]
    held += [linear.weight.SCB] if getattr(linear.weight, "SCB", None) is not None else []
    return {tensor.data_ptr(): tensor for tensor in held}


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_a_quantizer_knows_what_loaded_layers_take(
    quantization: dict[str, Any], make_parts: Callable[..., Any]
) -> None:
    """Exactly, up to the rounding of the fraction: a base's size decides how many workers fit."""
    parts = make_parts(base__quantization=quantization, base__calibration=READS.get(quantization["kind"]),
                       adapter__target_modules="all-linear")
    for linear in linears_of(parts):
        taken_bytes = sum(tensor.nbytes for tensor in held_tensors(linear).values())
        shape = linear.out_features, linear.in_features
        bits = parts.base.quantizer.bits_per_weight(shape, dense_bits=32)
        assert bits * shape[0] * shape[1] == pytest.approx(8 * taken_bytes, rel=1e-9)


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_what_it_dequantizes_is_what_the_layer_multiplies_by(
    quantization: dict[str, Any], make_parts: Callable[..., Any]
) -> None:
    parts = make_parts(base__quantization=quantization, base__calibration=READS.get(quantization["kind"]),
                       adapter__target_modules="all-linear")
    tolerance = 1e-3 if quantization["kind"] == "int8" else 1e-6  # int8 multiplies in 16 bits
    for linear in linears_of(parts):
        for _ in range(2):  # bitsandbytes moves the scales of 8-bit layers in the first forward
            weight_OI = parts.base.quantizer.dequantize(linear).float()
            assert weight_OI.shape == (linear.out_features, linear.in_features)
            with torch.no_grad():
                y_IO = linear(torch.eye(linear.in_features)) - linear.bias
            assert (y_IO.T - weight_OI).abs().max() <= tolerance * weight_OI.abs().max()


def test_what_it_dequantizes_holds_a_frozen_pair_as_well(make_parts: Callable[..., Any]) -> None:
    parts = make_parts(base__quantization={"kind": "rtn", "bits": 2}, base__calibration=READS["optq"],
                       base__compensation={"kind": "cloq", "rank": 4}, adapter__target_modules="all-linear")
    for linear in linears_of(parts):
        assert linear.pair_A_RI is not None and linear.pair_A_RI.any()
        with torch.no_grad():
            y_IO = linear(torch.eye(linear.in_features)) - linear.bias
        torch.testing.assert_close(y_IO.T, parts.base.quantizer.dequantize(linear), rtol=1e-5, atol=1e-6)


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
    assert task.auto_class.startswith("AutoModelFor") and (task.columns or task.optional_columns)
    assert task.output in registry.kinds("output") and task.output in registry.kinds("report")
    assert (task.num_outputs == 0) is output_of(task.output).per_token
    assert task.label_names == [] or task.num_outputs == len(task.label_names) >= 2
    methods = {name: say for name, say in vars(Task).items() if inspect.isfunction(say) and not name.startswith("_")}
    assert methods.keys() >= {"model_kwargs", "tokenize", "collate", "scores", "loss"}
    for name, promised in methods.items():  # callable by position and by name as the protocol says
        assert list(inspect.signature(getattr(type(task), name)).parameters) == list(
            inspect.signature(promised).parameters), name
    assert {task.padding_side(False), task.padding_side(True)} <= {"left", "right"}
