"""The frozen model as one file per machine, mapped by every worker that computes with it.

What loading costs (casting, quantizing, putting layers in place) is paid once per machine and kept as a file in the
cache; a worker maps it in milliseconds, and all workers of a machine read the same physical pages. On a GPU each worker
copies its tensors from there, one after another.

The key of a tensor is ``<module>|<name>``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from raylora.adapters.base import is_linear
from raylora.data.catalog.assets import cache_folder
from raylora.data.catalog.isolation import global_state_kept
from raylora.engine.model.mapped_file import map_tensors, read_facts, write_tensors
from raylora.errors import BaseError
from raylora.quant.base import Quantizer

logger = logging.getLogger(__name__)

_FORMAT = 1
_KEPT_S = 30 * 24 * 3600.0
"""A file that nobody mapped for so long is deleted when another one is made."""
_LIBRARIES = ("torch", "transformers", "bitsandbytes")

Loaded = tuple[nn.Module, Sequence[str]]
"""A model, and the names that its checkpoint lacks."""


def shared_model(
    weights: Path, settings: Mapping[str, Any], quantizer: Quantizer, load: Callable[[], Loaded],
    shell: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype,
) -> Loaded:
    """Return a model over the pages of this machine's one copy of it, which is made first where there is none.

    Where no copy can be kept (no space, a cache that is not writable) the model is loaded for this process alone.

    Args:
        weights: the folder of its checkpoint.
        settings: what decides its tensors beside the checkpoint, JSON-able.
        load: makes the model from the checkpoint.
        shell: makes it without weights, on the meta device.
    """
    with global_state_kept():  # a model that is loaded draws random numbers, and one that is mapped does not
        identity = {**_identity(weights), **settings, "device": device.type, "dtype": str(dtype)}
        path = _place(weights, identity)
        try:
            _make(path, weights, quantizer, load)
        except OSError as error:
            logger.warning("the base is not shared with other workers: %s cannot be written: %s", path, error)
            return load()
        return _mapped(path, quantizer, shell, device, dtype)


def _make(path: Path, weights: Path, quantizer: Quantizer, load: Callable[[], Loaded]) -> None:
    """Write the model's file unless it is there, while other workers wait. Raises: OSError."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():  # another worker made it while this one waited
            return
        started = time.perf_counter()
        model, missing = load()
        tensors, facts = _taken_apart(model, quantizer)
        write_tensors(path, tensors, {**facts, "missing": list(missing), "weights": str(weights)})
        _sweep(path.parent)
    logger.info("made the base's file %s in %.1f s", path.name, time.perf_counter() - started)


def _taken_apart(model: nn.Module, quantizer: Quantizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return every tensor of a model once, and what it takes to put them together."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    also: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        coded = quantizer.to_tensors(module) if is_linear(module) else None
        if coded is not None:
            layers[name] = {"inputs": int(module.in_features), "outputs": int(module.out_features)}
        for key, tensor in (coded or dict(_tensors_of(module))).items():
            identity = (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype)
            own = first.setdefault(identity, f"{name}|{key}")
            if own != f"{name}|{key}":
                also[f"{name}|{key}"] = own
            else:
                tensors[own] = tensor.detach().cpu().contiguous()
    sharing = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    for key, tensor in tensors.items():
        if sharing[tensor.untyped_storage().data_ptr()] > 1:  # parts of one tensor, which a file holds apart
            tensors[key] = tensor.clone()
    return tensors, {"layers": layers, "also": also}


def _mapped(
    path: Path, quantizer: Quantizer, shell: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype
) -> Loaded:
    """Return a shell with the file's tensors in it."""
    started = time.perf_counter()
    facts = read_facts(path)
    found = {key: tensor if device.type == "cpu" else tensor.to(device) for key, tensor in map_tensors(path).items()}
    os.utime(path)  # used: it is kept
    parts: dict[str, dict[str, nn.Parameter]] = {}
    parameters = {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in found.items()}  # tied ones are one
    for key in [*found, *facts["also"]]:
        name, _, part = key.rpartition("|")
        parts.setdefault(name, {})[part] = parameters[facts["also"].get(key, key)]
    model = shell()
    for name, shape in facts["layers"].items():
        own = {key: tensor.data for key, tensor in parts.pop(name).items()}
        model.set_submodule(name, quantizer.from_tensors((shape["outputs"], shape["inputs"]), own, dtype))
    for name, rest in parts.items():
        module = model.get_submodule(name)
        for key, parameter in rest.items():
            if key in module._parameters:
                module._parameters[key] = parameter
            elif key in module._buffers:
                module._buffers[key] = parameter.data
            else:
                setattr(module, key, parameter.data)
    _check_whole(model, path)
    logger.info("mapped the base in %.3f s", time.perf_counter() - started)
    return model, facts["missing"]


def _check_whole(model: nn.Module, path: Path) -> None:
    """Raise BaseError if a tensor has no numbers: the model's code makes one that was not there when it was loaded."""
    for name, module in model.named_modules():
        for key, tensor in _tensors_of(module):
            if tensor.is_meta:
                raise BaseError(f"{path.name} lacks {name}.{key}", f"delete {path}: it is made again")


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own tensors: parameters, buffers, and those that it keeps as plain attributes."""
    held: Mapping[str, Any]
    for held in (module._parameters, module._buffers, vars(module)):
        for key, tensor in held.items():
            if isinstance(tensor, Tensor):
                yield key, tensor


def _identity(weights: Path) -> dict[str, Any]:
    """Return what a checkpoint's files are known by, without reading them, and the libraries that read them."""
    stats = [(path.name, path.stat()) for path in sorted(weights.glob("*.safetensors"))]
    return {
        "format": _FORMAT,
        "folder": str(weights.resolve()),
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "config": hashlib.sha256((weights / "config.json").read_bytes()).hexdigest(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def _place(weights: Path, identity: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "bases" / f"{weights.name}-{digest}.safetensors"


def _sweep(folder: Path) -> None:
    """Delete the files of checkpoints that are gone, and those that nobody has mapped for long."""
    for path in folder.glob("*.safetensors"):
        try:
            unused_s = time.time() - path.stat().st_mtime
            if unused_s > _KEPT_S or not Path(read_facts(path).get("weights", "")).is_dir():
                path.unlink()  # whoever has it mapped keeps it
        except (OSError, BaseError):
            continue
