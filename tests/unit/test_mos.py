"""Mixture of shards against its paper, written out slowly; its draws, its limits and its number of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError

import raylora
from raylora.adapters import lora, mos
from raylora.adapters.base import Site, find_sites
from raylora.errors import BaseError, SpecError

Tensors = dict[str, torch.Tensor]
LAYERS = 3
SITES = [
    Site(f"encoder.{block}.{name}", inputs, outputs, block)
    for block in range(LAYERS) for name, inputs, outputs in (("query", 16, 16), ("up", 16, 32), ("down", 32, 16))
]
CASES = [
    mos.Spec(rank=5, equivalent_rank=3, private_rank=2, shards=4, alpha=10),
    mos.Spec(rank=4, equivalent_rank=2, private_rank=1, shards=2),
    mos.Spec(rank=4, equivalent_rank=2, private_rank=0, shards=1),
    mos.Spec(rank=6, equivalent_rank=2, private_rank=0, shards=1, pair_dissociation=False),  # pure sharing
    mos.Spec(rank=2, equivalent_rank=2, private_rank=2, shards=8),
]


def stacked(members: list[Tensors]) -> Tensors:
    return {name: torch.stack([m[name] for m in members]) for name in members[0]}


def no_weight(name: str) -> torch.Tensor:
    raise AssertionError("a draw needs no weights")


def member(spec: mos.Spec, seed: int, sites: list[Site] = SITES) -> Tensors:
    """Return a member whose pools are all away from where they began."""
    adapter, generator = mos.build(spec), torch.Generator().manual_seed(seed)
    pools = adapter.build(sites, generator)
    moved = {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in pools.items()}
    return {**moved, **adapter.frozen_tensors(sites, seed, no_weight)}


def slowly(spec: mos.Spec, tensors: Tensors, site: Site, x_NI: torch.Tensor) -> torch.Tensor:
    """Return (alpha / r) B_k A_k x as METHODS writes it, one vector and one shard at a time, in float64."""
    pool = f"pool.{site.name.rpartition('.')[2]}.{site.in_features}x{site.out_features}"
    idx_a, idx_b = tensors[f"{site.name}.index"].tolist()
    shards, rows = spec.shards, []
    y = torch.zeros(len(x_NI), site.out_features, dtype=torch.float64)
    for j in range(spec.rank):
        a_I = torch.cat([tensors[f"{pool}.A"][idx_a[j * shards + t]] for t in range(shards)]).double()
        b_O = torch.cat([tensors[f"{pool}.B"][idx_b[j * shards + t]] for t in range(shards)]).double()
        rows.append(torch.stack([(a_I * x).sum() * b_O for x in x_NI.double()]))
    for row in rows:
        y = y + row
    return spec.alpha / spec.rank * y


# --- the paper's equations ---------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", CASES)
def test_forward_and_gradients_equal_the_paper_written_out(spec: mos.Spec) -> None:
    adapter, members = mos.build(spec), [member(spec, seed) for seed in range(3)]
    whole = stacked(members)
    leaves = {n: t.clone().requires_grad_() for n, t in whole.items() if n.startswith("pool.")}
    slow = [{n: t.clone().requires_grad_() if n.startswith("pool.") else t for n, t in m.items()} for m in members]
    ready = adapter.materialize({**whole, **leaves}, SITES)
    torch.use_deterministic_algorithms(True)  # as in training; the fixture puts it back
    generator, total, expected_total = torch.Generator().manual_seed(0), 0.0, 0.0
    for site in SITES:
        x_KNI = torch.randn(3, 5, site.in_features, generator=generator)
        g_KNO = torch.randn(3, 5, site.out_features, generator=generator)
        y_KNO = adapter.packed_delta(x_KNI, ready[site.name])
        expected_KNO = torch.stack([slowly(spec, slow[k], site, x_KNI[k]) for k in range(3)])
        torch.testing.assert_close(y_KNO.double(), expected_KNO, rtol=1e-5, atol=1e-5)
        total, expected_total = total + (y_KNO * g_KNO).sum(), expected_total + (expected_KNO * g_KNO).sum()
    total.backward()
    expected_total.backward()
    for name, leaf in leaves.items():
        for k in range(3):
            torch.testing.assert_close(leaf.grad[k], slow[k][name].grad, rtol=1e-4, atol=1e-5)


def test_the_backward_pass_is_bit_equal_every_time_with_threads() -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)  # the fixture puts both back
    sites = [Site(f"{k}.q", 384, 384, k) for k in range(6)]
    spec = mos.Spec(rank=8, equivalent_rank=4, private_rank=1, shards=4)
    adapter, whole = mos.build(spec), stacked([member(spec, seed, sites) for seed in range(4)])
    found = []
    for _ in range(3):
        leaves = {n: t.clone().requires_grad_() for n, t in whole.items() if n.startswith("pool.")}
        ready = adapter.materialize({**whole, **leaves}, sites)
        x_KNI = torch.randn(4, 16, 384, generator=torch.Generator().manual_seed(0))
        sum((adapter.packed_delta(x_KNI, ready[s.name]) ** 2).sum() for s in sites).backward()
        found.append([leaf.grad for leaf in leaves.values()])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_pools_begin_with_the_bound_of_the_whole_vector_and_b_with_zero() -> None:
    sites = [Site(f"{k}.q", 1024, 64, k) for k in range(4)]
    pools = mos.build(mos.Spec(shards=16)).build(sites, torch.Generator().manual_seed(0))
    a, b = pools["pool.q.1024x64.A"], pools["pool.q.1024x64.B"]
    assert a.shape == (2 * 4 * 16, 64) and b.shape == (2 * 4 * 16, 4) and not b.any()
    bound = 1024**-0.5
    assert a.abs().max() <= bound and a.std() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_rows_private_and_whole_it_is_lora_to_the_bit(rank: int, dtype: torch.dtype) -> None:
    shards = mos.build(mos.Spec(rank=rank, equivalent_rank=rank, private_rank=rank, shards=1, alpha=12))
    plain = lora.build(lora.Spec(rank=rank, alpha=12))
    ours, theirs = [], []
    for seed in range(2):
        pools = shards.build(SITES, torch.Generator().manual_seed(seed))
        pairs = plain.build(SITES, torch.Generator().manual_seed(seed))
        index = shards.frozen_tensors(SITES, seed, no_weight)
        generator = torch.Generator().manual_seed(50 + seed)
        for name in (n for n in pools if n.endswith(".B")):
            pools[name] = torch.randn(pools[name].shape, generator=generator)
        for site in SITES:
            kind = f"pool.{site.name.rpartition('.')[2]}.{site.in_features}x{site.out_features}"
            idx_a, idx_b = index[f"{site.name}.index"]
            assert torch.equal(pools[f"{kind}.A"][idx_a], pairs[f"{site.name}.lora_A"])  # drawn as LoRA draws
            pairs[f"{site.name}.lora_B"] = pools[f"{kind}.B"][idx_b].T.contiguous()
        ours.append({**pools, **index})
        theirs.append(pairs)
    one, two = shards.materialize(stacked(ours), SITES), plain.materialize(stacked(theirs), SITES)
    for site in SITES:
        x_KNI = torch.randn(2, 7, site.in_features, generator=torch.Generator().manual_seed(3)).to(dtype)
        assert torch.equal(shards.packed_delta(x_KNI, one[site.name]), plain.packed_delta(x_KNI, two[site.name]))


def test_pure_sharing_gives_every_layer_the_same_change() -> None:
    tensors = member(CASES[3], 0)
    for kind in ("query", "up", "down"):
        weights = [mos.build(CASES[3]).delta_weight(tensors, s) for s in SITES if s.name.endswith(kind)]
        assert len(weights) == LAYERS and weights[0].norm() > 1
        for other in weights[1:]:
            torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-5)


# --- the draw ----------------------------------------------------------------------------------------------
def indices(spec: mos.Spec, seed: int, sites: list[Site] = SITES) -> Tensors:
    return mos.build(spec).frozen_tensors(sites, seed, no_weight)


def test_the_draw_is_the_seeds_own_and_touches_no_global_state() -> None:
    before = torch.random.get_rng_state()
    one = indices(CASES[0], 3)
    torch.randn(5)
    two = indices(CASES[0], 3)
    torch.random.set_rng_state(before)
    indices(CASES[0], 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert set(one) == {f"{s.name}.index" for s in SITES}
    assert all(t.dtype == torch.int64 for t in one.values())
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_draws_differ_between_members_layers_sides_and_groups() -> None:
    spec = mos.Spec(rank=5, equivalent_rank=3, private_rank=1, shards=4)
    one, other = indices(spec, 0), indices(spec, 1)
    public = (spec.rank - spec.private_rank) * spec.shards
    drawn = [t[side, :public].tolist() for t in [*one.values(), *other.values()] for side in (0, 1)]
    assert len({tuple(d) for d in drawn}) == len(drawn) == 2 * 2 * len(SITES)


def test_another_group_beside_it_does_not_move_a_draw() -> None:
    alone = indices(CASES[0], 0, [s for s in SITES if s.name.endswith("query")])
    beside = indices(CASES[0], 0)
    assert alone and all(torch.equal(alone[n], beside[n]) for n in alone)


@pytest.mark.parametrize("spec", CASES)
def test_private_rows_belong_to_one_layer_and_public_ones_are_drawn_once(spec: mos.Spec) -> None:
    found = indices(spec, 5)
    e, p, r, shards = spec.equivalent_rank, spec.private_rank, spec.rank, spec.shards
    public = (e - p) * LAYERS * shards
    for kind in ("query", "up", "down"):
        layers = [found[f"encoder.{k}.{kind}.index"] for k in range(LAYERS)]
        for side in (0, 1):
            rows = [set(t[side].tolist()) for t in layers]
            assert all(len(s) == r * shards and max(s) < e * LAYERS * shards for s in rows)
            private = [{row for row in s if row >= public} for s in rows]
            assert all(len(s) == p * shards for s in private)
            assert len(set().union(*private)) == LAYERS * p * shards
        if not spec.pair_dissociation:
            assert all(torch.equal(t[0], t[1]) for t in layers)


def test_without_dissociation_a_is_drawn_as_with_it() -> None:
    spec = mos.Spec(rank=5, equivalent_rank=3, private_rank=1, shards=4)
    tied = indices(spec.model_copy(update={"pair_dissociation": False}), 0)
    for name, free in indices(spec, 0).items():
        assert torch.equal(tied[name][0], tied[name][1]) and torch.equal(tied[name][0], free[0])
        assert not torch.equal(free[0], free[1])


# --- groups ------------------------------------------------------------------------------------------------
def test_layers_share_by_type_and_shape_in_any_architecture(tiny_model: Callable[[str], str]) -> None:
    expected = {
        "gpt2": {"c_attn.32x96": 2, "c_proj.32x32": 2, "c_fc.32x128": 2, "c_proj.128x32": 2},
        "bert": {"query.32x32": 2, "key.32x32": 2, "value.32x32": 2, "dense.32x32": 3, "dense.32x64": 2,
                 "dense.64x32": 2},
    }
    spec = mos.Spec(rank=3, target_modules="all-linear")
    for kind, groups in expected.items():
        config = transformers.AutoConfig.from_pretrained(tiny_model(kind))
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
        pools = mos.build(spec).build(find_sites(model, spec, [], []), torch.Generator())
        rows = {n.removeprefix("pool.").removesuffix(".A"): len(t) for n, t in pools.items() if n.endswith(".A")}
        assert rows == {name: 2 * 2 * layers for name, layers in groups.items()}
        assert sum(t.numel() for t in pools.values()) == sum(
            2 * layers * sum(map(int, name.rpartition(".")[2].split("x"))) for name, layers in groups.items())


def test_a_layer_alone_gets_plain_lora_of_the_same_budget_and_this_is_said() -> None:
    sites = [*SITES, Site("pooler", 16, 8, None)]
    spec = mos.Spec(rank=5, equivalent_rank=3, private_rank=1, shards=4, alpha=6)
    adapter, tensors = mos.build(spec), member(spec, 0, sites)
    assert adapter.notes(SITES) == []
    assert adapter.notes(sites) == [
        "pooler is the only adapted layer of its type and shape and has nothing to share: "
        "it gets plain LoRA of rank 3, the same number of parameters"
    ]
    a, b = tensors["pool.pooler.16x8.A"], tensors["pool.pooler.16x8.B"]
    assert a.shape == (3, 16) and b.shape == (3, 8)
    torch.testing.assert_close(adapter.delta_weight(tensors, sites[-1]), 6 / 3 * b.T @ a)
    as_lora, written = adapter.as_lora(tensors, sites)
    assert as_lora.rank == 5 and as_lora.alpha == 6
    for site in sites:
        expected = adapter.delta_weight(tensors, site)
        torch.testing.assert_close(lora.build(as_lora).delta_weight(written, site), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("changes", "says"), [
    ({"private_rank": 3, "rank": 8}, "private_rank 3 is more than the whole budget: use at most equivalent_rank, 2"),
    ({"private_rank": 2}, "so the rank cannot be 4: use rank 2 (plain LoRA), or a private_rank of at most 1"),
    ({"rank": 1, "equivalent_rank": 4, "private_rank": 2}, "more than the rank: use a private_rank of at most 1"),
    ({"rank": 0}, "greater than or equal to 1"), ({"shards": 0}, "greater than or equal to 1"),
    ({"private_rank": -1}, "greater than or equal to 0"), ({"alpha": 0}, "greater than 0"),
    ({"privaterank": 1}, "Extra inputs"),
])
def test_numbers_that_contradict_each_other_are_refused_with_the_nearest(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        mos.Spec(**changes)
    assert says in str(caught.value)


@pytest.mark.parametrize(("changes", "says"), [
    ({"rank": 7}, ["takes 6 public vectors", "= 3 between them", "a rank of at most 4",
                   "an equivalent_rank of at least 3"]),
    ({"rank": 6, "private_rank": 1}, ["a rank of at most 4", "a private_rank of at most 0"]),
    ({"rank": 2, "shards": 6}, ["6 does not divide the 16 inputs of encoder.0.query", "use 4 or 8, which divides"]),
    ({"rank": 2, "shards": 32}, ["use 16, which divides"]),
    ({"rank": 20, "equivalent_rank": 20}, ["adapter.rank: 20 is more than encoder.0.query (16 x 16)", "at most 16"]),
])
def test_numbers_that_the_layers_cannot_have_are_refused_with_the_nearest(
    changes: dict[str, Any], says: list[str]
) -> None:
    adapter = mos.build(mos.Spec(**changes))
    with pytest.raises(BaseError) as caught:
        adapter.check(SITES)
    for part in says:
        assert part in str(caught.value)


def test_what_the_message_proposes_works() -> None:
    for changes in ({"rank": 4}, {"rank": 7, "equivalent_rank": 3}, {"rank": 6, "private_rank": 0}):
        mos.build(mos.Spec(**changes)).check(SITES)
    for shards in (4, 8):
        mos.build(mos.Spec(rank=2, shards=shards)).check(SITES)


def test_a_layer_under_two_names_is_refused_by_name() -> None:
    model = torch.nn.Module()
    model.first = torch.nn.Linear(4, 4)
    model.again = model.first
    with pytest.raises(BaseError, match="first and again are one and the same layer"):
        find_sites(model, mos.Spec(target_modules=["first"]), [], [])


# --- parameters ----------------------------------------------------------------------------------------------
def llama(hidden: int, intermediate: int, layers: int, heads: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads)


@pytest.mark.parametrize(("size", "keys", "count"), [
    ("7b", {"kind": "mos", "equivalent_rank": 2, "rank": 8, "private_rank": 1, "shards": 4}, 4_997_120),
    ("7b", {"kind": "mos", "equivalent_rank": 8, "rank": 32, "private_rank": 3, "shards": 2}, 19_988_480),
    ("7b", {"kind": "mos", "equivalent_rank": 2, "rank": 64, "private_rank": 0, "shards": 1}, 4_997_120),
    ("7b", {"kind": "lora", "rank": 64}, 159_907_840), ("7b", {"rank": 2}, 4_997_120),
    ("13b", {"kind": "mos", "equivalent_rank": 2}, 7_823_360),
])
def test_the_published_numbers_of_parameters(size: str, keys: dict[str, Any], count: int) -> None:
    config = llama(4096, 11008, 32, 32) if size == "7b" else llama(5120, 13824, 40, 40)
    assert raylora.parameter_count(config, {**keys, "target_modules": "all-linear"}) == count


def test_parameters_are_counted_of_a_model_or_a_spec_too(tiny_model: Callable[[str], str]) -> None:
    model = transformers.AutoModel.from_pretrained(tiny_model("bert"))
    spec = lora.Spec(rank=4, target_modules=["query"])
    assert raylora.parameter_count(model, spec) == raylora.parameter_count(model.config, spec) == 2 * 4 * 64
    with_head = transformers.AutoModelForSequenceClassification.from_config(model.config)
    assert raylora.parameter_count(with_head, spec) == 2 * 4 * 64
    assert raylora.parameter_count(model, {"kind": "none"}) == 0


@pytest.mark.parametrize(("keys", "error", "says"), [
    ({"kind": "mos", "rank": 2, "private_rank": 3}, SpecError, "use at most equivalent_rank, 2"),
    ({"kind": "mos", "rang": 2}, SpecError, "adapter.rang"), ({"kind": "moss"}, SpecError, "did you mean 'mos'"),
    ({"kind": "mos", "rank": 9, "target_modules": ["query"]}, BaseError, "a rank of at most 3"),
])
def test_what_cannot_be_counted_says_why(
    keys: dict[str, Any], error: type, says: str, tiny_model: Callable[[str], str]
) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_model("bert"))
    with pytest.raises(error) as caught:
        raylora.parameter_count(config, keys)
    assert says in str(caught.value)
