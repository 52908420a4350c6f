"""Brackets, and weights over members, come out on a cluster as in a run without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from run_helpers import assert_bit_equal, members

from raylora import control
from raylora.client import launch, run_local
from raylora.store.run_store import RunStore

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.slow
def test_brackets_and_weights_are_the_same_with_and_without_ray(make_spec: Callable[..., Any]) -> None:
    changes = {
        "ensemble__members": 5, "ensemble__pruning": {"keep": 0.5, "places": 2, "brackets": 2},
        "ensemble__select": {"size": 4}, "ensemble__weights": "stacked",
        "optimization__lr": 0.1, "ensemble__bootstrap": True,
    }
    for seed in range(16, 32):  # members that learn this fast end elsewhere on each kind of processor
        specs = [make_spec(name=f"alone-{seed}", ensemble__seed=seed, **changes)]
        alone = run_local(specs[0])
        if len(alone["weighted"]["stacked"]["weights"]) > 1:
            break
    specs.append(make_spec(name="spread", placement__workers=2))
    spread = launch(specs[1]).wait()
    assert_bit_equal(members(specs[1]), members(specs[0]))
    stopped = [one["stopped_at"] for one in spread["members"]]
    assert stopped == [one["stopped_at"] for one in alone["members"]] and set(stopped) == {None, 5}
    jobs = control.replay(control.from_record(one) for one in RunStore.for_spec(specs[1]).read_events()).jobs
    assert sorted(len(job.units) for job in jobs.values()) == [2, 3]
    assert json.loads(json.dumps(spread["weighted"])) == json.loads(json.dumps(alone["weighted"]))
    assert len(alone["weighted"]["stacked"]["weights"]) > 1
