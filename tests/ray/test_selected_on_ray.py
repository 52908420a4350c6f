"""Weights over members that were trained and answered on a cluster are those of a run without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from raylora.client import launch, run_local

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.slow
def test_weights_are_the_same_with_and_without_ray(make_spec: Callable[..., Any]) -> None:
    changes = {
        "ensemble__members": 3, "ensemble__select": {"size": 4}, "ensemble__weights": "stacked",
        "optimization__lr": 0.2, "ensemble__seed": 16, "ensemble__bootstrap": True,
        "placement__members_per_worker": 1,
    }
    alone = run_local(make_spec(name="alone", **changes))
    spread = launch(make_spec(name="spread", placement__workers=2, **changes)).wait()
    assert json.loads(json.dumps(spread["weighted"])) == json.loads(json.dumps(alone["weighted"]))
    assert len(alone["weighted"]["stacked"]["weights"]) > 1
