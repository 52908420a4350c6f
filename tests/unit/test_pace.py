"""How fast plans are taken to be, and that the faster of two is chosen, with the reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raylora.placement.estimate import ADAPTER_BYTES, OPTIMIZER_BYTES, MemberShape, ModelShape
from raylora.placement.inventory import Gpu, Inventory, Node
from raylora.placement.pace import CORE_RATES, GPU_RATES, Rates, pace_of, rates_of
from raylora.placement.plan import Demand
from raylora.placement.planner import make_plan
from raylora.spec import PlacementSpec

GB = 10**9
FOUR = Inventory((Node("a", 32, 1000 * GB, (Gpu(80 * GB),) * 4),), "four GPUs")


def demand_of(members: int, member_gb: float = 5, tokens: int = 64, is_quantized: bool = True) -> Demand:
    """Return members of a base of 55 GB, of which only one fits beside a whole one."""
    model = ModelShape(
        block_bytes=55 * GB, block_parameters=110 * GB, layers=80, workspace_bytes=int(is_quantized), compute_bytes=2
    )
    member = MemberShape(int(member_gb * GB / (ADAPTER_BYTES + OPTIMIZER_BYTES)), rows=1, time=tokens)
    return Demand((tuple(f"member-{m}" for m in range(members)),), model, member)


def test_a_pace_counts_products_weights_and_rounds() -> None:
    demand = demand_of(8)
    plan = make_plan(demand, FOUR, PlacementSpec(strategy="replicate"))
    assert (plan.workers, [len(pack) for pack in plan.packs]) == (4, [1] * 8)
    pace = pace_of(demand, plan, FOUR, Rates(flops=100e12, bytes_per_s=1e12))
    assert pace.compute_s == pytest.approx(4 * 110e9 * 64 / 100e12)
    assert pace.weights_s == pytest.approx(2 * (55 + 2 * 2 * 110) / 1000), "read, written as bfloat16, read; twice"
    assert pace.gather_s == 0 and pace.round_s == pytest.approx(2 * pace.step_s), "eight packs for four workers"
    assert pace.tokens_per_s == pytest.approx(8 * 64 / pace.round_s)


def test_a_split_base_is_gathered_twice_and_three_times_where_blocks_run_again() -> None:
    demand = demand_of(8)
    plan = make_plan(demand, FOUR, PlacementSpec(strategy="shard", ranks=4))
    rates = Rates(flops=100e12, bytes_per_s=1e12, link_gbit_s=100)
    once = pace_of(demand, plan, FOUR, rates)
    assert once.gather_s == pytest.approx(2 * 55 * 3 / 4 * 8 / 100)
    again = Demand(demand.groups, demand.model, MemberShape(demand.member.parameters, 1, 64, recomputed=True))
    slower = pace_of(again, plan, FOUR, rates)
    assert slower.gather_s == pytest.approx(1.5 * once.gather_s)
    assert slower.compute_s == pytest.approx(1.5 * once.compute_s)


def test_the_parts_of_an_output_layer_are_gathered_twice_for_every_chunk_of_positions() -> None:
    demand = demand_of(8)
    plan = make_plan(demand, FOUR, PlacementSpec(strategy="shard", ranks=4))
    rates = Rates(flops=100e12, bytes_per_s=1e12, link_gbit_s=100)
    model = replace(demand.model, output_bytes=2 * GB, output_in_parts=True)
    member = replace(demand.member, logit_chunk=50)  # two members of 64 tokens on each rank: three chunks
    parts = pace_of(replace(demand, model=model, member=member), plan, FOUR, rates)
    assert parts.gather_s == pytest.approx((2 * 55 + 2 * 3 * 2) * 3 / 4 * 8 / 100)


def test_a_base_that_fits_whole_is_split_where_that_is_faster() -> None:
    """With the base whole, 64 members take sixteen rounds of one each; split, eight share each forward."""
    made = make_plan(demand_of(64), FOUR, PlacementSpec())
    assert (made.strategy, made.ranks) == ("shard", 4), made.reasons
    assert max(map(len, made.packs)) == 32, "eight on each of four ranks"
    assert any(reason.startswith("replicate instead would take 1.") for reason in made.reasons), made.reasons
    few = make_plan(demand_of(8), FOUR, PlacementSpec())
    assert few.strategy == "replicate"
    assert any(reason.startswith("shard over 4 instead would take 2.") for reason in few.reasons), few.reasons
    assert make_plan(demand_of(64), FOUR, PlacementSpec(strategy="replicate")).strategy == "replicate"


def test_a_given_rate_decides() -> None:
    slow = make_plan(demand_of(64, tokens=64), FOUR, PlacementSpec(), tflops=2)
    assert slow.strategy == "replicate", "products take all of the time, and both do as many"
    assert any("(rates as given)" in reason for reason in slow.reasons)


def test_cores_add_up_and_gpus_do_not() -> None:
    on_cores = Inventory((Node("a", 8, 1000 * GB),), "cores")
    plan = make_plan(demand_of(2), on_cores, PlacementSpec())
    assert plan.workers == 2 and rates_of(plan).flops == 4 * CORE_RATES.flops
    assert rates_of(make_plan(demand_of(8), FOUR, PlacementSpec())) == GPU_RATES
