"""LoRA+: B's own learning rate, against a float64 loop and PEFT's optimizer; packs, refusals, digests."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members, run, weights
from torch import nn

from raylora import registry
from raylora.adapters import lora
from raylora.adapters.base import Site, TwoFactors
from raylora.adapters.packed import attach, make_pack, stack
from raylora.engine.run.checks import doubts
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.optimizer import MemberOptimizer, start_deepspeed
from raylora.engine.training.schedule import learning_rate_factor
from raylora.errors import SpecError
from raylora.spec import OptimizationSpec, RegularizersSpec

Make = Callable[..., Any]
SITES = [Site("l.0.up", 8, 8, 0), Site("l.1.up", 8, 8, 1)]
ADAPTER = lora.build(lora.Spec(rank=2, alpha=6.0))
SHAPES = {"x.lora_A": (2, 5), "x.lora_B": (4, 2), "head:c.weight": (3, 4)}


@pytest.fixture(scope="module", autouse=True)
def _deepspeed() -> None:
    start_deepspeed(torch.device("cpu"))


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def member(start: Any, decays: RegularizersSpec | None = None, anchors: Any = None, **spec: Any) -> MemberOptimizer:
    settings = {"lr": 0.01, "warmup": 0.2, "clip_norm": 0.5, **spec}
    return MemberOptimizer(
        start, ADAPTER, OptimizationSpec(**settings), decays or RegularizersSpec(), 10, torch.device("cpu"), anchors
    )


# --- the update -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_b_takes_steps_of_its_own_rate_and_decays_by_it(stage: int) -> None:
    decays = RegularizersSpec(decay_a=3.0, decay_b=3.0, decay_head=3.0)  # alike: the rate alone makes B a group
    anchor = drawn(7)["x.lora_B"]
    found = member(drawn(0), decays, {"x.lora_B": anchor}, zero_stage=stage, accumulation=2, lora_plus_ratio=4.0)
    p = {name: t.double() for name, t in drawn(0).items()}
    m, v = ({name: torch.zeros_like(t) for name, t in p.items()} for _ in range(2))
    for step in range(5):
        micro = [drawn(100 + 2 * step + n) for n in range(2)]
        for gradients in micro:
            found.backward(gradients)
            found.step()
        g = {name: (micro[0][name].double() + micro[1][name].double()) / 2 for name in p}
        norm = math.sqrt(sum(float((t**2).sum()) for t in g.values()))
        scheduled = 0.01 * learning_rate_factor(found.optimization, step, 10)
        for name in p:
            lr = scheduled * (4.0 if name == "x.lora_B" else 1.0)
            clipped = g[name] * min(1.0, 0.5 / (norm + 1e-6))
            m[name] = 0.9 * m[name] + 0.1 * clipped
            v[name] = 0.999 * v[name] + 0.001 * clipped**2
            update = m[name] / (1 - 0.9 ** (step + 1)) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            towards = anchor.double() if name == "x.lora_B" else torch.zeros_like(p[name])
            p[name] = p[name] - lr * 3.0 * (p[name] - towards) - lr * update
        assert found.lr == pytest.approx(scheduled) and found.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, tensor in found.tensors().items():
        torch.testing.assert_close(tensor.double(), p[name], rtol=1e-5, atol=1e-6)
    again = member(found.tensors(), decays, {"x.lora_B": anchor}, zero_stage=stage, accumulation=2, lora_plus_ratio=4.0)
    again.load_state(found.state(), 5)
    for number in range(4):
        for one in (found, again):
            one.backward(drawn(200 + number))
            one.step()
    for name, tensor in found.tensors().items():
        torch.testing.assert_close(again.tensors()[name], tensor, rtol=0, atol=1e-7 if stage else 0)


@pytest.mark.parametrize("kind", ["lora", "mos", "melora", "prolora", "boosted_lora"])
def test_every_kind_with_two_factors_moves_its_second_one_ratio_times_as_far(kind: str) -> None:
    module = registry.load("adapter", kind)
    adapter = module.build(module.Spec(**module.FIRST[-1]))
    assert isinstance(adapter, TwoFactors)
    start = adapter.build(SITES, torch.Generator().manual_seed(0))
    spec = OptimizationSpec(lr=0.01, optimizer="sgd", warmup=0.0, clip_norm=None, lora_plus_ratio=8.0)
    one = MemberOptimizer(start, adapter, spec, RegularizersSpec(), 10, torch.device("cpu"))
    one.backward({name: torch.ones_like(t) for name, t in start.items()})
    one.step()
    first = {name for name in start if adapter.decay_group(name) == "a"}
    assert first and all(not start[name].any() for name in start.keys() - first)  # what starts at zero is B
    for name, tensor in one.tensors().items():
        moved = 0.01 * (1.0 if name in first else 8.0)
        torch.testing.assert_close(start[name] - tensor, torch.full_like(tensor, moved), rtol=1e-4, atol=1e-6)


def test_it_trains_what_pefts_own_optimizer_trains() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).requires_grad_(False)
    sites = [Site("0", 6, 5, None), Site("2", 5, 4, None)]
    start = ADAPTER.build(sites, torch.Generator().manual_seed(1))
    theirs = get_peft_model(  # type: ignore[arg-type]
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
        LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"], lora_dropout=0.0),
    )
    inner: Any = theirs.base_model.model
    with torch.no_grad():
        for site in sites:
            layer = inner[int(site.name)]
            layer.base_layer.load_state_dict(plain[int(site.name)].state_dict())
            layer.lora_A["default"].weight.copy_(start[f"{site.name}.lora_A"])
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    ours = member(start, RegularizersSpec(decay_a=0.1, decay_b=0.1), lora_plus_ratio=16.0, schedule="constant",
                  warmup=0.0, clip_norm=None)
    slot = attach(plain, sites, [])
    generator = torch.Generator().manual_seed(2)
    for _ in range(8):
        x, y = torch.randn(7, 6, generator=generator), torch.randn(7, 4, generator=generator)
        optimizer.zero_grad()
        ((theirs(x) - y) ** 2).mean().backward()
        optimizer.step()
        live = {name: t.clone().requires_grad_() for name, t in ours.tensors().items()}
        with slot.use(make_pack(ADAPTER, sites, stack([live]))):
            loss = ((plain(x) - y) ** 2).mean()
        ours.backward(dict(zip(live, torch.autograd.grad(loss, list(live.values())), strict=True)))
        ours.step()
    for site in sites:
        layer = inner[int(site.name)]
        for key, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
            found = ours.tensors()[f"{site.name}.lora_{key}"]
            assert not torch.allclose(found, start[f"{site.name}.lora_{key}"], atol=1e-3)
            torch.testing.assert_close(found, factor["default"].weight.detach(), rtol=1e-4, atol=1e-5)


# --- runs -----------------------------------------------------------------------------------------------
def test_members_of_other_ratios_share_a_forward_and_equal_those_of_a_run_of_their_ratio(
    make_spec: Make, trained: Callable[[Any], str]
) -> None:
    varied = make_spec(name="varied", ensemble__vary={"optimization.lora_plus_ratio": [1.0, 8.0]})
    assert [len(units) for units in prepare(varied).jobs.values()] == [2]
    run(varied)
    found = members(varied)
    for m, ratio in enumerate((None, 8.0)):
        alike = make_spec(name=f"alike-{m}", ensemble__vary=None, optimization__lora_plus_ratio=ratio)
        trained(alike)
        assert_bit_equal(found[f"member-{m:03d}"], weights(alike, f"member-{m:03d}"))
    other = weights(alike, "member-000")  # of ratio 8, the same seed
    assert any(not torch.equal(t, other[name]) for name, t in found["member-000"].items())


def test_a_spec_without_it_keeps_its_digest(make_spec: Make) -> None:
    spec = make_spec()
    assert "lora_plus_ratio" not in spec.identity()["optimization"]
    assert make_spec(optimization__lora_plus_ratio=16.0).digest() != spec.digest()


def test_kinds_without_a_pair_and_decays_beyond_its_rate_are_refused_by_name(make_spec: Make) -> None:
    with pytest.raises(SpecError, match=r"lr \* lora_plus_ratio \* decay_b = 1.6 >= 1.*below 12.5"):
        make_spec(optimization__lora_plus_ratio=16.0, ensemble__regularizers={"decay_a": 20.0, "decay_b": 20.0})
    with pytest.raises(SpecError, match="Input should be greater than 0"):
        make_spec(optimization__lora_plus_ratio=0, ensemble__regularizers=None)
    adapter = {"kind": "lora_xs", "rank": 2, "target_modules": ["query"]}
    with pytest.raises(SpecError, match="lora_plus_ratio: adapter.kind lora_xs has no pair"):
        prepare(make_spec(optimization__lora_plus_ratio=4.0, adapter=adapter))


def test_a_rate_of_b_that_is_far_too_high_is_doubted(make_spec: Make, make_parts: Make) -> None:
    parts = make_parts(optimization__lora_plus_ratio=100.0)
    (told,) = doubts(parts.spec, parts.sets)
    assert told.startswith("optimization.lora_plus_ratio: 0.005 * 100 = 0.5 is far beyond")
