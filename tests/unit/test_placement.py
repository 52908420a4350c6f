"""Plans: every unit once, never more than there is, and reasons for both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.errors import PlacementError
from raylora.placement.estimate import (
    ADAPTER_BYTES,
    GPU_RUNTIME_BYTES,
    OPTIMIZER_BYTES,
    RUNTIME_BYTES,
    MemberShape,
    ModelShape,
)
from raylora.placement.inventory import Gpu, Inventory, Node, one_node
from raylora.placement.plan import Demand, Plan
from raylora.placement.planner import make_plan
from raylora.spec import PlacementSpec

GB = 10**9
LAYERS = 20


def plan(
    members: int = 5, baselines: int = 0, cpus: int = 4, gpus: int = 0, memory: float = 64, base: float = 0.1,
    member: float = 0.1, in_process: bool = False, **spec: Any,
) -> Plan:
    groups = [tuple(f"member-{m}" for m in range(members))]
    groups += [tuple(f"head-{m}" for m in range(baselines))] if baselines else []
    trained = int(member * GB / (ADAPTER_BYTES + OPTIMIZER_BYTES))
    demand = Demand(tuple(groups), ModelShape(block_bytes=int(base * GB)), MemberShape(parameters=trained))
    inventory = one_node(cpus, gpus, int(memory * GB), int(memory * GB), in_process=in_process)
    return make_plan(demand, inventory, PlacementSpec(**spec))


def on(
    nodes: tuple[Node, ...], members: int = 4, base: float = 0.1, member: float = 0.1, unsplittable: str = "",
    network_gbit_s: float | None = None, **spec: Any,
) -> Plan:
    trained = int(member * GB / (ADAPTER_BYTES + OPTIMIZER_BYTES))
    model = ModelShape(block_bytes=int(base * GB), layers=LAYERS)
    names = tuple(f"member-{m}" for m in range(members))
    demand = Demand((names,), model, MemberShape(parameters=trained), unsplittable_reason=unsplittable)
    return make_plan(demand, Inventory(nodes, "the cluster", network_gbit_s=network_gbit_s), PlacementSpec(**spec))


TABLE = [
    # what there is and is asked for -> workers, CPUs each, GPUs each, pack sizes, strategy
    ({"members": 5, "cpus": 1}, (1, 1, 0, [5], "pack")),
    ({"members": 5, "cpus": 2}, (2, 1, 0, [3, 2], "replicate")),
    ({"members": 5, "cpus": 8}, (5, 1, 0, [1] * 5, "replicate")),
    ({"members": 2, "cpus": 8}, (2, 4, 0, [1, 1], "replicate")),
    ({"members": 1, "cpus": 8}, (1, 8, 0, [1], "replicate")),
    ({"members": 5, "cpus": 4, "workers": 1}, (1, 4, 0, [5], "pack")),
    ({"members": 5, "cpus": 4, "workers": 1, "members_per_worker": 2}, (1, 4, 0, [2, 2, 1], "pack")),
    ({"members": 5, "cpus": 8, "cpus_per_worker": 4}, (2, 4, 0, [3, 2], "replicate")),
    ({"members": 4, "baselines": 2, "cpus": 2}, (2, 1, 0, [2, 2, 2], "replicate")),
    ({"members": 5, "cpus": 8, "gpus": 1}, (1, 8, 1, [5], "pack")),
    ({"members": 5, "cpus": 8, "gpus": 2}, (2, 4, 1, [3, 2], "replicate")),
    ({"members": 5, "cpus": 8, "gpus": 2, "gpus_per_worker": 0}, (5 + 2, 1, 0, None, "replicate")),
    ({"members": 8, "cpus": 4, "gpus": 8}, (4, 1, 1, [2] * 4, "replicate")),
    ({"members": 8, "cpus": 1, "memory": 2.3, "member": 0.2}, (1, 1, 0, [4, 4], "pack")),
    ({"members": 4, "cpus": 4, "memory": 10, "base": 2}, (4, 1, 0, [1] * 4, "replicate")),  # all map the same base
    ({"members": 4, "cpus": 4, "memory": 6, "base": 2}, (2, 2, 0, [2, 2], "replicate")),
    ({"members": 9, "cpus": 8, "memory": 64}, (5, 1, 0, [2, 2, 2, 2, 1], "replicate")),  # five packs for five workers
    ({"members": 4, "cpus": 4, "memory": 4, "base": 2}, (1, 4, 0, [4], "pack")),
]


@pytest.mark.parametrize(("given_", "expected"), TABLE)
def test_the_plan_for(given_: dict[str, Any], expected: tuple[Any, ...]) -> None:
    workers, cpus, gpus, packs, strategy = expected
    made = plan(**given_)
    if packs is None:  # 5 units can use at most 5 workers
        workers, packs = 5, [1] * 5
    assert (made.workers, made.cpus_per_worker, made.gpus_per_worker) == (workers, cpus, gpus), made.reasons
    assert [len(pack) for pack in made.packs] == packs, made.reasons
    assert made.strategy == strategy and made.reasons


@given(
    st.integers(1, 30), st.integers(0, 6), st.integers(1, 64), st.integers(0, 8), st.floats(2.5, 200),
    st.floats(0.01, 20), st.floats(0.001, 3),
)
@settings(max_examples=400, deadline=None)
def test_an_automatic_plan_places_every_unit_once_within_what_there_is(
    members: int, baselines: int, cpus: int, gpus: int, memory: float, base: float, member: float
) -> None:
    try:
        made = plan(members, baselines, cpus, gpus, memory, base, member)
    except PlacementError as error:
        alone = base + member + (GPU_RUNTIME_BYTES if gpus else RUNTIME_BYTES) / GB
        assert alone > 0.8 * memory * 0.999, error
        return
    placed = [unit for pack in made.packs for unit in pack]
    assert sorted(placed) == sorted([f"member-{m}" for m in range(members)] + [f"head-{m}" for m in range(baselines)])
    assert all(len({unit.split("-")[0] for unit in pack}) == 1 for pack in made.packs)
    assert made.workers * made.cpus_per_worker <= cpus and made.workers * made.gpus_per_worker <= gpus
    shared = 0 if made.gpus_per_worker else made.parts.shared  # by the workers of a machine
    processes = 1 if made.gpus_per_worker else made.workers * made.ranks
    assert shared + processes * (made.worker_bytes - shared) <= 0.8 * memory * GB * 1.001
    sizes = [len(pack) for pack in made.packs if pack[0].startswith("member")]
    assert max(sizes) - min(sizes) <= 1
    assert [unit for units in made.jobs().values() for unit in units] == placed


@given(st.integers(1, 20), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_a_pack_never_exceeds_what_was_asked(members: int, limit: int) -> None:
    made = plan(members, cpus=2, members_per_worker=limit)
    assert max(len(pack) for pack in made.packs) <= limit and sum(len(pack) for pack in made.packs) == members


@pytest.mark.parametrize(("given_", "says"), [
    ({"cpus": 4, "workers": 5}, ["has 4 CPU(s) and 0 GPU(s)", "placement.workers to at most 4"]),
    ({"cpus": 4, "workers": 2, "cpus_per_worker": 3}, ["2 worker(s) of 3 CPU(s)", "at most 1"]),
    ({"cpus": 4, "cpus_per_worker": 8}, ["has 4 CPU(s)", "lower placement.cpus_per_worker"]),
    ({"cpus": 8, "gpus": 2, "workers": 3}, ["2 GPU(s)", "at most 2"]),
    ({"cpus": 2, "gpus": 4, "workers": 3}, ["2 CPU(s) and 4 GPU(s)", "at most 2"]),
    ({"cpus": 4, "gpus": 0, "gpus_per_worker": 1}, ["0 GPU(s)", "placement.gpus_per_worker"]),
    ({"memory": 1, "cpus": 1, "base": 0.8}, [
        f"one member needs about {0.9 + RUNTIME_BYTES / GB:.1f} GB", "a worker has 0.8 GB", "quantize the base",
    ]),
])
def test_what_does_not_fit_is_refused_saying_what_there_is(given_: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(PlacementError) as caught:
        plan(**given_)
    for part in says:
        assert part in str(caught.value)


def test_asking_for_more_members_than_fit_is_a_warning_not_a_refusal() -> None:
    made = plan(4, cpus=1, memory=(RUNTIME_BYTES / GB + 0.5) / 0.8 + 0.1, member=0.2, members_per_worker=4)
    assert [len(pack) for pack in made.packs] == [4]
    assert any("4 members in one forward may not fit; about 2 do" in reason for reason in made.reasons)


IN_PROCESS = [
    ({"members": 5, "cpus": 2}, (1, 2, [5])),
    ({"members": 5, "cpus": 8, "cpus_per_worker": 3}, (1, 3, [5])),
    ({"members": 5, "cpus": 8, "gpus": 2}, (1, 8, [5])),
    ({"members": 8, "cpus": 4, "memory": 2.3, "member": 0.2}, (1, 4, [4, 4])),
    ({"members": 4, "cpus": 4, "workers": 2}, (2, 2, [2, 2])),  # as on Ray: the members are to equal those
]


@pytest.mark.parametrize(("given_", "expected"), IN_PROCESS)
def test_a_process_alone_is_one_worker_with_all_cores(given_: dict[str, Any], expected: tuple[Any, ...]) -> None:
    workers, cpus, packs = expected
    made = plan(in_process=True, **given_)
    assert (made.workers, made.cpus_per_worker) == (workers, cpus), made.reasons
    assert [len(pack) for pack in made.packs] == packs


def test_nodes_are_filled_each_for_itself() -> None:
    """Five cores in all, but no node has room for more than one worker of two."""
    nodes = (Node("a", 3, 64 * GB), Node("b", 2, 64 * GB))
    made = on(nodes, members=5, cpus_per_worker=2)
    assert made.workers == 2 and [len(pack) for pack in made.packs] == [3, 2]
    with pytest.raises(PlacementError, match="at most 2"):
        on(nodes, members=5, workers=3, cpus_per_worker=2)
    with pytest.raises(PlacementError, match="1 worker.s. of 4 CPU"):
        on(nodes, members=5, cpus_per_worker=4)


def test_a_gpu_that_is_too_small_is_left_out_with_the_reason() -> None:
    nodes = (Node("large", 8, 64 * GB, (Gpu(80 * GB), Gpu(80 * GB))), Node("small", 8, 64 * GB, (Gpu(16 * GB),)))
    made = on(nodes, members=4, base=30)
    assert made.workers == 2 and [len(pack) for pack in made.packs] == [2, 2]
    assert any("1 GPU(s) are left out (small: 16 GB)" in reason for reason in made.reasons)
    assert on(nodes, members=3, base=3).workers == 3  # all are used where all will do


def test_the_smallest_gpu_in_use_decides_how_many_members_share_a_forward() -> None:
    nodes = (Node("mixed", 8, 64 * GB, (Gpu(80 * GB), Gpu(40 * GB))),)
    made = on(nodes, members=8, base=20, member=4)
    assert made.workers == 2 and made.worker_bytes <= 0.8 * 40 * GB
    half = on((Node("half", 8, 64 * GB, (Gpu(80 * GB, share=0.5),)),), members=8, base=20, member=4)
    assert half.worker_bytes <= 0.8 * 40 * GB


def test_a_base_is_split_where_a_whole_one_does_not_fit() -> None:
    nodes = (Node("a", 16, 64 * GB, (Gpu(80 * GB),) * 4),)
    made = on(nodes, members=8, base=100, member=2)
    assert (made.strategy, made.ranks, made.workers) == ("shard", 4, 1), made.reasons
    assert sorted(unit for pack in made.packs for unit in pack) == [f"member-{m}" for m in range(8)]
    assert "replicate does not fit: one member needs about 103.3 GB" in made.reasons[0]
    assert made.summary().startswith("shard over 4: 1 worker(s), 2 member(s) per GPU")
    assert made.parts.base == 25 * GB and made.parts.gathered == 2 * 100 * GB // LAYERS


def test_a_gang_stays_within_a_node_if_it_can() -> None:
    node = Node("a", 16, 64 * GB, (Gpu(80 * GB),) * 2)
    within = on((node, replace(node, name="b")), members=8, base=100, member=2)
    assert (within.ranks, within.workers) == (2, 2)
    assert not any("several nodes" in reason for reason in within.reasons)
    over = on((node, replace(node, name="b")), members=8, base=160, member=2)
    assert over.ranks == 4 and any("is on several nodes" in reason for reason in over.reasons)
    with pytest.raises(PlacementError, match=r"whose network has 1 Gbit/s; gathering blocks needs 10"):
        on((node, replace(node, name="b")), network_gbit_s=1, members=8, base=100, strategy="shard", ranks=4)


REFUSED = [
    ({"strategy": "shard", "ranks": 5}, "split over 5 workers, and the cluster has room for 4"),
    ({"strategy": "shard", "ranks": 2, "workers": 3}, "no whole number of gangs of 2"),
    ({"strategy": "shard", "unsplittable": "pissa starts from whole weights"}, "pissa starts from whole weights"),
    ({"base": 100, "unsplittable": "pissa starts from whole weights"}, "the base is not split: pissa starts"),
    ({"base": 100, "strategy": "replicate"}, "the base is not split: placement.strategy replicate is asked for"),
    ({"base": 1000}, "nor can the base be split: placement: one member needs about"),
]


@pytest.mark.parametrize(("given_", "says"), REFUSED)
def test_what_cannot_be_split_is_refused_before_anything_starts(given_: dict[str, Any], says: str) -> None:
    with pytest.raises(PlacementError) as caught:
        on((Node("a", 16, 64 * GB, (Gpu(80 * GB),) * 4),), **{"members": 8, "base": 1, **given_})
    assert says in str(caught.value)


def test_a_process_alone_cannot_split_a_base() -> None:
    with pytest.raises(PlacementError, match="this run has one"):
        plan(in_process=True, strategy="shard")


def test_the_same_question_has_the_same_answer() -> None:
    assert plan(7, 2, cpus=3) == plan(7, 2, cpus=3)


# --- several ranks per member ---------------------------------------------------------------------------
@pytest.mark.parametrize(("changes", "says"), [
    ({"data_parallel": 3, "workers": 4}, "does not divide 4 placement.workers"),
    ({"strategy": "shard", "ranks": 4, "data_parallel": 3}, "does not divide 4 placement.ranks"),
    ({"data_parallel": 2, "in_process": True}, "this run has one"),
])
def test_partners_that_cannot_be_had_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(PlacementError, match=says):
        plan(cpus=4, **changes)


def test_partners_train_the_same_packs() -> None:
    found = plan(members=4, cpus=4, data_parallel=2)
    assert (found.ranks, found.partners, found.workers, found.strategy) == (2, 2, 2, "replicate")
    assert [len(pack) for pack in found.packs] == [2, 2] and found.cpus_per_worker == 1
    split = plan(members=4, cpus=4, strategy="shard", ranks=4, data_parallel=2)
    assert (split.ranks, split.partners, split.workers, split.strategy) == (4, 2, 1, "shard")
    assert [len(pack) for pack in split.packs] == [4]


# --- when all members are finished ----------------------------------------------------------------------------
def after(nodes: tuple[Node, ...], shards: int, members: int = 2, member: float = 0.1, **spec: Any) -> Plan:
    trained = int(member * GB / (ADAPTER_BYTES + OPTIMIZER_BYTES))
    names = tuple(f"member-{m}" for m in range(members))
    demand = Demand((names,), ModelShape(block_bytes=GB // 10), MemberShape(parameters=trained), later_jobs=shards)
    return make_plan(demand, Inventory(nodes, "the cluster", in_process=spec.pop("in_process", False)),
                     PlacementSpec(**spec))


@pytest.mark.parametrize(("shards", "gpus", "spec", "expected"), [
    (20, 8, {}, (2, 6, 2)), (5, 8, {}, (2, 3, 3)), (2, 8, {}, (2, 0, 8)), (0, 8, {}, (2, 0, 8)),
    (20, 8, {"cpus_per_worker": 4}, (2, 2, 4)), (20, 8, {"workers": 2}, (2, 0, 8)),
    (20, 8, {"members_per_worker": 2}, (1, 7, 2)), (20, 8, {"in_process": True}, (1, 0, 16)),
    (20, 0, {"cpus_per_worker": 4}, (2, 2, 4)), (20, 0, {}, (2, 0, 8)),
])
def test_shards_of_answers_find_workers_that_training_leaves_idle(
    shards: int, gpus: int, spec: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    made = after((Node("a", 16, 64 * GB, (Gpu(64 * GB),) * gpus),), shards, **spec)
    assert (made.workers, made.later_workers, made.cpus_per_worker) == expected
    said = [reason for reason in made.reasons if "more worker(s) when all members are finished" in reason]
    assert len(said) == (1 if made.later_workers else 0) and made.workers_in_all == sum(expected[:2])


def test_workers_that_answer_have_room_for_what_they_hold() -> None:
    nodes = (Node("a", 8, 64 * GB, (Gpu(64 * GB), Gpu(GB), Gpu(64 * GB), Gpu(64 * GB))),)
    made = after(nodes, 20, member=2, members_per_worker=2)
    assert (made.workers, made.later_workers) == (1, 2)  # and not on the small one


# --- brackets -------------------------------------------------------------------------------------------------
def bracketed(places: int, memory: float = 64, member: float = 1.0, **spec: Any) -> Plan:
    trained = int(member * GB / (ADAPTER_BYTES + OPTIMIZER_BYTES))
    groups = tuple(tuple(f"member-{m}" for m in range(first, 12, 2)) for first in (0, 1))
    demand = Demand(groups, ModelShape(block_bytes=GB // 10), MemberShape(parameters=trained), places=places,
                    unsplittable_reason="one worker has all of a bracket")
    return make_plan(demand, one_node(8, 0, int(memory * GB)), PlacementSpec(**spec))


@pytest.mark.parametrize("spec", [{}, {"workers": 1}, {"workers": 2}, {"members_per_worker": 1}, {"workers": 4}])
def test_brackets_are_cut_by_no_plan_and_take_the_memory_of_their_places(spec: dict[str, Any]) -> None:
    made = bracketed(3, **spec)
    assert [len(pack) for pack in made.packs] == [6, 6] and made.workers == spec.get("workers", 2)
    assert made.parts == bracketed(3).parts and made.parts.adapters + made.parts.optimizer == pytest.approx(3 * GB)
    assert bracketed(9).parts.optimizer == bracketed(6).parts.optimizer  # no more than there are members
    assert bracketed(3, memory=6).workers == 1  # two would have no room for three members each


def test_places_that_do_not_fit_are_refused_with_how_many_do() -> None:
    with pytest.raises(PlacementError, match=r"ensemble.pruning.places: 5 members are to train in one forward, and 3"):
        bracketed(5, memory=5, workers=1)
    with pytest.raises(PlacementError, match="one member needs about"):
        bracketed(5, memory=1, workers=1)
