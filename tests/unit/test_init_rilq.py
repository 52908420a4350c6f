"""RILQ: pairs tuned through the whole model against Adam on its weights; preparations that stop and go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from raylora.engine.model.blocks import find_blocks
from raylora.engine.model.checkpoint import load_dense
from raylora.engine.model.quantized_layers import solved_layers
from raylora.engine.quantization import calibration, quantize_base
from raylora.engine.quantization.quantize_base import PreparedBase, ensure_prepared
from raylora.engine.run.plan_run import prepare
from raylora.errors import BaseError, Interrupted
from raylora.init.rilq import Rilq, Spec, discrepancy
from raylora.quant.rtn import round_to_nearest
from raylora.report.base_page import write_base_report

CPU = torch.device("cpu")
RILQ = {"kind": "rilq", "rank": 4, "steps": 12, "lr": 1e-2}
TEXT = {"source": "pypi:bbc-news", "samples": 4, "length": 32, "held_out": 0}
TASKS = {
    "llama": {"task": {"kind": "language_modeling", "max_length": 32}, "data__train__source": "pypi:bbc-news"},
    "bert": {},
}


@pytest.fixture
def spec_for(
    make_spec: Callable[..., Any], tiny_model: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    monkeypatch.setattr(calibration, "_BATCH_TOKENS", 64)  # a tiny model's vocabulary is a large one's

    def make(kind: str = "llama", **changes: Any) -> Any:
        return make_spec(**{
            "base__source": tiny_model(kind), "base__quantization": {"kind": "rtn", "bits": 2, "group_size": 16},
            "base__compensation": dict(RILQ), "adapter__target_modules": "auto",
            "base__calibration": dict(TEXT),
            **TASKS[kind], **changes,
        })

    return make


def opened(spec: Any) -> tuple[PreparedBase, Any]:
    from raylora import registry

    base = prepare(spec).base
    assert base is not None
    return base, registry.load("task", spec.task.kind).build(spec.task)


def prepared(spec: Any, **options: Any) -> tuple[PreparedBase, Any]:
    base, task = opened(spec)
    return base, ensure_prepared(spec.base, task, base, CPU, **options)


def pairs_of(spec: Any, base: PreparedBase) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    layers = [layer for block in range(2) for layer in solved_layers(base.store, block, spec.base.grid)]
    return {layer.name: layer.pair for layer in layers if layer.pair is not None}


def passed(model: Any, batch: Any, weights: dict[str, torch.Tensor], last: nn.Module) -> tuple[torch.Tensor, Any]:
    """Return the last block's output, and the model's, with other weights."""
    seen: list[torch.Tensor] = []
    handle = last.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    try:
        output = functional_call(model, weights, (), dict(batch))
    finally:
        handle.remove()
    return seen[0], output


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_its_steps_are_those_of_adam_on_the_models_weights(kind: str, spec_for: Callable[..., Any]) -> None:
    spec = spec_for(kind)
    base, summary = prepared(spec)
    assert base.calibration is not None and len(base.calibration.batches) > 1
    found = pairs_of(spec, base)
    _, task = opened(spec)
    model = load_dense(spec.base, task, CPU).double().eval().requires_grad_(False)
    last = find_blocks(model)[-1].module
    batches = base.calibration.batches
    wanted = [passed(model, batch, {}, last)[0] for batch in batches]
    own = Rilq(Spec.model_validate(RILQ))
    pairs, rounded = {}, {}
    for name in found:
        weight_OI = model.get_submodule(name).weight
        quantized, a_RI, b_OR = own.solve(weight_OI, lambda w: round_to_nearest(w.float(), 2, 16), weight_OI, name)
        rounded[name] = quantized.dequantize().double()
        pairs[name] = nn.Parameter(a_RI.double()), nn.Parameter(b_OR.double())
    adam = torch.optim.Adam([factor for pair in pairs.values() for factor in pair], lr=1e-2)
    losses = []
    for step in range(12):
        batch, target = batches[step % len(batches)], wanted[step % len(batches)]
        weights = {f"{name}.weight": rounded[name] + b @ a for name, (a, b) in pairs.items()}
        hidden, output = passed(model, batch, weights, last)
        real = batch["attention_mask"].bool()
        loss = ((hidden - target)[real] ** 2).sum() / (target[real] ** 2).sum()
        losses.append(float(loss.detach()))
        if kind == "llama":
            tokens = batch["attention_mask"][:, 1:].bool()
            entropy = F.cross_entropy(output.logits[:, :-1][tokens], batch["input_ids"][:, 1:][tokens])
            loss = 0.5 * loss + 0.5 * entropy
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert losses[-1] < 0.9 * losses[0]
    for name, (a, b) in pairs.items():
        for one, two in zip(found[name], (a, b), strict=True):
            distance = float((one.double() - two.detach()).norm() / two.detach().norm())
            assert distance < 0.02, name  # float16 as stored; Adam's first steps are as large for the least gradient
    assert all(b.any() for _, b in found.values())
    assert {"weight", "quantized"} == set(summary["layers"][0]) - {"name", "shape"}


def test_a_tuned_base_is_nearer_to_the_full_model_and_has_a_report(spec_for: Callable[..., Any]) -> None:
    from raylora.engine.model.base import load_base

    distances = []
    for name, compensation in (("plain", None), ("tuned", {**RILQ, "steps": 40, "lr": 5e-3, "lm_weight": 0.0})):
        spec = spec_for(name=name, base__compensation=compensation)
        base, summary = prepared(spec)
        assert base.calibration is not None
        _, task = opened(spec)
        dense = load_dense(spec.base, task, CPU).eval()
        loaded = load_base(spec.base, spec.adapter, task, CPU, base.store).model
        batch = base.calibration.batches[0]
        with torch.no_grad():
            one, two = (passed(model, batch, {}, find_blocks(model)[-1].module)[0] for model in (dense, loaded))
        distances.append(float(discrepancy(two, one)))
    assert distances[1] < 0.8 * distances[0]
    page = Path(write_base_report(summary, base.store.uri)).read_text()
    assert all(layer["name"] in page for layer in summary["layers"]) and page.count("data:image/png") == 1


@pytest.mark.slow
def test_a_preparation_that_stops_while_or_after_tuning_ends_the_same(
    spec_for: Callable[..., Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_spec = spec_for(storage_path=str(tmp_path / "whole"))
    whole, _ = prepared(whole_spec)
    spec = spec_for(storage_path=str(tmp_path / "broken"))
    calls: list[int] = []

    def stop() -> int:
        calls.append(1)
        return 15 if len(calls) == 8 else 0  # twice for blocks, then in the sixth step

    with pytest.raises(Interrupted, match="stopped at step 5 of 12 in which pairs are tuned"):
        prepared(spec, should_stop=stop)

    real = quantize_base._Preparation._commit
    commits: list[int] = []

    def torn(self: Any, index: int, *rest: Any) -> None:
        commits.append(index)
        if index == 1:
            raise KeyboardInterrupt
        real(self, index, *rest)

    monkeypatch.setattr(quantize_base._Preparation, "_commit", torn)
    with pytest.raises(KeyboardInterrupt):
        prepared(spec)
    monkeypatch.setattr(quantize_base._Preparation, "_commit", real)
    monkeypatch.setattr(quantize_base, "tune_pairs", None)  # it is done once
    broken, _ = prepared(spec)
    assert commits == [0, 1]
    for block in range(2):
        one, two = (b.store.load_result(f"blocks/block-{block:03d}")["layers.safetensors"] for b in (whole, broken))
        assert one == two


def test_a_loss_that_is_not_finite_and_a_rank_that_does_not_fit_are_refused(spec_for: Callable[..., Any]) -> None:
    with pytest.raises(BaseError, match=r"base.compensation.lr: the loss of all pairs is nan at step 2"):
        prepared(spec_for(base__compensation={**RILQ, "lr": 1e30}))
    with pytest.raises(BaseError, match="rank: 33 for "):
        prepared(spec_for(base__compensation={**RILQ, "rank": 33}))


def test_the_discrepancy_is_relative_to_what_is_wanted() -> None:
    wanted_ND = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert float(discrepancy(wanted_ND, wanted_ND)) == 0
    assert float(discrepancy(1.5 * wanted_ND, wanted_ND)) == pytest.approx(0.25)
