"""Finished members, read back from a run directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from raylora.adapters.base import Adapter, Tensors
from raylora.adapters.export import from_peft
from raylora.adapters.side_by_side import SideBySide, adapter_of
from raylora.engine.model.base import Base
from raylora.engine.model.member_tensors import expected_layout, frozen_tensors_of
from raylora.engine.model.serialization import check_layout, from_bytes
from raylora.engine.run.compressed_members import FILE, decompress_member
from raylora.engine.training.member_plan import member_plans_of
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore


def stacked_members(
    spec: RunSpec, base: Base, members: Mapping[str, Tensors], layouts: Mapping[str, Any] | None = None,
    among: Sequence[str] | None = None,
) -> Tensors:
    """Return members by name as one stack on the base's device, with what they need but did not train.

    Args:
        layouts: what each member's untrained tensors were when it was trained.
        among: the members whose adapters the model has, if those are more.

    Raises:
        RunDirectoryError: they come out differently now.
    """
    plans = {plan.name: plan for plan in member_plans_of(spec)}
    whole = []
    for name, tensors in members.items():
        adapter = adapter_of(plans[name].adapter)
        frozen_tensors = frozen_tensors_of(base, adapter, plans[name].stream("fixed"))
        check_layout(name, (layouts or {}).get(name), expected_layout(base, adapter, frozen_tensors))
        whole.append({n: t.to(base.device) for n, t in tensors.items()} | frozen_tensors)
    everyone = list(members if among is None else among)
    places = {name: place for place, name in enumerate(everyone)}
    return _beside(spec, everyone).stack(whole, [places[name] for name in members])


def adapters_of(spec: RunSpec, names: Sequence[str]) -> Adapter | Sequence[Adapter]:
    """Return the adapters of finished members as :func:`stacked_members` stacks them."""
    return _beside(spec, names).adapters


def _beside(spec: RunSpec, names: Sequence[str]) -> SideBySide:
    plans = {plan.name: plan for plan in member_plans_of(spec)}
    # Nothing is dropped any more: those who differ in nothing else multiply together.
    return SideBySide.of([plans[name].adapter.model_copy(update={"dropout": 0.0}) for name in names])


def read_members(
    spec: RunSpec, store: RunStore, base: Base, names: Sequence[str], among: Sequence[str] | None = None
) -> Tensors:
    """Return finished members as :func:`stacked_members`. Raises: StoreError for a damaged one."""
    files = {name: store.load_result(f"members/{name}") for name in names}
    return stacked_members(
        spec, base, {name: member_tensors(found) for name, found in files.items()},
        {name: member_facts(found).get("layout") for name, found in files.items()}, among,
    )


def weight_digests(store: RunStore, names: Sequence[str]) -> list[list[str]]:
    """Return each finished member's name with the SHA-256 of its weights. Raises: StoreError for a damaged one."""
    files = ((name, store.load_result(f"members/{name}")) for name in names)
    return [[name, hashlib.sha256(weights_of(found)).hexdigest()] for name, found in files]


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
    if FILE in files:
        return decompress_member(files[FILE])
    config = files.get("adapter_config.json")
    return from_peft(from_bytes(files["adapter_model.safetensors"]), json.loads(config) if config else None)


def weights_of(files: Mapping[str, bytes]) -> bytes:
    """Return the file of a member's folder that holds its weights."""
    return files[FILE] if FILE in files else files["adapter_model.safetensors"]


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
