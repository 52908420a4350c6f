"""A run on Ray in a bucket: workers see nothing but the storage; a node that does not see it ends the run by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import ray
from object_store import environment, make_bucket
from ray.exceptions import RayTaskError
from run_helpers import assert_bit_equal, members

from raylora import control
from raylora.actors.calls import _failure
from raylora.actors.sealed import Sealed
from raylora.actors.worker import Worker
from raylora.client import launch, resume, run_local
from raylora.engine.run.work import TrainingAssignment
from raylora.errors import Interrupted, PlacementError, StoreError, UnreachableError
from raylora.serve.predictor import load_ensemble
from raylora.spec import RunSpec
from raylora.store import commit
from raylora.store.run_store import RunStore

pytestmark = pytest.mark.usefixtures("ray_cluster")
MakeSpec = Callable[..., RunSpec]


@pytest.fixture
def ray_bucket(s3_server: str, ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return a bucket that the actors of this test reach too: the cluster was started without its address."""
    found = environment(s3_server)
    for key, value in found.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("raylora.logs.environment", lambda: found)  # what actors are started with
    yield make_bucket()


@pytest.mark.slow
def test_a_run_in_a_bucket_is_interrupted_resumed_and_equal_to_one_in_process(
    make_spec: MakeSpec, ray_bucket: str
) -> None:
    changes = {"ensemble__members": 2, "placement": {"workers": 2, "cpus_per_worker": 1}, "optimization__steps": 40}
    spec = make_spec(**changes, storage_path=f"{ray_bucket}/runs", checkpointing={"every_steps": 5})
    handle = launch(spec)
    while not handle.store.storage.list("checkpoints"):
        assert not handle.has_ended()
    handle.interrupt()
    with pytest.raises(Interrupted):
        handle.wait()
    metrics = resume(handle.uri).wait()
    store = RunStore(handle.uri)
    assert metrics["run"]["phase"] == "succeeded" and store.holder() is None
    assert commit.epoch_of(store.storage, "members/member-000") == 4  # driver and coordinator, twice
    assert store.storage.list("lock") == [f"{epoch:06d}.json" for epoch in range(1, 5)]
    assert b"<html" in store.storage.read("report.html") and not os.path.exists("s3:")
    assert len(load_ensemble(handle.uri).predict(["A film to remember."])) == 1
    local = make_spec(storage_path=f"{ray_bucket}/local")
    run_local(local)
    assert_bit_equal(members(handle.uri), members(local))


def test_a_node_that_does_not_see_the_run_ends_it_before_anything_is_trained(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raylora.client.leave_probe", lambda storage: "elsewhere")
    spec = make_spec()
    with pytest.raises(PlacementError, match=r"storage_path: node \S+ \([\d.]+\) does not see .*/runs/demo") as caught:
        launch(spec).wait()
    assert caught.value.exit_code == 2 and not RunStore.for_spec(spec).read_events()


def test_a_worker_on_a_node_that_does_not_see_the_run_ends_it_too(make_spec: MakeSpec) -> None:
    handle = launch(make_spec())
    while handle.store.holder() is None:  # the coordinator has seen the run; its worker takes seconds to start
        assert not handle.has_ended()
    for name in handle.store.storage.list("lock"):
        if name.startswith("probe-"):
            handle.store.storage.delete(f"lock/{name}")
    with pytest.raises(PlacementError, match=r"storage_path: node \S+ \([\d.]+\) does not see .*/runs/demo"):
        handle.wait()
    assert [event["event"] for event in handle.store.read_events()] == ["RunStarted"]


def test_a_worker_looks_for_the_run_before_it_loads_anything(make_spec: MakeSpec) -> None:
    spec = make_spec()
    told = (spec.run_name(), Sealed.of(spec), RunStore.for_spec(spec).uri, 1, 0, Sealed.of(TrainingAssignment()))
    worker = Worker.remote(*told, 1, "elsewhere")  # type: ignore[attr-defined]
    with pytest.raises(PlacementError, match="does not see"):
        ray.get(worker.load.remote())
    ray.kill(worker)


def test_a_job_whose_storage_was_out_of_reach_for_a_moment_is_tried_again() -> None:
    def failed(cause: Exception) -> control.Event:
        error = RayTaskError("run_job", "traceback", cause)
        return _failure(error, "worker-0", control.RunJob("job-00", 1, "worker-0", ("member-000",)))

    for cause, fatal in ((UnreachableError("no network"), False), (StoreError("disk full"), True), (OSError(), False)):
        event = failed(cause)
        assert isinstance(event, control.JobFailed) and event.fatal is fatal
