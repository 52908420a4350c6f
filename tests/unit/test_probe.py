"""A node that does not see the run directory is found before it does anything, and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylora.errors import PlacementError
from raylora.store.probe import judge, leave_probe, look_for_probe, opened_where_seen, remove_probe
from raylora.store.run_store import RunStore
from raylora.store.storage import Storage


def test_who_sees_the_same_directory_goes_on_and_nothing_is_left(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "runs/demo"))
    nonce = leave_probe(storage)
    sighting = look_for_probe(storage.uri, nonce, "node-1")
    assert sighting.node == "node-1" and sighting.found == nonce
    judge(storage.uri, nonce, sighting)
    store = opened_where_seen(storage.uri, 3, nonce, "node-1")
    assert store.epoch == 3 and store.uri == storage.uri
    assert not RunStore(storage.uri).is_begun() and RunStore(storage.uri).holder() is None  # it is no run and no holder
    remove_probe(storage, nonce)
    assert storage.list("lock") == []


@pytest.mark.parametrize("other", ["empty", "another run", "another content", "a folder"])
def test_a_node_with_a_disk_of_its_own_is_named_with_the_cure(tmp_path: Path, other: str) -> None:
    drivers, workers = Storage(str(tmp_path / "driver/runs")), Storage(str(tmp_path / "worker/runs"))
    nonce = leave_probe(drivers)
    if other == "another run":
        leave_probe(workers)
    elif other == "another content":
        workers.write(f"lock/probe-{nonce}", b"\xff\xfe")
    elif other == "a folder":
        workers.write(f"lock/probe-{nonce}/x", b"")
    with pytest.raises(PlacementError) as caught:
        opened_where_seen(workers.uri, 1, nonce, "gpu-7 (10.0.0.7)")
    assert caught.value.message.startswith(f"storage_path: node gpu-7 (10.0.0.7) does not see {workers.uri}")
    assert "shared mount, or s3://, gs://" in caught.value.hint and caught.value.exit_code == 2


def test_a_node_that_cannot_reach_the_storage_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    sighting = look_for_probe("nfs4://server/runs", "nonce", "gpu-7")
    with pytest.raises(PlacementError, match="node gpu-7 does not see .*: no storage is called nfs4"):
        judge("nfs4://server/runs", "nonce", sighting)
