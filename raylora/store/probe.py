"""Whether every process of a run sees one and the same run directory: a node without the shared mount has its own.

The driver leaves a nonce in the run directory; the coordinator and every worker look for it before anything else.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from raylora.errors import PlacementError, RayloraError
from raylora.store.lock import LOCK
from raylora.store.run_store import RunStore
from raylora.store.storage import Storage


@dataclass(frozen=True)
class Sighting:
    """What a process on a node found where the nonce should be."""

    node: str
    found: str
    """The nonce, or in words why there is none."""


def leave_probe(storage: Storage) -> str:
    """Write a nonce into a run directory and return it."""
    nonce = uuid.uuid4().hex
    storage.write(_place(nonce), nonce.encode())
    return nonce


def look_for_probe(uri: str, nonce: str, node: str) -> Sighting:
    """Return what is seen of a nonce in the run directory from this process, which runs on a node of that name."""
    try:
        return Sighting(node, Storage(uri).read(_place(nonce)).decode())
    except FileNotFoundError:
        return Sighting(node, "there is no such run there")
    except RayloraError as error:  # no package, no credentials, no connection
        return Sighting(node, error.message)
    except (OSError, UnicodeDecodeError) as error:
        return Sighting(node, f"it cannot be read there: {error}")


def judge(uri: str, nonce: str, sighting: Sighting) -> None:
    """Refuse a node that does not see the run directory. Raises: PlacementError."""
    if sighting.found != nonce:
        raise PlacementError(
            f"storage_path: node {sighting.node} does not see {uri} as the driver does: {sighting.found}",
            "use a storage_path that every node reaches: a folder on a shared mount, or s3://, gs:// or another bucket "
            "(its package and credentials have to be on every node)",
        )


def opened_where_seen(uri: str, epoch: int | None, nonce: str, node: str) -> RunStore:
    """Return the store of a run, to write for the holder with an epoch. Raises: PlacementError if it is not seen."""
    judge(uri, nonce, look_for_probe(uri, nonce, node))
    return RunStore(uri, epoch)


def remove_probe(storage: Storage, nonce: str) -> None:
    """Delete a nonce, once nobody looks for it any more."""
    storage.delete(_place(nonce))


def _place(nonce: str) -> str:
    return f"{LOCK}/probe-{nonce}"
