"""Finished members, read back from a run directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from raylora import registry
from raylora.adapters.base import Tensors
from raylora.adapters.export import from_peft
from raylora.adapters.packed import stack
from raylora.engine.model.base import Base
from raylora.engine.model.member_tensors import expected_layout, frozen_tensors_of
from raylora.engine.model.serialization import check_layout, from_bytes
from raylora.engine.training.member_plan import member_plans_of
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore


def stacked_members(
    spec: RunSpec, base: Base, members: Mapping[str, Tensors], layouts: Mapping[str, Any] | None = None
) -> Tensors:
    """Return members by name as one stack on the base's device, with what they need but did not train.

    Args:
        layouts: what each member's untrained tensors were when it was trained.

    Raises:
        RunDirectoryError: they come out differently now.
    """
    adapter = registry.load("adapter", spec.adapter.kind).build(spec.adapter)
    seeds = {plan.name: plan.stream("fixed") for plan in member_plans_of(spec)}
    frozen_tensors = {name: frozen_tensors_of(base, adapter, seeds[name]) for name in members}
    for name in members:
        check_layout(name, (layouts or {}).get(name), expected_layout(base, adapter, frozen_tensors[name]))
    return stack([
        {n: t.to(base.device) for n, t in tensors.items()} | frozen_tensors[name] for name, tensors in members.items()
    ])


def read_members(spec: RunSpec, store: RunStore, base: Base, names: Sequence[str]) -> Tensors:
    """Return finished members as :func:`stacked_members`. Raises: StoreError for a damaged one."""
    files = {name: store.load_result(f"members/{name}") for name in names}
    return stacked_members(
        spec, base, {name: member_tensors(found) for name, found in files.items()},
        {name: member_facts(found).get("layout") for name, found in files.items()},
    )


def weight_digests(store: RunStore, names: Sequence[str]) -> list[list[str]]:
    """Return each finished member's name with the SHA-256 of its weights. Raises: StoreError for a damaged one."""
    files = ((name, store.load_result(f"members/{name}")) for name in names)
    return [[name, hashlib.sha256(found["adapter_model.safetensors"]).hexdigest()] for name, found in files]


def members_digest(spec: RunSpec, store: RunStore, names: Sequence[str]) -> str:
    """Return the SHA-256 of what finished members say together: weights, base, adapter, task and aggregation.

    Raises:
        StoreError: a member is damaged.
    """
    parts = [part.model_dump(mode="json") for part in (spec.base, spec.adapter, spec.task)]
    content = [*parts, spec.ensemble.aggregate, weight_digests(store, names)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def member_tensors(files: Mapping[str, bytes]) -> Tensors:
    """Return what a member's folder holds, under raylora's names."""
    config = files.get("adapter_config.json")
    return from_peft(from_bytes(files["adapter_model.safetensors"]), json.loads(config) if config else None)


def member_facts(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the plain facts that a member's folder holds: its seed, adapter, base and history."""
    return json.loads(files["member.json"])


def teacher_digest(
    spec: RunSpec, store: RunStore, members: Sequence[str], shares: Sequence[float] | None = None
) -> str:
    """Return the SHA-256 of a teacher: its spec, the weights of those members who teach, and the share of each.

    Args:
        shares: what each member weighs in the mixture; None where all weigh alike.

    Raises:
        StoreError: a member is damaged.
    """
    parts = [spec.digest(), weight_digests(store, members), *([list(shares)] if shares is not None else [])]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
