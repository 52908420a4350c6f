"""A prepared base on disk: by what it is known again, and how its layers are put in place.

It lies beside the runs, in ``_bases/<model>-<hash>``, where every later run that asks for the same finds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raylora.adapters.base import is_linear
from raylora.engine.calibration import Calibration
from raylora.engine.persist import from_bytes
from raylora.engine.solve import Solved
from raylora.errors import BaseError
from raylora.quant.linear import QuantizedLinear
from raylora.quant.quantized import Quantized
from raylora.spec import BaseSpec, GridSpec
from raylora.store.run_store import RunStore

FOLDER = "_bases"
"""A run's name starts with a letter or digit, so no run is ever in the way."""
SUMMARY = "summary"
_FORMAT = 1


def is_prepared_kind(spec: BaseSpec) -> bool:
    """Return whether the base is one that is prepared before it is loaded."""
    return isinstance(spec.quantization, GridSpec)


def bases_folder(storage_path: str) -> str:
    """Return where the prepared bases of a storage path lie."""
    return f"{storage_path.rstrip('/')}/{FOLDER}"


def identity_of(spec: BaseSpec, calibration: Calibration | None, weights_sha256: str) -> dict[str, Any]:
    """Return everything that decides a prepared base: the weights, the tokens that it reads, the settings.

    ``trainable`` is not among them: it says who owns the pair, not what it is.
    """
    compensation = None
    if spec.compensation is not None:
        compensation = spec.compensation.model_dump(mode="json", exclude={"trainable"})
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


def prepared_store(run: RunStore) -> RunStore | None:
    """Return the prepared base that a run was begun with, which lies beside it; None if it needs none."""
    record = run.read_json("base.json")
    return RunStore(f"{bases_folder(run.uri.rpartition('/')[0])}/{record['prepared']}") if record else None


def weights_sha256(folder: str) -> str:
    """Return one hash of a model folder's weights, whatever the files are called."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def solved_layers(store: RunStore, block: int, spec: GridSpec) -> list[Solved]:
    """Return the layers of a committed block."""
    files = store.load_result(block_folder(block))
    facts = json.loads(files["facts.json"])
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in from_bytes(files["layers.safetensors"]).items():
        name, _, part = key.rpartition("|")
        parts.setdefault(name, {})[part] = tensor
    found = []
    for layer in facts["layers"]:
        own = parts[layer["name"]]
        shape = (int(layer["shape"][0]), int(layer["shape"][1]))
        quantized = Quantized.from_tensors(own, spec.bits, spec.group_of(shape[1]), shape)
        pair = (own["pair_A"], own["pair_B"]) if "pair_A" in own else None
        found.append(Solved(layer["name"], quantized, pair, layer["errors"], layer["seconds"]))
    return found


def block_folder(block: int) -> str:
    """Return where a block's layers are committed."""
    return f"blocks/block-{block:03d}"


def all_layers(store: RunStore, spec: Any) -> Iterator[list[Solved]]:
    """Yield the layers of every block, for a spec of evenly spaced grids.

    Raises:
        BaseError: the base was not prepared to the end.
    """
    for block in range(summary_of(store)["blocks"]):
        yield solved_layers(store, block, spec)


def summary_of(store: RunStore) -> dict[str, Any]:
    """Return what is recorded of a prepared base: sizes, errors per layer, perplexities, time and memory.

    Raises:
        BaseError: it was not prepared to the end.
    """
    if not store.has_result(SUMMARY):
        raise BaseError(f"{store.uri}: holds no prepared base", "run `raylora prepare SPEC`, or the run again")
    return store.read_json(f"{SUMMARY}/summary.json")


def install(model: nn.Module, layers: Sequence[Solved], dtype: torch.dtype, with_pair: bool = True) -> None:
    """Put quantised layers in the place of dense ones, whose weights are then free to go."""
    for layer in layers:
        parent_name, _, child = layer.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        dense: Any = getattr(parent, child)
        device = dense.weight.device
        bias = dense.bias.detach() if dense.bias is not None else None
        linear = QuantizedLinear(layer.quantized, bias, dtype, layer.pair if with_pair else None)
        setattr(parent, child, linear.to(device).eval().requires_grad_(False))


def weight_of(linear: Any) -> Tensor:
    """Return a dense layer's weight, O x I, also where it is stored the other way round."""
    assert is_linear(linear)
    return linear.weight.detach() if isinstance(linear, nn.Linear) else linear.weight.detach().T
