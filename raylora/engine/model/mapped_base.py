"""The frozen model kept as files, once per machine, and mapped by every worker that computes with it.

What loading costs (casting, quantizing, putting layers in place) is paid once per machine, layer after layer, and kept
in the cache. A worker maps the files in milliseconds, and all workers of a machine read the same physical pages. On a
GPU each worker copies its tensors from there, one after another.

The key of a tensor is ``<module>|<name>``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raylora.adapters.base import is_linear
from raylora.data.catalog.isolation import global_state_kept
from raylora.engine.model.mapped_file import aligned, map_tensors, write_tensors
from raylora.engine.model.quantized_layers import Coder, weight_of
from raylora.errors import BaseError
from raylora.machine_cache import cache_folder, is_old, made_once, used
from raylora.quant.base import Quantizer

logger = logging.getLogger(__name__)

_FORMAT = 2
_FACTS = "base.json"
_LIBRARIES = ("torch", "transformers", "bitsandbytes")

_PART_BYTES = 64 * 2**20
"""Tensors are written when so much is together: of the base no more than this is held while its files are made."""


@dataclass(frozen=True)
class Source:
    """A checkpoint, and how its model becomes a base."""

    weights: Path
    """The folder of its files."""
    settings: Mapping[str, Any]
    """What decides the base's tensors beside the checkpoint, JSON-able."""
    load: Callable[[], tuple[nn.Module, Sequence[str]]]
    """Makes the model over the checkpoint's pages, unquantized, and says which names the checkpoint lacks."""
    shell: Callable[[], nn.Module]
    """Makes it without weights, in the compute type."""
    coder: Callable[[], Coder]
    quantizer: Quantizer
    device: torch.device
    dtype: torch.dtype


def shared_model(source: Source) -> tuple[nn.Module, Sequence[str]]:
    """Return a base over the pages of this machine's one copy, which is made first where there is none.

    Where no copy can be kept (no space, a cache that is not writable) the base is this process's own.
    Returned too are the names that the checkpoint lacks.
    """
    with global_state_kept():  # to load a model draws random numbers, and to map one does not
        folder = _place(source)
        try:
            _make(folder, source)
        except OSError as error:
            logger.warning("the base is not shared with other workers: %s cannot be written: %s", folder, error)
            kept: dict[str, Tensor] = {}
            facts = _convert(source, lambda key, tensor: kept.update({key: aligned(tensor)}))
            return _assembled(kept, facts, source), facts["missing"]
        started = time.perf_counter()
        facts = json.loads((folder / _FACTS).read_text())
        tensors: dict[str, Tensor] = {}
        for part in sorted(folder.glob("*.safetensors")):
            tensors |= map_tensors(part)
        used(folder)
        model = _assembled(tensors, facts, source)
        logger.info("mapped the base in %.3f s", time.perf_counter() - started)
        return model, facts["missing"]


# --- made once ------------------------------------------------------------------------------------------
def _make(folder: Path, source: Source) -> None:
    """Write a base's files unless they are there, while other workers wait. Raises: OSError."""
    started = time.perf_counter()

    def make(unfinished: Path) -> None:
        unfinished.mkdir()
        parts = _Parts(unfinished)
        facts = _convert(source, parts.add)
        parts.flush()
        (unfinished / _FACTS).write_text(json.dumps({**facts, "weights": str(source.weights)}))

    if made_once(folder, folder.with_suffix(".lock"), make):
        _sweep(folder.parent)
        logger.info("made the base %s in %.1f s", folder.name, time.perf_counter() - started)


def _convert(source: Source, add: Callable[[str, Tensor], None]) -> dict[str, Any]:
    """Hand out every tensor of a base once, layer after layer, and return what it takes to put them together."""
    model, missing = source.load()
    shell, coder = source.shell(), source.coder()
    in_float32 = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    layers: dict[str, Any] = {}
    also: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        plain: dict[str, Tensor] = {}
        for key, tensor in _tensors_of(module):
            identity = (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype)
            holder = first.setdefault(identity, f"{name}|{key}")
            if holder == f"{name}|{key}":
                plain[key] = tensor.detach()
            else:
                also[f"{name}|{key}"] = holder
        # What the checkpoint lacks is a head, which every member draws for itself.
        is_frozen = is_linear(module) and "weight" in plain and f"{name}.weight" not in missing
        coded = coder(name, module) if is_frozen else None
        if coded is not None:
            layers[name] = list(weight_of(module).shape)
        else:
            dtypes = {key: each.dtype for key, each in _tensors_of(shell.get_submodule(name))}
            exact = not in_float32.isdisjoint(name.split("."))
            coded = {key: each.to(torch.float32 if exact else dtypes[key]) for key, each in plain.items()}
        for key, each in coded.items():
            add(f"{name}|{key}", each.detach().cpu().contiguous())
    return {"layers": layers, "also": also, "missing": list(missing)}


