"""A base split over workers on a real Ray cluster: equal to workers with bases of their own, killed ranks or not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members

from raylora.client import launch, run_local
from raylora.errors import Interrupted
from raylora.handle import RunHandle
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore

pytestmark = pytest.mark.usefixtures("ray_cluster")
MakeSpec = Callable[..., RunSpec]
SHARD = {"strategy": "shard", "ranks": 2, "cpus_per_worker": 1, "members_per_worker": 2}
REPLICATE = {"workers": 2, "cpus_per_worker": 1, "members_per_worker": 2}


def rank_pids() -> dict[int, str]:
    """Return the processes that train, with what Ray calls them."""
    import psutil

    titles = {p.pid: " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])}
    return {pid: title for pid, title in titles.items() if title.startswith("ray::raylora:") and "[member-" in title}


def spec_of(make_spec: MakeSpec, placement: dict[str, Any], where: Path, **changes: Any) -> RunSpec:
    return make_spec(
        storage_path=str(where), ensemble__members=4, base__quantization="nf4", placement=placement, **changes
    )


@pytest.mark.slow
def test_members_of_a_gang_equal_those_of_workers_of_their_own(make_spec: MakeSpec, tmp_path: Path) -> None:
    handle = launch(spec_of(make_spec, SHARD, tmp_path / "gang"))
    handle.wait()
    run_local(spec_of(make_spec, REPLICATE, tmp_path / "alone"))
    assert_bit_equal(members(str(tmp_path / "gang" / "demo")), members(str(tmp_path / "alone" / "demo")))
    store = RunStore(str(tmp_path / "gang" / "demo"))
    started = next(event for event in store.read_events() if event["event"] == "RunStarted")
    assert started["workers"] == ["worker-0"] and [len(units) for units in started["jobs"].values()] == [4]
    assert len(store.storage.list("timing")) == 2, "every rank says what its share took"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_members_of_partners_equal_those_of_one_worker_to_tolerance(
    strategy: str, make_spec: MakeSpec, tmp_path: Path
) -> None:
    together = {"strategy": strategy, "data_parallel": 2, "workers": 2, "cpus_per_worker": 1}
    changes = {"optimization__zero_stage": 2}
    launch(spec_of(make_spec, together, tmp_path / "together", **changes)).wait()
    run_local(spec_of(make_spec, {"workers": 1, "cpus_per_worker": 1}, tmp_path / "alone", **changes))
    one, two = members(str(tmp_path / "together" / "demo")), members(str(tmp_path / "alone" / "demo"))
    assert one.keys() == two.keys() and len(one) == 4
    for name, tensors in one.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, two[name][key], rtol=1e-3, atol=2e-5, msg=f"{name} {key}")


def killed_while_it_trains(handle: RunHandle, rank: int) -> None:
    """Kill one rank of the gang as soon as it has taken some steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        jobs = handle.status().jobs.values()
        found = rank_pids()
        if len(found) == 2 and any(job.progress is not None and job.progress.done >= 12 for job in jobs):
            os.kill(sorted(found)[rank], signal.SIGKILL)
            return
        time.sleep(0.05)
    raise AssertionError("the gang did not train")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_its_gang_which_goes_on_from_its_commits(
    rank: int, make_spec: MakeSpec, tmp_path: Path
) -> None:
    changes = {"optimization__steps": 80, "checkpointing__every_steps": 5}
    handle = launch(spec_of(make_spec, SHARD, tmp_path / "gang", **changes))
    killed_while_it_trains(handle, rank)
    handle.wait()
    events = [event["event"] for event in RunStore(handle.store.uri).read_events()]
    assert events.count("WorkerLost") == 1 and events.count("WorkerReady") == 2
    run_local(spec_of(make_spec, REPLICATE, tmp_path / "alone", **changes))
    assert_bit_equal(members(handle.store.uri), members(str(tmp_path / "alone" / "demo")))


@pytest.mark.slow
def test_a_signal_stops_all_ranks_after_a_commit(make_spec: MakeSpec, tmp_path: Path) -> None:
    changes = {"optimization__steps": 60, "checkpointing__every_steps": 50}
    handle = launch(spec_of(make_spec, SHARD, tmp_path / "gang", **changes))

    def stop() -> None:
        while not any(j.progress is not None and j.progress.done >= 3 for j in handle.status().jobs.values()):
            time.sleep(0.05)
        handle.interrupt()

    threading.Thread(target=stop).start()
    with pytest.raises(Interrupted):
        handle.wait()
    store = handle.store
    assert all(store.checkpoint_steps(f"member-{number:03d}") for number in range(4))
    launch(spec_of(make_spec, SHARD, tmp_path / "gang", **changes)).wait()
    run_local(spec_of(make_spec, REPLICATE, tmp_path / "alone", **changes))
    assert_bit_equal(members(store.uri), members(str(tmp_path / "alone" / "demo")))
