"""Who may write to a run directory: its holders are numbered, and only the latest one's commits count.

``lock/000007.json`` is the record of the seventh holder. Taking the directory is creating the next number, which of any
number of processes one does; nothing is ever overwritten or deleted, so neither a slow process nor a late heartbeat
can bring back a holder that was replaced. The number, the *epoch*, is the fencing token: whoever writes for a holder
first looks whether there is a newer one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from raylora.errors import LostRunError, RunDirectoryError
from raylora.store.storage import Storage

logger = logging.getLogger(__name__)

LOCK = "lock"
BEFORE_EPOCHS = "run.lock"
"""The only record of a holder before holders were numbered; one that is alive is still respected."""
STALE_S = 60.0
"""A holder on another machine whose heartbeat is older is dead."""
_FIELDS = {"host", "pid", "heartbeat", "started_at"}
_NAME = re.compile(r"(\d{6,})\.json")


@dataclass(frozen=True)
class Holder:
    """The process that holds a run directory."""

    host: str
    pid: int
    heartbeat: float
    is_alive: bool
    facts: Mapping[str, Any]
    """What it wrote about itself, such as the address of the Ray cluster that it is in."""


class Lock:
    """The numbered holders of one directory, seen by one process."""

    def __init__(self, storage: Storage, epoch: int | None = None) -> None:
        """Look on, or write on behalf of the holder with this epoch, as workers of a coordinator do."""
        self.storage, self.epoch = storage, epoch
        self._record: dict[str, Any] = {}

    def take(self, facts: Mapping[str, Any] | None = None) -> int:
        """Become the holder and return the epoch.

        Raises:
            RunDirectoryError: another living process is it; the message names it.
        """
        while True:
            latest = self._refuse_living()
            now = time.time()
            record = {
                "host": socket.gethostname(), "pid": os.getpid(), "process_started": psutil.Process().create_time(),
                "started_at": now, "heartbeat": now, "facts": dict(facts or {}), "epoch": latest + 1,
                "token": uuid.uuid4().hex,
            }
            name = _file(latest + 1)
            # A request that was sent twice, since its first answer was lost, finds what it wrote itself.
            if self.storage.create(name, _dump(record)) or self._read(name).get("token") == record["token"]:
                self.epoch, self._record = latest + 1, record
                if not self.storage.is_local and self.storage.create(name, _dump(record)):
                    logger.warning("%s: this storage writes over what should stay: see that no two processes begin "
                                   "or resume one run at the same moment", self.storage.uri)
                self.storage.delete(BEFORE_EPOCHS)
                return latest + 1

    def check_free(self) -> None:
        """Raise RunDirectoryError if another living process holds the directory; the message names it."""
        self._refuse_living()

    def check(self) -> None:
        """Refuse to write for a holder that was replaced; who never held the directory is not asked.

        Raises:
            LostRunError: there is a newer holder; the message names it.
        """
        if self.epoch is None or not self.is_lost():
            return
        _, record = self._latest()
        who = f"process {record['pid']} on {record['host']}" if set(record) >= _FIELDS else "another process"
        raise LostRunError(
            f"{self.storage.uri}: {who} has taken this run over, and nothing more is written for the one before",
            "it was taken for dead: see `raylora status`, and let one of them run",
        )

    def is_lost(self) -> bool:
        """Return whether there is a newer holder than the one that this process is, or writes for."""
        return self.epoch is not None and self.storage.exists(_file(self.epoch + 1))

    def beat(self) -> None:
        """Show that the holder is alive; one that was replaced stays replaced."""
        if self._record and self.epoch is not None and not self.is_lost():
            self._record = {**self._record, "heartbeat": time.time()}
            self.storage.write(_file(self.epoch), _dump(self._record))

    def release(self) -> None:
        """Give the directory up, if it is this process's; the epoch stays taken."""
        if self._record and self.epoch is not None and not self.is_lost():
            self.storage.write(_file(self.epoch), _dump({**self._record, "released_at": time.time()}))
        self.epoch, self._record = None, {}

    def holder(self) -> Holder | None:
        """Return who holds the directory, or held it when it died; None if nobody does."""
        record = self._latest()[1] or self._read(BEFORE_EPOCHS)
        if not set(record) >= _FIELDS:
            return None
        facts = record.get("facts", {})
        return Holder(record["host"], record["pid"], record["heartbeat"], _is_there(record), facts)

    def _refuse_living(self) -> int:
        """Return the latest epoch."""
        epoch, record = self._latest()
        for found in (record, self._read(BEFORE_EPOCHS)):
            if _is_another(found):
                started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["started_at"]))
                raise RunDirectoryError(
                    f"{self.storage.uri}: is in use by process {found['pid']} on {found['host']}, started {started}",
                    "wait for it, or stop it",
                )
        return epoch

    def _latest(self) -> tuple[int, dict[str, Any]]:
        """Return the latest epoch, 0 if there is none, and its holder's record: empty if it gave the directory up."""
        found = (match for name in self.storage.list(LOCK) if (match := _NAME.fullmatch(name)))
        epoch = max((int(match[1]) for match in found), default=0)
        record = self._read(_file(epoch)) if epoch else {}
        return epoch, {} if "released_at" in record else record

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self.storage.read(name))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _file(epoch: int) -> str:
    return f"{LOCK}/{epoch:06d}.json"


def _dump(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode()


def _is_another(record: Mapping[str, Any]) -> bool:
    """Return whether a record is of another process that is alive."""
    if not set(record) >= _FIELDS:
        return False
    mine = record["host"] == socket.gethostname() and record["pid"] == os.getpid()
    return not mine and _is_there(record)


def _is_there(record: Mapping[str, Any]) -> bool:
    if record["host"] != socket.gethostname():
        return bool(time.time() - record["heartbeat"] < STALE_S)
    try:
        started = psutil.Process(int(record["pid"])).create_time()
    except psutil.NoSuchProcess:
        return False
    # A process id is used again after a while; another start time is another process.
    return bool(abs(started - record.get("process_started", started)) < 1.0)
