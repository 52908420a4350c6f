"""What every registered adapter promises with its default spec and others; a new kind is tested by being registered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raylora import registry
from raylora.adapters.base import NeedsBaseWeights, Site, WholeModel
from raylora.errors import BaseError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) (basis|randlora)_A:UserWarning"),  # true, and meant
]

KINDS = registry.kinds("adapter")
SITES = [
    Site(f"model.layers.{block}.{name}", inputs, outputs, block)
    for block in range(3)
    for name, inputs, outputs in (("q_proj", 16, 16), ("up_proj", 16, 32), ("down_proj", 32, 16))
]
PEFT: dict[str, dict[str, Any]] = {
    "rslora": {"method": "LORA", "options": {"r": 4, "lora_alpha": 8, "use_rslora": True}},
    "dora": {"method": "LORA", "options": {"r": 4, "lora_alpha": 8, "use_dora": True}},
    "pissa": {"method": "LORA", "options": {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"}},
    "vera": {"method": "VERA", "options": {"r": 16, "d_initial": 0.3}},
    "vblora": {"method": "VBLORA", "options": {"r": 2, "num_vectors": 12, "vector_length": 8, "topk": 2}},
    "randlora": {"method": "RANDLORA", "options": {"r": 8, "randlora_alpha": 16}},
    "loha": {"method": "LOHA", "options": {"r": 4, "alpha": 32}},
    "lokr": {"method": "LOKR", "options": {"r": 4, "alpha": 8}},
    "hira": {"method": "HIRA", "options": {"r": 4}},
    "miss": {"method": "MISS", "options": {"r": 4}},
    "gralora": {"method": "GRALORA", "options": {"r": 4, "gralora_k": 2}},
    "fourierft": {"method": "FOURIERFT", "options": {"n_frequency": 40, "scaling": 50.0}},
    "ia3": {"method": "IA3"},
    "oft": {"method": "OFT", "options": {"oft_block_size": 8}},
    "hra": {"method": "HRA", "options": {"r": 4}},
    "road": {"method": "ROAD", "options": {"group_size": 8}},
}
CASES: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in KINDS},
    "lora-rank-1": {"kind": "lora", "rank": 1, "alpha": 1},
    "lora-dropout": {"kind": "lora", "rank": 3, "alpha": 6, "dropout": 0.5},
    "boosted-ranks": {"kind": "boosted_lora", "rounds": 3, "rank_per_round": 2},
    "lora-fa": {"kind": "lora", "rank": 2, "freeze_a": True},
    "mos-nothing-private": {"kind": "mos", "rank": 4, "equivalent_rank": 2, "private_rank": 0},
    "mos-all-private": {"kind": "mos", "rank": 2, "equivalent_rank": 2, "private_rank": 2},
    "mos-whole-vectors": {"kind": "mos", "rank": 4, "equivalent_rank": 2, "private_rank": 1, "shards": 1},
    "mos-pairs": {"kind": "mos", "rank": 4, "equivalent_rank": 2, "private_rank": 1, "pair_dissociation": False},
    "prolora-nothing-unshared": {"kind": "prolora", "rank": 4, "unshared_rank": 0, "reduction": 2},
    "prolora-strides": {"kind": "prolora", "rank": 6, "unshared_rank": 2, "reduction": 2, "stride_a": 1, "stride_b": 3},
    "melora-4": {"kind": "melora", "rank": 2, "minis": 4},
    "melora-1": {"kind": "melora", "rank": 3, "minis": 1},
    "lora_xs-rank-3": {"kind": "lora_xs", "rank": 3},
    "nola-few": {"kind": "nola", "rank": 2, "bases": 3},
    **{f"peft-{name}": {"kind": "peft", **keys} for name, keys in PEFT.items()},
}
"""Every kind as it comes, and settings that take another way through its code."""
STARTS_WITH_A_CHANGE = ("VBLORA", "FOURIERFT")
"""PEFT draws all of their parts, none is zero."""
OF_THE_OUTPUT_ALONE = ("ROAD",)
"""Has several tensors at a layer, and none of them meets the input first."""


@pytest.fixture(params=CASES)
def adapter(request: pytest.FixtureRequest) -> Any:
    keys = CASES[request.param]
    module = registry.load("adapter", keys["kind"])
    return module.build(module.Spec(**keys))


@pytest.fixture
def change(adapter: Any) -> Any:
    """Return an adapter that is a change of single layers; a whole model is not (``test_full.py`` has its promises)."""
    if isinstance(adapter, WholeModel):
        pytest.skip("a member is a model of its own: it has no sites")
    return adapter


def build(adapter: Any, seed: int) -> dict[str, torch.Tensor]:
    return adapter.build(SITES, torch.Generator().manual_seed(seed))


def frozen_tensors(adapter: Any, seed: int) -> dict[str, torch.Tensor]:
    return adapter.frozen_tensors(SITES, seed, weight_of)


def linear_of(site: Site, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    """Return the frozen layer of a site."""
    linear = torch.nn.Linear(site.in_features, site.out_features, bias=False).requires_grad_(False)
    linear.weight.copy_(weight_of(site.name))
    return linear.to(dtype)


def delta(adapter: Any, x_KNI: torch.Tensor, materialized: Any, site: Site) -> torch.Tensor:
    """Return the packed change of a site, on its frozen layer if the kind asks for that."""
    if not isinstance(adapter, NeedsBaseWeights):
        return adapter.packed_delta(x_KNI, materialized[site.name])
    linear = linear_of(site, x_KNI.dtype)
    return adapter.packed_delta_over(linear, linear(x_KNI), x_KNI, materialized[site.name])


def matrix(adapter: Any, member: dict[str, torch.Tensor], site: Site) -> torch.Tensor:
    """Return a member's change as a matrix; where it has none of its own, what it makes of the identity alone."""
    try:
        return adapter.delta_weight(member, site)
    except BaseError:
        assert isinstance(adapter, NeedsBaseWeights)
    materialized = adapter.materialize(stacked(adapter, [member]), SITES)
    return delta(adapter, torch.eye(site.in_features)[None], materialized, site)[0].T


