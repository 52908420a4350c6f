"""No actor stays behind, however a run ends; what a dying coordinator leaves to the next one is ready or gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util import list_named_actors

from raylora.actors.calls import WorkerHandle, taken_over
from raylora.actors.coordinator import NAMESPACE, coordinator_name
from raylora.actors.sealed import Sealed
from raylora.actors.worker import Worker, WorkerFacts
from raylora.client import attach, launch
from raylora.engine.run.work import TrainingAssignment
from raylora.errors import Interrupted, LostRunError, PlacementError
from raylora.spec import RunSpec, dump_spec
from raylora.store.run_store import RunStore

pytestmark = pytest.mark.usefixtures("ray_cluster")
MakeSpec = Callable[..., RunSpec]
_DRIVER = """
import sys, time, raylora
handle = raylora.launch(raylora.read_spec(sys.argv[1]), detach=sys.argv[2] == "detached")
while not any(job.progress is not None for job in handle.status().jobs.values()):
    time.sleep(0.1)
print("training", flush=True)
sys.stdin.readline()
"""


def actors_of(uri: str) -> list[str]:
    """Return a run's actors that the cluster has, whoever they are."""
    own = coordinator_name(uri).removeprefix("coordinator-")
    return sorted(actor["name"] for actor in list_named_actors(all_namespaces=True) if own in actor["name"])


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited too long until {what}"
        time.sleep(0.2)


def test_no_actor_stays_when_a_run_is_cancelled(make_spec: MakeSpec) -> None:
    handle = launch(make_spec(optimization__steps=5000))
    wait_for(lambda: any(job.progress for job in handle.status().jobs.values()), "it trains")
    kinds = [name.partition("-")[0] for name in actors_of(handle.uri)]
    assert kinds == ["coordinator", "demo", "keeper"]
    assert handle.cancel()
    wait_for(lambda: len(actors_of(handle.uri)) == 1, "its worker and its keeper are gone")
    with pytest.raises(Interrupted):
        handle.result()
    assert not actors_of(handle.uri)


def test_no_actor_stays_when_a_run_cannot_start(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylora.client.leave_probe", lambda storage: "elsewhere")
    spec = make_spec()
    with pytest.raises(PlacementError, match="does not see"):
        launch(spec).wait(lambda status: None)
    wait_for(lambda: not actors_of(RunStore.for_spec(spec).uri), "nobody is left")


@pytest.fixture
def driver(make_spec: MakeSpec, tmp_path: Path) -> Callable[[str], tuple[str, subprocess.Popen[str]]]:
    """Return a function that starts a run from another process and returns where it is, and that process."""

    def start(how: str) -> tuple[str, subprocess.Popen[str]]:
        spec, file = make_spec(optimization__steps=20000), tmp_path / "spec.yaml"
        file.write_text(dump_spec(spec))
        found = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _DRIVER, str(file), how], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        )
        assert found.stdout is not None and found.stdout.readline() == "training\n"
        return RunStore.for_spec(spec).uri, found

    return start


def facts_of(uri: str) -> list[WorkerFacts]:
    own = [ray.get_actor(name, namespace=NAMESPACE) for name in actors_of(uri) if "-worker-" in name]
    return [ray.get(actor.facts.remote()) for actor in own]


def pids_of(uri: str) -> list[int]:
    return [facts.pid for facts in facts_of(uri)]


@pytest.mark.slow
def test_no_actor_stays_when_the_driver_is_killed(driver: Callable[[str], Any]) -> None:
    uri, process = driver("attached")
    pids = pids_of(uri)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not actors_of(uri) and not any(map(psutil.pid_exists, pids)), "nobody is left")
    assert len(pids) == 1


@pytest.mark.slow
def test_no_actor_stays_when_a_detached_coordinator_is_gone_for_good(driver: Callable[[str], Any]) -> None:
    uri, process = driver("detached")
    process.communicate("go\n", timeout=240)
    pids = pids_of(uri)
    assert len(pids) == 1, "it goes on without its driver"
    ray.kill(ray.get_actor(coordinator_name(uri), namespace=NAMESPACE))
    wait_for(lambda: not actors_of(uri) and not any(map(psutil.pid_exists, pids)), "nobody is left")


