"""What a run does about its trunk: whether it has one, what a plan says of it, and where its cache lies."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from raylora.adapters.base import Site
from raylora.data.task import Example
from raylora.engine.model.base import Base
from raylora.engine.model.blocks import find_blocks
from raylora.engine.model.trunk import trunk_blocks
from raylora.engine.model.trunk_cache import TrunkCache
from raylora.errors import BaseError, SpecError
from raylora.machine_cache import cache_folder
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore

logger = logging.getLogger(__name__)


def check_trunk(spec: RunSpec, shell: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Return what a plan should say of the blocks below the first adapted one: nothing, where there are none.

    Raises:
        SpecError: they are to be cached, and there are none.
    """
    depth = len(trunk_blocks(shell, sites))
    if depth == 0:
        if spec.optimization.cache_trunk:
            raise SpecError(
                "optimization.cache_trunk: the first block has an adapter already, or members have none: there is "
                "nothing below that is the same in every epoch",
                "adapt the last k blocks only with adapter.layers: {last: k}, or use cache_trunk: false",
            )
        return []
    rows = "members that read the same rows (ensemble.data_order: shared, and every evaluation) compute them once"
    if spec.optimization.cache_trunk:
        size = f"{spec.optimization.cache_trunk_gb:g} GB"
        rows += f"; for training rows they are kept on disk in bfloat16, up to {size}"
    return [f"no adapter is in the first {depth} of {len(find_blocks(shell))} blocks: {rows}"]


def open_trunk_cache(spec: RunSpec, store: RunStore, base: Base, train: Sequence[Example]) -> TrunkCache | None:
    """Return where the trunk's activations of a run's training rows are kept, or None if they are not to be.

    Raises:
        BaseError: this model's trunk cannot be computed by itself.
    """
    if not spec.optimization.cache_trunk:
        return None
    if base.trunk is None:
        raise BaseError(
            f"optimization.cache_trunk: {type(base.model).__name__} cannot be computed in two parts",
            "use cache_trunk: false",
        )
    limit_bytes = int(spec.optimization.cache_trunk_gb * 1e9)
    identity = spec.base.model_dump_json()
    cache = TrunkCache(base, base.trunk, train, trunk_folder(store), limit_bytes, identity)
    if cache.rows < cache.all_rows:
        logger.warning(
            "optimization.cache_trunk_gb: %d of %d training rows fit; the others are computed in every epoch",
            cache.rows, cache.all_rows,
        )
    return cache


def discard_trunk_cache(store: RunStore) -> None:
    """Delete what was kept on this machine: members that are finished no longer read it."""
    shutil.rmtree(trunk_folder(store), ignore_errors=True)


def trunk_folder(store: RunStore) -> Path:
    """Return the run directory's ``trunk``; for one that is not on a local disk, a folder of this machine's cache."""
    if store.storage.is_local:
        return Path(store.storage.path("trunk"))
    return cache_folder() / "trunks" / hashlib.sha256(store.uri.encode()).hexdigest()[:16]
