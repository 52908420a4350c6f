"""LoRA's forward and AdamW's update against float64 written out by hand; ZeRO stages and restored state."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from raylora.adapters import lora
from raylora.adapters.base import Site
from raylora.adapters.packed import Dropout, Masks, attach, make_pack, stack
from raylora.engine.training.optimizer import MemberOptimizer, engines_let_go, start_deepspeed
from raylora.engine.training.schedule import learning_rate_factor
from raylora.spec import OptimizationSpec, RegularizersSpec

ADAPTER = lora.build(lora.Spec(rank=2, alpha=6.0))
SHAPES = {"x.lora_A": (2, 5), "x.lora_B": (4, 2), "head:c.weight": (3, 4), "head:c.bias": (3,)}
DECAYS = RegularizersSpec(decay_a=3.0, decay_b=2.0, decay_head=1.0)


@pytest.fixture(scope="module", autouse=True)
def _deepspeed() -> None:
    start_deepspeed(torch.device("cpu"))


def tensors(seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def optimizer(start: dict[str, Any], total: int = 10, decays: RegularizersSpec = DECAYS, **spec: Any) -> Any:
    settings = {"lr": 0.01, "warmup": 0.2, "clip_norm": 0.5, **spec}
    return MemberOptimizer(start, ADAPTER, OptimizationSpec(**settings), decays, total, torch.device("cpu"))


def drive(member: Any, first: int, last: int, accumulation: int = 1) -> None:
    for number in range(first * accumulation, last * accumulation):
        member.backward(tensors(100 + number))
        boundary = member.step()
        assert boundary == ((number + 1) % accumulation == 0)


# --- the layer -------------------------------------------------------------------------------------------
def test_the_packed_layer_equals_a_float64_loop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).requires_grad_(False)
    weight, bias = model[0].weight.double(), model[0].bias.double()
    site = Site("0", 5, 4, 0)
    slot = attach(model, [site], [])
    generator = torch.Generator().manual_seed(1)
    members = [{"0.lora_A": torch.randn(2, 5, generator=generator), "0.lora_B": torch.randn(4, 2, generator=generator)}
               for _ in range(3)]
    x = torch.randn(6, 7, 5, generator=generator)  # 3 members, 2 rows each
    with slot.use(make_pack(ADAPTER, [site], stack(members))):
        y = model(x)
    for row in range(6):
        a, b = (members[row // 2][f"0.lora_{part}"].double() for part in "AB")
        for time in range(7):
            v = x[row, time].double()
            h = [sum(a[r, i] * v[i] for i in range(5)) for r in range(2)]
            for o in range(4):
                expected = bias[o] + sum(weight[o, i] * v[i] for i in range(5))
                expected = expected + 6.0 / 2 * sum(b[o, r] * h[r] for r in range(2))
                assert float(y[row, time, o]) == pytest.approx(float(expected), abs=1e-5)
    torch.testing.assert_close(model(x), x @ weight.float().T + bias.float(), rtol=1e-5, atol=1e-6)


def test_the_slot_is_empty_again_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    site = Site("0", 5, 4, 0)
    slot = attach(model, [site], [])
    with pytest.raises(RuntimeError, match="stop"), slot.use(make_pack(ADAPTER, [site], stack([{
        "0.lora_A": torch.ones(2, 5), "0.lora_B": torch.ones(4, 2)}]))):
        raise RuntimeError("stop")
    assert slot.pack is None


@pytest.mark.parametrize("left_padded", [True, False])
def test_dropout_masks_are_a_members_own_whatever_the_pack_is_padded_to(left_padded: bool) -> None:
    x = torch.ones(2, 3, 9, 50)
    packed = Dropout(0.25, Masks([7, 8], [6, 9], left_padded)).apply(x, 3)
    alone = Dropout(0.25, Masks([7], [6], left_padded)).apply(x[:1, :, :6], 3)
    part = packed[0, :, 3:] if left_padded else packed[0, :, :6]
    torch.testing.assert_close(part, alone[0], rtol=0, atol=0)
    assert packed[1].unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (packed[1] == 0).float().mean() == pytest.approx(0.25, abs=0.04)
    assert packed[1].mean() == pytest.approx(1.0, abs=0.06)
    other = Dropout(0.25, Masks([7, 8], [6, 9], left_padded))
    assert not torch.equal(other.apply(x, 4), packed)
    assert torch.equal(other.apply(x, 3), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 5, 24), (3, 5, 7)])  # also where the numbers do not fill whole words
def test_dropout_in_a_pack_without_padding_is_bit_equal_to_dropout_alone(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    time = shape[1]
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    packed = Dropout(0.25, Masks([7, 8, 9], [time] * 3, False)).apply(x, 2)
    (gradient,) = torch.autograd.grad(packed.sum(), x)
    for k, seed in enumerate((7, 8, 9)):
        alone = Dropout(0.25, Masks([seed], [time], False)).apply(x[k : k + 1], 2)
        assert torch.equal(packed[k], alone[0]) and alone.dtype == dtype
        assert torch.equal(packed[k], x[k] * gradient[k])
        assert set(gradient[k].unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75).to(dtype))}


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
def test_dropout_drops_with_its_probability_at_every_place(probability: float) -> None:
    x = torch.ones(2, 64, 32, 512)
    y = Dropout(probability, Masks([3, 4], [32, 32], False)).apply(x, 0)
    dropped = (y == 0).double()
    error = math.sqrt(probability * (1 - probability) / dropped.numel())
    assert dropped.mean().item() == pytest.approx(probability, abs=4 * error)
    assert y.double().mean().item() == pytest.approx(1.0, abs=4 * error / (1 - probability) + 2e-5)
    for lane in range(4):  # four numbers come from one word
        assert dropped[..., lane::4].mean().item() == pytest.approx(probability, abs=5 * 2 * error)


def test_dropout_is_independent_between_members_sites_places_and_steps() -> None:
    x = torch.ones(2, 32, 32, 256)

    def dropped(seeds: list[int], site: int) -> torch.Tensor:
        return (Dropout(0.5, Masks(seeds, [32, 32], False)).apply(x, site) == 0).double() - 0.5

    one = dropped([3, 4], 0)
    count = one[0].numel()
    others = [one[1], dropped([3, 4], 1)[0], dropped([5, 6], 0)[0]]
    others += [one[0].flatten().roll(shift).view_as(one[0]) for shift in (1, 2, 3, 4, 256, 32 * 256)]
    for other in others:  # the mean of products of +-1/2 has a standard deviation of 1 / (4 sqrt(n))
        assert abs((one[0] * other).mean().item()) < 4.5 / (4 * math.sqrt(count))


# --- the update ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_adamw_equals_a_float64_loop(stage: int, accumulation: int) -> None:
    member = optimizer(tensors(), zero_stage=stage, accumulation=accumulation)
    spec, steps = member.optimization, 5
    drive(member, 0, steps, accumulation)
    p = {name: t.double() for name, t in tensors().items()}
    m, v = ({name: torch.zeros_like(t) for name, t in p.items()} for _ in range(2))
    decay = {"x.lora_A": 3.0, "x.lora_B": 2.0, "head:c.weight": 1.0, "head:c.bias": 1.0}
    for step in range(steps):
        micro = [tensors(100 + step * accumulation + n) for n in range(accumulation)]
        g = {name: sum(part[name].double() for part in micro) / accumulation for name in p}
        norm = math.sqrt(sum(float((t**2).sum()) for t in g.values()))
        lr = 0.01 * learning_rate_factor(spec, step, 10)
        for name in p:
            clipped = g[name] * min(1.0, 0.5 / (norm + 1e-6))
            m[name] = 0.9 * m[name] + 0.1 * clipped
            v[name] = 0.999 * v[name] + 0.001 * clipped**2
            m_hat, v_hat = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.999 ** (step + 1))
            p[name] = p[name] * (1 - lr * decay[name]) - lr * m_hat / (v_hat.sqrt() + 1e-8)
    for name, found in member.tensors().items():
        torch.testing.assert_close(found.double(), p[name], rtol=1e-5, atol=1e-6)
    assert member.grad_norm == pytest.approx(norm, rel=1e-5) and member.steps_done == steps
    assert member.lr == pytest.approx(lr)


WIDE = {  # odd sizes, and the matrices of a decay do not lie beside one another
    "x.lora_A": (3, 5), "x.lora_B": (4, 3), "y.lora_A": (3, 7), "y.lora_B": (5, 3), "head:c.weight": (3, 4),
    "head:c.bias": (3,),
}


def wide(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in WIDE.items()}


def one_group_per_matrix(
    spec: OptimizationSpec, decay_of: Any, anchors: dict[str, torch.Tensor], steps: int
) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the parameters and torch's optimizer after as many steps, matrix by matrix."""
    parameters = {name: nn.Parameter(t) for name, t in wide(0).items()}
    groups = [{"params": [p], "weight_decay": decay_of(name)} for name, p in parameters.items()]
    kind = torch.optim.AdamW if spec.optimizer == "adamw" else torch.optim.SGD
    inner = kind(groups, lr=spec.lr)
    for step in range(steps):
        for group in inner.param_groups:
            group["lr"] = spec.lr * learning_rate_factor(spec, step, 10)
        for name, p in parameters.items():
            p.grad = sum(wide(100 + step * 2 + n)[name] for n in range(2)) / 2
        torch.nn.utils.clip_grad_norm_(parameters.values(), spec.clip_norm)
        inner.step()
        with torch.no_grad():
            for name, anchor in anchors.items():
                parameters[name].add_(inner.param_groups[0]["lr"] * decay_of(name) * anchor)
    return {name: p.detach() for name, p in parameters.items()}, {n: inner.state[p] for n, p in parameters.items()}