def weight_of(name: str) -> torch.Tensor:
    """Return the frozen weight that a site is taken to have."""
    number, site = next((n, s) for n, s in enumerate(SITES) if s.name == name)
    return torch.randn(site.out_features, site.in_features, generator=torch.Generator().manual_seed(number))


def start(adapter: Any, seed: int) -> dict[str, torch.Tensor]:
    """Return the trained tensors of a new member, with those in place that come from the frozen weights."""
    drawn = build(adapter, seed)
    return adapter.from_weights(drawn, SITES, weight_of) if isinstance(adapter, NeedsBaseWeights) else drawn


def fresh(adapter: Any, seed: int) -> dict[str, torch.Tensor]:
    """Return a whole new member, with what it needs but does not train."""
    return {**start(adapter, seed), **frozen_tensors(adapter, seed)}


def trained(adapter: Any, seed: int) -> dict[str, torch.Tensor]:
    """Return a whole member whose every trained number is away from where it began."""
    generator = torch.Generator().manual_seed(1000 + seed)
    moved = {n: t + torch.randn(t.shape, generator=generator) * 0.3 for n, t in start(adapter, seed).items()}
    return {**moved, **frozen_tensors(adapter, seed)}


def stacked(adapter: Any, members: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([m[name] for m in members]) for name in members[0]}


def test_it_accepts_ordinary_layers(adapter: Any) -> None:
    adapter.check(SITES)
    assert adapter.spec.kind in KINDS


def test_building_depends_on_the_generator_alone(adapter: Any) -> None:
    torch.manual_seed(1)
    one, state = build(adapter, 7), torch.random.get_rng_state()
    torch.manual_seed(2)
    two = build(adapter, 7)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    assert list(one) == list(two) and all(torch.equal(one[n], two[n]) for n in one)
    other = build(adapter, 8)
    if any(t.numel() and t.min() < t.max() for t in one.values()):  # else it starts from zeros or ones
        assert any(not torch.equal(one[n], other[n]) for n in one)
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in one.values())


