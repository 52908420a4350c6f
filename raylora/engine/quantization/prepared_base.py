"""A prepared base on disk: by what it is known again, and how its layers are put in place.

It lies beside the runs, in ``_bases/<model>-<hash>``, where every later run that asks for the same finds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylora.engine.quantization.calibration import Calibration
from raylora.spec import BaseSpec
from raylora.store.run_store import RunStore

_FORMAT = 1


def identity_of(spec: BaseSpec, calibration: Calibration | None, weights_sha256: str) -> dict[str, Any]:
    """Return everything that decides a prepared base: the weights, the tokens that it reads, the settings.

    ``trainable`` and ``start`` are not among them: they say who owns the pair and how it is trained, not what it is.
    """
    compensation = None
    if spec.compensation is not None:
        compensation = spec.compensation.model_dump(mode="json", exclude={"trainable", "start"})
    return {
        "format": _FORMAT,
        "weights_sha256": weights_sha256,
        "quantization": spec.quantization.model_dump(mode="json"),
        "compensation": compensation,
        "calibration": calibration.content_hash if calibration is not None else None,
    }


def store_of(spec: BaseSpec, folder: str, identity: Mapping[str, Any]) -> RunStore:
    """Return the store of the prepared base with this identity."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    name = "".join(c if c.isalnum() else "-" for c in spec.source.removeprefix("pypi:").rpartition("/")[2].lower())
    return RunStore(f"{folder}/{name}-{digest}")


def weights_sha256(folder: str) -> str:
    """Return one hash of a model folder's weights, whatever the files are called."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