@pytest.mark.parametrize("rules", [{}, {"decay_a": 3.0}, {"decay_b": 2.0}, {"decay_a": 2.0, "decay_b": 2.0},
                                   {"decay_a": 3.0, "decay_b": 2.0, "decay_head": 1.0}])
@pytest.mark.parametrize("anchored", [(), ("x.lora_B", "y.lora_A")])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_flat_parameters_equal_one_group_per_matrix(
    stage: int, kind: str, anchored: tuple[str, ...], rules: dict[str, float]
) -> None:
    spec = OptimizationSpec(lr=0.01, warmup=0.2, clip_norm=0.5, accumulation=2, zero_stage=stage, optimizer=kind)
    anchors = {name: wide(7)[name] for name in anchored}
    start = wide(0)
    member = MemberOptimizer(start, ADAPTER, spec, RegularizersSpec(**rules), 10, torch.device("cpu"), anchors)
    for number in range(10):
        member.backward(wide(100 + number))
        member.step()

    def decay_of(name: str) -> float:
        return rules.get("decay_head" if name.startswith("head") else f"decay_{name[-1].lower()}", 0.0)

    expected, moments = one_group_per_matrix(spec, decay_of, anchors, 5)
    assert list(member.tensors()) == list(WIDE) and all(torch.equal(start[n], t) for n, t in wide(0).items())
    for name, found in member.tensors().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-6)
    state = member.state()
    assert len(state) == (12 if kind == "adamw" else 0)
    for name, tensor in state.items():
        matrix, _, key = name.partition("|")
        torch.testing.assert_close(tensor, moments[matrix][key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "decays"), [("adamw", DECAYS), ("adamw", RegularizersSpec()), ("sgd", RegularizersSpec())]
)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_restored_state_goes_on_as_if_nothing_had_happened(stage: int, kind: str, decays: RegularizersSpec) -> None:
    settings = {"zero_stage": stage, "accumulation": 2, "optimizer": kind, "decays": decays}
    unbroken, broken = (optimizer(tensors(), **settings) for _ in range(2))
    drive(unbroken, 0, 6, 2)
    drive(broken, 0, 3, 2)
    saved = {n: t.clone() for n, t in broken.tensors().items()}, broken.state()
    assert all(t.dtype == torch.float32 and t.shape == SHAPES[n.partition("|")[0]] for n, t in saved[1].items())
    assert len(saved[1]) == (8 if kind == "adamw" else 0)
    again = optimizer(saved[0], **settings)
    again.load_state(saved[1], 3)
    drive(again, 3, 6, 2)
    tolerance = 0.0 if stage == 0 else 1e-7
    for name, expected in unbroken.tensors().items():
        torch.testing.assert_close(again.tensors()[name], expected, rtol=tolerance, atol=tolerance)
    for name, expected in unbroken.state().items():
        torch.testing.assert_close(again.state()[name], expected, rtol=tolerance, atol=tolerance)