@pytest.mark.slow
def test_a_detached_coordinator_goes_on_by_itself_with_the_workers_that_it_had(driver: Callable[[str], Any]) -> None:
    uri, process = driver("detached")
    process.communicate("go\n", timeout=240)
    before, store = facts_of(uri), RunStore(uri)
    ray.kill(ray.get_actor(coordinator_name(uri), namespace=NAMESPACE), no_restart=False)
    wait_for(lambda: [e["event"] for e in store.read_events()].count("RunStarted") == 2, "the next one has begun")
    assert facts_of(uri) == before and before[0].loaded_at is not None
    handle = attach(uri)
    assert handle.cancel()
    with pytest.raises(Interrupted):
        handle.result()
    wait_for(lambda: not actors_of(uri), "nobody is left")


@pytest.mark.slow
def test_a_keeper_that_dies_takes_its_workers_along_and_the_run_starts_others(make_spec: MakeSpec) -> None:
    handle = launch(make_spec(optimization__steps=400, checkpointing__every_steps=20))
    wait_for(lambda: handle.store.storage.list("checkpoints/member-000"), "a checkpoint is committed")
    before = facts_of(handle.uri)
    (keeper,) = [name for name in actors_of(handle.uri) if name.startswith("keeper")]
    ray.kill(ray.get_actor(keeper, namespace=NAMESPACE), no_restart=False)
    assert handle.wait(lambda status: None)["run"]["phase"] == "succeeded"
    (lost,) = [event for event in handle.store.read_events() if event["event"] == "WorkerLost"]
    timing = handle.store.read_json("timing/job-00.json")
    assert lost["by_machine"] and timing["pid"] != before[0].pid and timing["resumed_at_step"] >= 20
    wait_for(lambda: not actors_of(handle.uri), "nobody is left")


def test_a_worker_commits_for_the_coordinator_that_took_it_over_and_one_that_was_not_never_does(
    make_spec: MakeSpec
) -> None:
    from raylora.engine.run.plan_run import prepare

    prepared, boss = prepare(make_spec()), RefusesNothing.remote()  # type: ignore[attr-defined]
    spec, store = prepared.spec, prepared.store
    with store.held():
        prepared.begin()
        store.storage.write("lock/probe-nonce", b"nonce")
        epoch = store.epoch
        told = (spec.run_name(), Sealed.of(spec), store.uri, 1, 0, Sealed.of(TrainingAssignment()))
        made = [
            Worker.remote(*told, epoch, "nonce")  # type: ignore[attr-defined]
            for _ in range(3)
        ]
        ray.get([made[0].load.remote(), made[1].load.remote()])
    with store.held():  # another process of the coordinator
        workers = [WorkerHandle(f"worker-{number}", [actor]) for number, actor in enumerate(made)]
        ray.kill(made[2])
        ready = taken_over(workers[1:], store.epoch, 60.0)
        assert ready == {"worker-1"}
        late = made[0].run_job.remote("job-00", ["member-000", "member-001"], boss)
        with pytest.raises(LostRunError, match="has taken this run over"):
            ray.get(late)
        assert not store.storage.list("members")
        assert taken_over([WorkerHandle("gang", [made[1], made[2]])], store.epoch, 60.0) == set()
        none = Worker.remote(*told, epoch, "nonce")  # type: ignore[attr-defined]
        assert taken_over([WorkerHandle("unloaded", [none])], store.epoch, 60.0) == set()
        assert taken_over(workers[1:2], store.epoch, 60.0) == {"worker-1"}
        before = ray.get(made[1].facts.remote())
        ray.get(made[1].run_job.remote("job-00", ["member-000", "member-001"], boss))
        assert store.storage.list("members") == ["member-000", "member-001"]
        assert ray.get(made[1].facts.remote()) == before and before.loaded_at is not None
    for actor in (made[0], made[1], none, boss):
        ray.kill(actor)


@ray.remote(num_cpus=0)
class RefusesNothing:
    """A coordinator that takes every report."""

    def report(self, job: str, progress: Any, rank: int = 0) -> None:
        """Take it."""
