"""The event log: appended in constant time wherever it lies, and of two holders the newer one's word counts."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

from raylora.errors import StoreError
from raylora.store.events import EventLog, effective
from raylora.store.storage import _BLOCK, Storage


def log_of(storage: Storage, epoch: int | None) -> EventLog:
    log = EventLog(storage)
    log.write_as(epoch)
    return log


def numbers(storage: Storage) -> list[int]:
    return [event["n"] for event in EventLog(storage).read()]


def test_events_of_one_holder_after_another_are_read_in_order(storage: Storage) -> None:
    expected = []
    for epoch in (None, 1, 2, 11):
        log = log_of(storage, epoch)
        for _ in range(3):
            expected.append(len(expected))
            log.append({"n": expected[-1]})
    assert numbers(storage) == expected and EventLog(storage).exists()


def test_what_a_replaced_holder_adds_is_left_out_whenever_it_is_written(storage: Storage) -> None:
    slow = log_of(storage, 1)
    slow.append({"n": 0})
    new = log_of(storage, 2)
    assert [event["n"] for event in new.read()] == [0]
    slow.append({"n": -1})  # after the new one has read, and before it writes
    new.append({"n": 1})
    slow.append({"n": -2})
    new.append({"n": 2})
    assert numbers(storage) == [0, 1, 2]
    later = log_of(storage, 3)
    later.append({"n": 3})
    slow.append({"n": -3})
    assert numbers(storage) == [0, 1, 2, 3]


def test_what_counts_of_a_log_is_a_function_of_its_records() -> None:
    def records(*of: tuple[int | None, int, int | None]) -> list[dict[str, Any]]:
        keys = ("epoch", "n", "follows")
        return [{k: v for k, v in zip(keys, one, strict=True) if v is not None} for one in of]

    assert [r["n"] for r in effective(records((None, 0, None), (None, 1, None)))] == [0, 1]
    assert [r["n"] for r in effective(records((None, 0, None), (1, 1, 1), (None, 2, None)))] == [0, 1, 2]
    assert [r["n"] for r in effective(records((1, 0, 0), (1, 1, None), (2, 2, 1), (1, 3, None)))] == [0, 2]
    assert [r["n"] for r in effective(records((1, 0, 0), (3, 1, 1), (2, 9, 0), (3, 2, None)))] == [0, 1, 2]


def test_a_log_of_an_older_version_on_an_object_store_goes_on(storage: Storage) -> None:
    storage.write("events.jsonl", b'{"n": 0}\n{"n": 1}\n')
    log = log_of(storage, 1)
    log.append({"n": 2})
    assert numbers(storage) == [0, 1, 2]
    assert EventLog(storage).read()[2]["follows"] == 2


def test_a_log_goes_on_wherever_the_run_is_moved(tmp_path: Path) -> None:
    disk, store = Storage(str(tmp_path / "root")), Storage(f"memory://{uuid.uuid4().hex}/root")
    expected: list[int] = []
    for epoch, (here, there) in enumerate([(disk, store), (store, disk), (disk, store), (store, disk)], 1):
        log = log_of(here, epoch)
        for _ in range(2):
            log.append({"n": len(expected)})
            expected.append(len(expected))
        assert numbers(here) == expected
        for path in ["events.jsonl", *(f"events/{name}" for name in here.list("events"))]:
            if here.exists(path):
                there.write(path, here.read(path))
        assert numbers(there) == expected
    fsspec.filesystem("memory").store.clear()


def test_segments_are_few_and_small_and_each_event_writes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, written = Storage(f"memory://{uuid.uuid4().hex}/root"), []
    real = Storage.write

    def write(self: Storage, relative: str, content: bytes) -> None:
        written.append(len(content))
        real(self, relative, content)

    monkeypatch.setattr(Storage, "write", write)
    monkeypatch.setattr(Storage, "read", lambda self, path: pytest.fail(f"{path} was read"))
    log = log_of(storage, 7)
    log._seen = 0
    for n in range(1000):
        log.append({"n": n, "text": "x" * 100})
    assert len(written) == 1000 and max(written) <= (1 << 16) + 200
    monkeypatch.undo()
    assert storage.list("events") == [f"000007-{number:06d}.jsonl" for number in range(1, 6)]
    assert numbers(storage) == list(range(1000))
    log.append({"n": 1000, "text": "y" * 200_000})  # one that is larger than a segment has room in one
    log.append({"n": 1001})
    assert numbers(storage) == list(range(1002)) and len(storage.list("events")) == 7
    fsspec.filesystem("memory").store.clear()


def test_a_damaged_line_in_a_segment_is_refused_by_its_place() -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}/root")
    storage.write("events/000001-000002.jsonl", b'{"n": 0}\nnonsense\n')
    with pytest.raises(StoreError, match=r"events/000001-000002\.jsonl:2: is not an event"):
        EventLog(storage).read()
    fsspec.filesystem("memory").store.clear()


# --- on a local disk -------------------------------------------------------------------------------------
@pytest.mark.parametrize("torn", [0, 1, 50, _BLOCK - 1, _BLOCK, _BLOCK + 1, 3 * _BLOCK + 7])
@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_torn_line_of_any_length_is_dropped_and_nothing_else(tmp_path: Path, torn: int, lines: int) -> None:
    whole = b"".join(b'{"n": %d}\n' % n for n in range(lines))
    path = tmp_path / "events.jsonl"
    path.write_bytes(whole + b"x" * torn)
    Storage(str(tmp_path)).append("events.jsonl", b'{"n": 9}\n')
    assert path.read_bytes() == whole + b'{"n": 9}\n'


def test_an_append_reads_next_to_nothing_of_a_long_log(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.append("events.jsonl", b"x" * 5_000_000 + b"\n")
    before = _read_bytes()
    for _ in range(20):
        storage.append("events.jsonl", b"line\n")
    assert _read_bytes() - before < 1_000_000  # buffers of a few kilobytes, twenty times; read whole it is 100 MB
    assert os.path.getsize(tmp_path / "events.jsonl") == 5_000_001 + 20 * 5


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])
