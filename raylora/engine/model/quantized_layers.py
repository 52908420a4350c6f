"""The quantized layers of a prepared base: how they are read and put in place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raylora.adapters.base import is_linear
from raylora.engine.model.mapped_file import map_tensors
from raylora.engine.model.serialization import from_bytes
from raylora.errors import BaseError
from raylora.quant.base import Quantizer
from raylora.quant.linear import QuantizedLinear
from raylora.quant.quantized import Quantized
from raylora.records import PreparationSummary
from raylora.spec import GridSpec
from raylora.store.run_store import RunStore

FOLDER = "_bases"
"""A run's name starts with a letter or digit, so no run is ever in the way."""
SUMMARY = "summary"


def bases_folder(storage_path: str) -> str:
    """Return where the prepared bases of a storage path lie."""
    return f"{storage_path.rstrip('/')}/{FOLDER}"


def prepared_store(run: RunStore) -> RunStore | None:
    """Return the prepared base that a run was begun with, which lies beside it; None if it needs none."""
    record = run.read_json("base.json")
    return RunStore(f"{bases_folder(run.uri.rpartition('/')[0])}/{record['prepared']}") if record else None


def solved_layers(store: RunStore, block: int, spec: GridSpec) -> list[Solved]:
    """Return the layers of a committed block; of one in a bucket, over the pages of this machine's copy."""
    there = store.folder_here(block_folder(block))
    if there is None:
        files = store.load_result(block_folder(block))
        facts, tensors = json.loads(files["facts.json"]), from_bytes(files["layers.safetensors"])
    else:
        facts = json.loads((there / "facts.json").read_text())
        tensors = map_tensors(there / "layers.safetensors")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
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


def all_layers(store: RunStore, spec: GridSpec) -> Iterator[list[Solved]]:
    """Yield the layers of every block.

    Raises:
        BaseError: the base was not prepared to the end.
    """
    for block in range(summary_of(store)["blocks"]):
        yield solved_layers(store, block, spec)


def summary_of(store: RunStore) -> PreparationSummary:
    """Return what is recorded of a prepared base: sizes, errors per layer, perplexities, time and memory.

    Raises:
        BaseError: it was not prepared to the end.
    """
    if not store.has_result(SUMMARY):
        raise BaseError(f"{store.uri}: holds no prepared base", "run `raylora prepare SPEC`, or the run again")
    return store.read_json(f"{SUMMARY}/summary.json")


def content_hash(store: RunStore) -> str:
    """Return a hash that no other preparation has, be it of the same base. Raises: BaseError."""
    return hashlib.sha256(json.dumps(summary_of(store), sort_keys=True).encode()).hexdigest()


Coder = Callable[[str, nn.Module], "dict[str, Tensor] | None"]
"""(name, linear layer as the checkpoint has it) -> what its quantized layer is made of; None to leave it as it is."""


def prepared_coder(store: RunStore, spec: GridSpec, dtype: torch.dtype, with_pair: bool) -> Coder:
    """Return what hands out a prepared base's layers, which are asked for in the model's order.

    Raises:
        BaseError: the base was not prepared to the end.
    """
    names = {layer["name"] for layer in summary_of(store)["layers"]}
    blocks, waiting = all_layers(store, spec), dict[str, Solved]()

    def coded(name: str, linear: nn.Module) -> dict[str, Tensor] | None:
        if name not in names:
            return None
        while name not in waiting:
            waiting.update({layer.name: layer for layer in next(blocks)})
        layer = waiting.pop(name)
        a_RI, b_OR = layer.pair if layer.pair is not None and with_pair else (None, None)
        bias: Any = linear.bias
        beside = {"pair_A": a_RI, "pair_B": b_OR, "bias": bias}
        return {
            **layer.quantized.to_tensors(), **{k: t.detach().to(dtype) for k, t in beside.items() if t is not None}
        }

    return coded


def loading_coder(quantizer: Quantizer, device: torch.device, dtype: torch.dtype, skip: Sequence[str]) -> Coder:
    """Return what quantizes layers that need no preparation, on the device that will compute with them.

    Args:
        skip: the model's children that are left as they are, such as its head.
    """
    def coded(name: str, linear: nn.Module) -> dict[str, Tensor] | None:
        if name.partition(".")[0] in skip:
            return None
        found = quantizer.encode(weight_of(linear).to(device, dtype).contiguous())
        bias: Any = linear.bias
        return found if found is None or bias is None else {**found, "bias": bias.detach().to(dtype)}

    return coded


def install(model: nn.Module, layers: Sequence[Solved], dtype: torch.dtype, with_pair: bool = True) -> None:
    """Put quantized layers in the place of dense ones, whose weights are then free to go."""
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


@dataclass(frozen=True)
class Solved:
    """A linear's quantized weight, its pair, and what both are worth on the calibration data."""

    name: str
    quantized: Quantized
    pair: tuple[Tensor, Tensor] | None = None
    """(A R x I, B O x R), as they are stored."""
    errors: dict[str, float] = field(default_factory=dict)
    """Norms on the calibration inputs; see :func:`errors_of`."""
    seconds: float = 0.0