def test_the_zero_stages_give_one_result() -> None:
    found = []
    for stage in (0, 1, 2):
        member = optimizer(tensors(), zero_stage=stage, accumulation=2)
        drive(member, 0, 4, 2)
        found.append((member.tensors(), member.state()))
    for parameters, state in found[1:]:
        for name, expected in found[0][0].items():
            torch.testing.assert_close(parameters[name], expected, rtol=1e-6, atol=1e-7)
        for name, expected in found[0][1].items():
            torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("rule", "group"), [("decay_a", "x.lora_A"), ("decay_b", "x.lora_B"),
                                              ("decay_head", "head:c.weight")])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_decay_shrinks_its_group_by_exactly_one_minus_lr_times_decay(rule: str, group: str, stage: int) -> None:
    member = optimizer(
        tensors(), decays=RegularizersSpec(**{rule: 50.0}), warmup=0.0, schedule="constant", zero_stage=stage
    )
    member.backward({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    member.step()
    for name, start in tensors().items():
        same = name.split(":")[0] == group.split(":")[0] and (group.startswith("head") or name == group)
        expected = start * (1 - 0.01 * 50.0) if same else start
        torch.testing.assert_close(member.tensors()[name], expected, rtol=1e-6, atol=0)


def test_without_a_clip_the_gradient_is_used_as_it_is() -> None:
    member = optimizer(tensors(), clip_norm=None, optimizer="sgd", decays=RegularizersSpec(), warmup=0.0)
    member.backward({name: 100 * t for name, t in tensors(5).items()})
    member.step()
    for name, start in tensors().items():
        torch.testing.assert_close(member.tensors()[name], start - 0.01 * 100 * tensors(5)[name], rtol=1e-5, atol=1e-5)


def test_an_unstepped_member_has_no_state_and_restores_from_none() -> None:
    member = optimizer(tensors())
    assert member.state() == {}
    member.load_state({}, 0)
    drive(member, 0, 1)
    assert member.steps_done == 1


def test_two_engines_do_not_share_anything() -> None:
    one, two, alone = optimizer(tensors(1)), optimizer(tensors(2)), optimizer(tensors(1))
    for number in range(3):
        for member, seed in ((one, number), (two, 50 + number), (alone, number)):
            member.backward(tensors(seed))
            member.step()
    for name in SHAPES:
        assert torch.equal(one.tensors()[name], alone.tensors()[name])
        assert not torch.equal(one.tensors()[name], two.tensors()[name])


@pytest.mark.parametrize("set_aside", [False, True])
def test_what_an_optimizer_took_is_freed_with_it_and_nothing_stays_set_aside(set_aside: bool) -> None:
    gc.collect()
    gc.disable()  # Python is not to free it by chance
    try:
        if set_aside:
            gc.freeze()
        with engines_let_go():
            member = optimizer(tensors())
            drive(member, 0, 1)
            parameters = [weakref.ref(p_P) for p_P in member.engine.parameters()]
            del member
            assert any(one() is not None for one in parameters)  # engines refer to themselves
        assert parameters and all(one() is None for one in parameters)
        assert (gc.get_freeze_count() > 0) == set_aside
    finally:
        gc.unfreeze()
        gc.enable()


def test_a_linker_that_misses_libraries_is_not_heard_in_a_notebook() -> None:
    program = (
        "import io, sys, torch\n"
        "class Notebook(io.StringIO):\n"
        "    def fileno(self):\n"
        "        return self.file.fileno()\n"  # a notebook's is not the one that other programs inherit
        "sys.stderr = Notebook()\n"
        "sys.stderr.file = open('/dev/null', 'w')\n"
        "from raylora.engine.training.optimizer import start_deepspeed\n"
        "start_deepspeed(torch.device('cpu'))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
