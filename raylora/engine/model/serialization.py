"""Members as bytes: checkpoints, finished members in PEFT's format, and predictions.

Only safetensors and JSON are written, and whatever is read back is checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from raylora.adapters.base import HEAD, Tensors
from raylora.ensemble.outputs import output_of
from raylora.ensemble.predictions import Predictions
from raylora.errors import RunDirectoryError, StoreError


def pack_state(sections: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a checkpoint: named sections of tensors and a JSON of plain facts.

    Raises:
        StoreError: a tensor is not finite; such a state is never saved.
    """
    flat = {f"{section}/{name}": t for section, tensors in sections.items() for name, t in tensors.items()}
    for name, tensor in flat.items():
        if not torch.isfinite(tensor).all():
            raise StoreError(f"{name} is not finite and is not saved")
    return {"state.safetensors": to_bytes(flat), "state.json": json.dumps(facts, sort_keys=True).encode()}


def unpack_state(files: Mapping[str, bytes]) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Return the sections and facts of a checkpoint."""
    sections: dict[str, Tensors] = {}
    for key, tensor in safetensors.torch.load(files["state.safetensors"]).items():
        section, _, name = key.partition("/")
        sections.setdefault(section, {})[name] = tensor
    return sections, json.loads(files["state.json"])


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return tensors as safetensors bytes; each is copied out of whatever it shares."""
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    return safetensors.torch.save(own, metadata=dict(metadata or {"format": "pt"}))


def from_bytes(content: bytes) -> Tensors:
    """Return the tensors of safetensors bytes."""
    return safetensors.torch.load(content)


def layout_of(tensors: Mapping[str, Tensor], frozen_tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return what a member's untrained tensors are known by again, or None if it has none.

    Its own tensors' shapes tell one base from another; the hash of what was drawn (the integers) tells one draw
    from another. Fixed floats are computed from the base and may differ by rounding between machines.
    """
    if not frozen_tensors:
        return None
    digest = hashlib.sha256()
    for name in sorted(frozen_tensors):
        tensor = frozen_tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        if not tensor.is_floating_point():
            digest.update(tensor.numpy().tobytes())
    shapes = {name: list(tensors[name].shape) for name in sorted(tensors) if not name.startswith(HEAD)}
    return {"shapes": shapes, "fixed_sha256": digest.hexdigest()}


def check_layout(where: str, recorded: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> None:
    """Refuse to put a member together with untrained tensors other than those it was trained with.

    Raises:
        RunDirectoryError: the base has other layers now, or the draw comes out differently.
    """
    if recorded is None or found is None or recorded == found:
        return
    before, now = recorded["shapes"], found["shapes"]
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise RunDirectoryError(
                f"{where}: was trained on another base: {name} is {before.get(name, 'missing')} in the member and "
                f"{now.get(name, 'missing')} on this base", "use the base that it was trained on",
            )
    raise RunDirectoryError(
        f"{where}: its seed no longer gives the tensors that it was trained with",
        "its seed was changed, its base has other layers, or this version of torch draws other numbers than the one "
        "it was trained with",
    )


def pack_predictions(sets: Sequence[Predictions]) -> dict[str, bytes]:
    """Return the files that hold one group's predictions for every set."""
    tensors: Tensors = {}
    listing = []
    for item in sets:
        tensors[f"{item.name}/values"] = item.values
        if item.labels_N is not None:
            tensors[f"{item.name}/labels"] = item.labels_N
        if item.expected_entropy_MN is not None:
            tensors[f"{item.name}/expected_entropy"] = item.expected_entropy_MN
        listing.append({"name": item.name, "role": item.role, "ids": item.ids, "output": item.output})
    return {"predictions.safetensors": to_bytes(tensors), "sets.json": json.dumps(listing).encode()}


def unpack_predictions(files: Mapping[str, bytes]) -> list[Predictions]:
    """Return what :func:`pack_predictions` was given."""
    tensors = safetensors.torch.load(files["predictions.safetensors"])
    return [
        output_of(item["output"]).predictions(
            name=item["name"],
            role=item["role"],
            ids=item["ids"],
            values=tensors[f"{item['name']}/values"],
            labels_N=tensors.get(f"{item['name']}/labels"),
            expected_entropy_MN=tensors.get(f"{item['name']}/expected_entropy"),
        )
        for item in json.loads(files["sets.json"])
    ]


def join_members(parts: Sequence[Sequence[Predictions]]) -> list[Predictions]:
    """Return one group from the predictions of single members, set by set.

    Raises:
        StoreError: two members were evaluated on different rows.
    """
    joined = []
    for same_set in zip(*parts, strict=True):
        first = same_set[0]
        if any(p.name != first.name or p.ids != first.ids for p in same_set):
            raise StoreError(f"members were evaluated on different rows of set {first.name!r}")
        values = torch.cat([p.values for p in same_set])
        expected = [p.expected_entropy_MN for p in same_set if p.expected_entropy_MN is not None]
        joined.append(replace(first, values=values, expected_entropy_MN=torch.cat(expected) if expected else None))
    return joined
