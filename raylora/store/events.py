"""The event log of a run: a file that grows on a local disk, numbered segments on an object store.

A segment, ``events/<epoch>-<number>.jsonl``, is written anew with each event until it is full, so that n events cost
O(n). Every event names the epoch of the holder that wrote it, and a holder's first one says how many events it follows:
what an earlier holder adds later than that was seen by nobody, and readers leave it out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from raylora.errors import StoreError
from raylora.store.storage import Storage

FILE = "events.jsonl"
FOLDER = "events"
_SEGMENT = re.compile(r"(\d+)-(\d+)\.jsonl")
_SEGMENT_EVENTS = 200
_SEGMENT_BYTES = 1 << 16
Record = dict[str, Any]


class EventLog:
    """The log of one run directory, read by anybody and written by one holder at a time."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._epoch: int | None = None
        self._seen: int | None = None
        """How many events were there when the holder that writes read the log."""
        self._number: int | None = None
        self._segment: list[bytes] = []
        self._is_begun = False

    def write_as(self, epoch: int | None) -> None:
        """Write for the holder with this epoch from now on, or for nobody."""
        self._epoch, self._seen, self._number, self._segment = epoch, None, None, []
        self._is_begun = False

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one event durably. Raises: StoreError if it cannot be written."""
        record = dict(event)
        if self._epoch is not None:
            record["epoch"] = self._epoch
            if not self._is_begun:
                record["follows"] = self._seen if self._seen is not None else len(self.read())
        line = json.dumps(record, sort_keys=True).encode() + b"\n"
        if self.storage.is_local:
            self.storage.append(FILE, line)
        else:
            self._append_to_segment(line)
        self._is_begun = True

    def _append_to_segment(self, line: bytes) -> None:
        epoch = self._epoch or 0
        if self._number is None:
            own = [number for of, number in self._segments() if of == epoch]
            self._number = max(own, default=0) + 1
        elif len(self._segment) >= _SEGMENT_EVENTS or sum(map(len, self._segment)) >= _SEGMENT_BYTES:
            self._number, self._segment = self._number + 1, []
        self.storage.write(_path(epoch, self._number), b"".join([*self._segment, line]))
        self._segment.append(line)

    def read(self) -> list[Record]:
        """Return the events in order; a last line torn by a crash is left out, and so is what a replaced holder added.

        Raises:
            StoreError: a line is no event.
        """
        events = effective(self._in_order())
        if not self._is_begun:
            self._seen = len(events)
        return events

    def exists(self) -> bool:
        """Return whether there is a log."""
        return self.storage.exists(FILE) or bool(self._segments())

    def _in_order(self) -> list[Record]:
        """Return all records by their epochs: a run may have gone on in a bucket, or on a disk, after it was moved."""
        found: list[tuple[int, Record]] = []
        epoch = 0
        for record in self._records(FILE):
            epoch = record.get("epoch", epoch)
            found.append((epoch, record))
        for epoch, number in self._segments():
            found += [(epoch, record) for record in self._records(_path(epoch, number))]
        return [record for _, record in sorted(found, key=lambda one: one[0])]

    def _records(self, part: str) -> Iterator[Record]:
        try:
            content = self.storage.read(part)
        except FileNotFoundError:
            return
        for number, line in enumerate(content.split(b"\n")[:-1], 1):  # what follows the last line end is torn
            try:
                yield json.loads(line)
            except ValueError:
                raise StoreError(f"{self.storage.uri}/{part}:{number}: is not an event") from None

    def _segments(self) -> list[tuple[int, int]]:
        found = (match for name in self.storage.list(FOLDER) if (match := _SEGMENT.fullmatch(name)))
        return sorted((int(match[1]), int(match[2])) for match in found)


def _path(epoch: int, number: int) -> str:
    return f"{FOLDER}/{epoch:06d}-{number:06d}.jsonl"


def effective(records: Iterable[Record]) -> list[Record]:
    """Return what of a log counts: a newer holder goes on from what it had read, whatever an older one adds.

    A record without an epoch, as runs had before holders were numbered, belongs to whoever wrote before it.
    """
    kept: list[Record] = []
    current = 0
    for record in records:
        epoch = record.get("epoch", current)
        if epoch < current:
            continue
        if epoch > current:
            current = epoch
            del kept[record.get("follows", len(kept)):]
        kept.append(record)
    return kept
