"""What every registered adapter promises; a new kind is tested by being registered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raylora import registry
from raylora.adapters.base import Site, WholeModel

KINDS = registry.kinds("adapter")
SITES = [
    Site(f"model.layers.{block}.{name}", inputs, outputs, block)
    for block in range(3)
    for name, inputs, outputs in (("q_proj", 16, 16), ("up_proj", 16, 32), ("down_proj", 32, 16))
]


@pytest.fixture(params=KINDS)
def adapter(request: pytest.FixtureRequest) -> Any:
    module = registry.load("adapter", request.param)
    return module.build(module.Spec())


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


def weight_of(name: str) -> torch.Tensor:
    """Return the frozen weight that a site is taken to have."""
    number, site = next((n, s) for n, s in enumerate(SITES) if s.name == name)
    return torch.randn(site.out_features, site.in_features, generator=torch.Generator().manual_seed(number))


def fresh(adapter: Any, seed: int) -> dict[str, torch.Tensor]:
    """Return a whole new member, with what it needs but does not train."""
    return {**build(adapter, seed), **frozen_tensors(adapter, seed)}


def trained(adapter: Any, seed: int) -> dict[str, torch.Tensor]:
    """Return a whole member whose every trained number is away from where it began."""
    generator = torch.Generator().manual_seed(1000 + seed)
    moved = {n: t + torch.randn(t.shape, generator=generator) * 0.3 for n, t in build(adapter, seed).items()}
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
    if any(t.any() for t in one.values()):
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
    for site in SITES:
        for member in members:
            assert not change.delta_weight(member, site).any()
        at_site = change.materialize(stacked(change, members), SITES).get(site.name)
        if at_site is not None:
            assert not change.packed_delta(torch.randn(3, 5, site.in_features), at_site).any()


def test_the_packed_delta_is_each_members_own_weight_times_its_own_input(change: Any) -> None:
    members = [trained(change, seed) for seed in range(3)]
    materialized = change.materialize(stacked(change, members), SITES)
    for site in SITES:
        weights = [change.delta_weight(member, site) for member in members]
        assert all(w.shape == (site.out_features, site.in_features) and w.dtype == torch.float32 for w in weights)
        if site.name not in materialized:
            assert not any(w.any() for w in weights)
            continue
        x_KNI = torch.randn(3, 5, site.in_features, generator=torch.Generator().manual_seed(0))
        y_KNO = change.packed_delta(x_KNI, materialized[site.name])
        for k in range(3):
            expected = x_KNI[k].double() @ weights[k].double().T
            assert expected.norm() > 0.1
            torch.testing.assert_close(y_KNO[k].double(), expected, rtol=1e-4, atol=1e-4)
        alone = change.packed_delta(
            x_KNI[1:2], change.materialize(stacked(change, members[1:2]), SITES)[site.name]
        )
        torch.testing.assert_close(y_KNO[1], alone[0], rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_tensor_of_the_member_and_of_no_other(adapter: Any) -> None:
    whole = stacked(adapter, [trained(adapter, seed) for seed in range(2)])
    leaves = {n: whole[n].clone().requires_grad_() for n in build(adapter, 0)}
    materialized = adapter.materialize({**whole, **leaves}, SITES)
    total = sum(
        adapter.packed_delta(torch.randn(2, 5, s.in_features), materialized[s.name])[0].pow(2).sum()
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
    if len({name.rpartition(".")[2] for name in groups}) > 1:
        assert set(groups.values()) == {"a", "b"}


def test_its_names_say_which_site_they_belong_to_or_none(adapter: Any) -> None:
    for name in build(adapter, 0):
        assert not name.startswith("head:") and "|" not in name and "/" not in name


def test_the_input_type_is_the_output_type(adapter: Any) -> None:
    materialized = adapter.materialize(stacked(adapter, [trained(adapter, 0)]), SITES)
    for site in SITES:
        if site.name in materialized:
            x = torch.randn(1, 5, site.in_features, dtype=torch.bfloat16)
            assert adapter.packed_delta(x, materialized[site.name]).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_its_spec_reads_back_equal(kind: str) -> None:
    spec = registry.load("adapter", kind).Spec()
    assert type(spec).model_validate(spec.model_dump(mode="json")) == spec
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec
