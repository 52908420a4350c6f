"""The same promises on a GPU; the CPU tests are the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from run_helpers import run

from raylora import registry
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.run.session import TrainingSession
from raylora.engine.training.trainer import PackTrainer, TrainingSettings
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MakeSpec = Callable[..., RunSpec]


def trainers(spec: RunSpec) -> tuple[PackTrainer, list[PackTrainer]]:
    session = TrainingSession(spec, RunStore.for_spec(spec), cpus=1, gpus=1)
    session.load()
    model = PackedModel(session.base, registry.load("adapter", "lora").build(spec.adapter), session.task)
    units, sets = list(session.plans.values()), session.sets

    def new(chosen: list) -> PackTrainer:
        return PackTrainer(
            model, TrainingSettings.of(spec), chosen, sets.train.examples, sets.validation.examples
        )

    return new(units), [new([unit]) for unit in units]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_packed_equals_alone_on_a_gpu(make_spec: MakeSpec, quantization: str) -> None:
    spec = make_spec(ensemble__members=4, base__quantization=quantization, placement={"gpus_per_worker": 1})
    packed, alone = trainers(spec)
    for _ in range(3):
        for trainer in (packed, *alone):
            with trainer.collator() as collator:
                trainer.take_step(collator)
        for in_pack, one in zip(packed.states, alone, strict=True):
            assert in_pack.optimizer.parameters["head:classifier.weight"].is_cuda
            for name, tensor in in_pack.optimizer.tensors().items():
                torch.testing.assert_close(tensor, one.states[0].optimizer.tensors()[name], rtol=1e-3, atol=1e-4)


def test_a_whole_run_on_a_gpu_agrees_with_the_cpu(make_spec: MakeSpec) -> None:
    on_gpu = run(make_spec(name="gpu", placement={"gpus_per_worker": 1}))
    on_cpu = run(make_spec(name="cpu", placement={"gpus_per_worker": 0}))
    assert on_gpu["compute"]["device"].startswith("cuda")
    gpu, cpu = (found["ensemble"]["eval"]["test"]["nll"] for found in (on_gpu, on_cpu))
    assert gpu == pytest.approx(cpu, abs=1e-3)
