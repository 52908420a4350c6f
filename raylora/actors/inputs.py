"""What a process on a node reads: its own files where it has the same, else what the coordinator publishes for it."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayActorError

from raylora.spec import RunSpec
from raylora.store.inputs import Publication
from raylora.store.run_store import RunStore

_AGAIN_S = 1.0


def spec_here(spec: RunSpec, store: RunStore, coordinator: Any) -> RunSpec:
    """Return a run's spec that reads models where this node has them, fetched from the run's storage if need be.

    Args:
        store: where the record of the work's models lies.

    Raises:
        StoreError: they cannot be published or fetched; the message names the node and the cure.
    """
    from raylora.engine.model.model_files import on_this_node

    def ask(role: str) -> Publication:
        while True:
            try:
                found: Publication = ray.get(coordinator.publish.remote(role))
                return found
            except RayActorError:  # its process died, and another is started; if none is, this process is ended
                time.sleep(_AGAIN_S)

    return on_this_node(spec, store, ask, lambda text: coordinator.tell.remote(text))