class _Parts:
    """The files of a base, each written when enough tensors for it are together."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.waiting: dict[str, Tensor] = {}

    def add(self, key: str, tensor: Tensor) -> None:
        """Take a tensor. Raises: OSError."""
        is_part = tensor.untyped_storage().nbytes() > tensor.nbytes  # of a checkpoint's pages, say
        self.waiting[key] = tensor.clone() if is_part else tensor
        if sum(each.nbytes for each in self.waiting.values()) >= _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting. Raises: OSError."""
        if self.waiting:
            write_tensors(self.folder / f"part-{self.number:04d}.safetensors", self.waiting)
            self.waiting, self.number = {}, self.number + 1


# --- put together ---------------------------------------------------------------------------------------
def _assembled(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], source: Source) -> nn.Module:
    """Return a shell with these tensors in it; on a GPU, with copies of them."""
    device = source.device
    held = {key: nn.Parameter(each if device.type == "cpu" else each.to(device), requires_grad=False)
            for key, each in tensors.items()}  # one parameter each: what was tied stays so
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for key in [*held, *facts["also"]]:
        name, _, part = key.rpartition("|")
        parts.setdefault(name, {})[part] = held[facts["also"].get(key, key)]
    model = source.shell()
    for name, (outputs, inputs) in facts["layers"].items():
        own = {key: parameter.data for key, parameter in parts.pop(name).items()}
        model.set_submodule(name, source.quantizer.from_tensors((outputs, inputs), own, source.dtype))
    for name, rest in parts.items():
        module = model.get_submodule(name)
        for key, parameter in rest.items():
            if key in module._parameters:
                module._parameters[key] = parameter
            elif key in module._buffers:
                module._buffers[key] = parameter.data
            else:
                setattr(module, key, parameter.data)
    _check_whole(model)
    return model


def _check_whole(model: nn.Module) -> None:
    """Raise BaseError if a tensor has no numbers: the model's code makes one that was not there when it was loaded."""
    for name, module in model.named_modules():
        for key, tensor in _tensors_of(module):
            if tensor.is_meta:
                raise BaseError(f"base.source: the model's own code makes {name}.{key} differently without weights",
                                "it cannot be shared between workers")


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own tensors: parameters, buffers, and those that it keeps as plain attributes."""
    held: Mapping[str, Any]
    for held in (module._parameters, module._buffers, vars(module)):
        for key, tensor in held.items():
            if isinstance(tensor, Tensor):
                yield key, tensor


# --- the cache ------------------------------------------------------------------------------------------
def _place(source: Source) -> Path:
    """Return where the base is kept: by the checkpoint's files as they are, unread, and what decides its tensors."""
    weights = source.weights
    stats = [(path.name, path.stat()) for path in sorted(weights.glob("*.safetensors"))]
    identity = {
        **source.settings,
        "format": _FORMAT,
        "folder": str(weights.resolve()),
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "config": hashlib.sha256((weights / "config.json").read_bytes()).hexdigest(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "device": source.device.type,
        "dtype": str(source.dtype),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "bases" / f"{weights.name}-{digest}"


def _sweep(folder: Path) -> None:
    """Delete the bases of checkpoints that are gone, and those that nobody has mapped for long."""
    for facts in folder.glob(f"*/{_FACTS}"):
        try:
            if is_old(facts.parent) or not Path(json.loads(facts.read_text())["weights"]).is_dir():
                shutil.rmtree(facts.parent)  # whoever has it mapped keeps it
        except OSError:
            continue
    for lock in folder.glob("*.lock"):
        if not lock.with_suffix("").exists() and is_old(lock):
            lock.unlink(missing_ok=True)