def test_what_is_not_trained_depends_on_the_seed_and_the_base_alone(adapter: Any) -> None:
    torch.manual_seed(1)
    one, state = frozen_tensors(adapter, 7), torch.random.get_rng_state()
    torch.manual_seed(2)
    two = frozen_tensors(adapter, 7)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    assert list(one) == list(two) and all(torch.equal(one[n], two[n]) for n in one)
    assert not one.keys() & build(adapter, 7).keys()


def test_a_fresh_member_changes_nothing(change: Any) -> None:
    members = [fresh(change, seed) for seed in range(3)]
    materialized = change.materialize(stacked(change, members), SITES)
    changed = False
    tolerance = 1e-5 if isinstance(change, NeedsBaseWeights) else 0.0  # PEFT subtracts what it started from
    for site in SITES:
        found = [matrix(change, member, site) for member in members if site.name in materialized]
        if site.name in materialized:
            found.append(delta(change, torch.randn(3, 5, site.in_features), materialized, site))
        changed |= any(float(each.abs().max()) > tolerance for each in found)
    assert changed is (getattr(change.spec, "method", "") in STARTS_WITH_A_CHANGE)


def test_the_packed_delta_is_each_members_own_weight_times_its_own_input(change: Any) -> None:
    members = [trained(change, seed) for seed in range(3)]
    materialized = change.materialize(stacked(change, members), SITES)
    for site in SITES:
        weights = [matrix(change, member, site) for member in members]
        assert all(w.shape == (site.out_features, site.in_features) and w.dtype == torch.float32 for w in weights)
        if site.name not in materialized:
            assert not any(w.any() for w in weights)
            continue
        x_KNI = torch.randn(3, 5, site.in_features, generator=torch.Generator().manual_seed(0))
        y_KNO = delta(change, x_KNI, materialized, site)
        for k in range(3):
            expected = x_KNI[k].double() @ weights[k].double().T
            assert expected.norm() > 0.1
            torch.testing.assert_close(y_KNO[k].double(), expected, rtol=1e-4, atol=1e-4)
        alone = delta(change, x_KNI[1:2], change.materialize(stacked(change, members[1:2]), SITES), site)
        torch.testing.assert_close(y_KNO[1], alone[0], rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_tensor_of_the_member_and_of_no_other(adapter: Any) -> None:
    whole = stacked(adapter, [trained(adapter, seed) for seed in range(2)])
    leaves = {n: whole[n].clone().requires_grad_() for n in build(adapter, 0)}
    materialized = adapter.materialize({**whole, **leaves}, SITES)
    total = sum(
        delta(adapter, torch.randn(2, 5, s.in_features), materialized, s)[0].pow(2).sum()
        for s in SITES if s.name in materialized
    )
    if not leaves:
        assert not materialized
        return
    total.backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad[0].any(), name
        assert not leaf.grad[1].any(), name


def test_every_tensor_has_a_decay_group(adapter: Any) -> None:
    groups = {name: adapter.decay_group(name) for name in build(adapter, 0)}
    assert set(groups.values()) <= {"a", "b"}
    several = len({name.rpartition(".")[2] for name in groups}) > 1
    if several and getattr(adapter.spec, "method", "") not in OF_THE_OUTPUT_ALONE:
        assert set(groups.values()) == {"a", "b"}


def test_its_names_say_which_site_they_belong_to_or_none(adapter: Any) -> None:
    for name in build(adapter, 0):
        assert not name.startswith("head:") and "|" not in name and "/" not in name


def test_the_input_type_is_the_output_type(adapter: Any) -> None:
    materialized = adapter.materialize(stacked(adapter, [trained(adapter, 0)]), SITES)
    for site in SITES:
        if site.name in materialized:
            x = torch.randn(1, 5, site.in_features, dtype=torch.bfloat16)
            assert delta(adapter, x, materialized, site).dtype == torch.bfloat16


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES)
def test_its_spec_reads_back_equal(keys: dict[str, Any]) -> None:
    spec = registry.load("adapter", keys["kind"]).Spec(**keys)
    assert type(spec).model_validate(spec.model_dump(mode="json")) == spec
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec
