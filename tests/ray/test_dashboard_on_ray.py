"""What Ray's dashboard, Prometheus and the log see of a run on a real cluster, while it goes on."""

from __future__ import annotations

import json
import re
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raylora.client import RunHandle, launch
from raylora.errors import Interrupted
from raylora.spec import RunSpec
from raylora.web.snapshot import RunReader

pytestmark = pytest.mark.usefixtures("ray_cluster")
_LINE = re.compile(r"^ray_(raylora_\w+?)\{(.*)\} (\S+)$", re.MULTILINE)
_TAG = re.compile(r'(\w+)="([^"]*)"')
NEEDS_A_GPU = {"raylora_gpu_memory_bytes"}


def eventually(look: Callable[[], Any], what: str, timeout_s: float = 90.0) -> Any:
    """Return the first true answer."""
    until = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < until, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.5)
    return found


def exported(run: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Return what the node's metrics endpoint has of a run: series -> tags and values."""
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for name, tags, value in _LINE.findall(text):
        of = dict(_TAG.findall(tags))
        if of.get("run") == run:
            found.setdefault(name, []).append((of, float(value)))
    return found


def by_member(series: list[tuple[dict[str, str], float]]) -> dict[str, float]:
    return {tags["member"]: value for tags, value in series}


def session_logs() -> str:
    """Return what all actors of the session wrote to stderr."""
    from ray._private import worker

    logs = Path(worker._global_node.get_logs_dir_path())
    return "\n".join(path.read_text(errors="replace") for path in logs.glob("worker-*.err"))


@pytest.mark.slow
def test_a_run_on_a_cluster_can_be_watched(
    make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch, ray_cluster: str
) -> None:
    import ray
    from ray.util.state import list_actors, list_tasks

    from raylora.actors.telemetry import SERIES

    monkeypatch.setenv("RAYLORA_LOG", "INFO")
    spec = make_spec(
        name="watched", optimization__steps=20000, optimization__epochs=None, checkpointing__every_steps=5,
        ensemble__members=3, placement={"workers": 1, "cpus_per_worker": 1, "members_per_worker": 2},
    )
    handle: RunHandle = launch(spec)
    try:
        wanted = set(SERIES) - NEEDS_A_GPU
        eventually(lambda: wanted <= set(exported("watched")), f"{wanted}")
        time.sleep(12)  # longer than Ray keeps a gauge that nobody sets again
        found = exported("watched")
        pack = {"member-000", "member-001"}
        for name, series in SERIES.items():
            for tags, _ in found.get(name, []):
                assert {"run", "member"} & set(tags) == set(series.tags), name
        assert by_member(found["raylora_member_phase"]) == {"member-000": 1, "member-001": 1, "member-002": 0}
        for name in ("raylora_loss", "raylora_grad_norm", "raylora_validation_nll", "raylora_step"):
            assert set(by_member(found[name])) == pack, name
        assert [value for _, value in found["raylora_queue_length"]] == [1]
        assert [value for _, value in found["raylora_restarts"]] == [0]
        assert found["raylora_base_bytes"][0][1] < found["raylora_peak_bytes"][0][1]
        assert found["raylora_checkpoint_seconds"][0][1] > 0 and found["raylora_tokens_total"][0][1] > 0

        titles = {actor.repr_name for actor in list_actors(ray_cluster, detail=True) if actor.state == "ALIVE"}
        assert {"raylora:watched:worker-0", "raylora:watched:coordinator"} <= titles
        task = "raylora:watched:worker-0 [member-000, member-001]"
        eventually(lambda: task in {each.name for each in list_tasks(ray_cluster, limit=1000)}, task)
        marks = {"raylora:step", "raylora:checkpoint"}
        eventually(lambda: marks <= {event["name"] for event in ray.timeline()}, f"{marks} in the timeline")

        record = RunReader(handle.store, 0).read()
        assert record["dashboard"] == ray_cluster and record["workers"][0]["node"] != ""
        assert record["members"][0]["total"] == 20000
    finally:
        handle.interrupt(signal.SIGTERM)
        with pytest.raises(Interrupted):
            handle.wait()

    lines = eventually(
        lambda: [line for line in session_logs().splitlines() if " event {" in line and "[watched" in line], "events")
    events = [json.loads(line.partition(" event ")[2]) for line in lines]
    logged = [event["event"] for event in events]
    assert logged == [record["event"] for record in handle.store.read_events()], "one line per event"
    (stopped,) = (event for event in events if event["event"] == "JobInterrupted")
    assert (stopped["run"], stopped["members"]) == ("watched", ["member-000", "member-001"])
    assert "[watched member-000 member-001]: job-00: training from step 0 to 20000" in session_logs()
