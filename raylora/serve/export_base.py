"""A prepared base as a checkpoint that others load, with its pair as a PEFT adapter on it.

Two forms: ``base`` has every weight dequantized, in any program's reach; ``base-packed`` keeps the codes, in the
pack-quantized format of compressed-tensors, which transformers dequantizes as it loads. Everything that was not
quantized is copied from the original checkpoint, tensor by tensor.

Shapes: O outputs, I inputs, G groups per row, R rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from raylora.adapters.base import site_of
from raylora.adapters.export import to_peft
from raylora.adapters.lora import Spec as LoraSpec
from raylora.data.task import Task
from raylora.engine.model.blocks import base_linears
from raylora.engine.model.checkpoint import export_name, shell_model, weights_folder
from raylora.engine.model.quantized_layers import Solved, all_layers, prepared_store
from raylora.engine.model.serialization import to_bytes
from raylora.engine.model.sites import find_heads, target_names
from raylora.engine.training.distillation_loss import task_of
from raylora.errors import BaseError, RunDirectoryError, UsageError
from raylora.quant.packing import pack_codes, unpack_codes
from raylora.quant.quantized import Quantized
from raylora.spec import GridSpec, RunSpec
from raylora.store.run_store import RunStore

FORMATS = ("base", "base-packed")
Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class ExportedBase:
    """Where a base was written, and what it takes."""

    folder: str
    size_bytes: int
    pair_folder: str | None
    pair_bytes: int


def export_base(run: str, form: str = "base", out: str | None = None, dtype: Dtype = "bfloat16") -> ExportedBase:
    """Write the prepared base of a run as a checkpoint folder, and its pair as a PEFT LoRA folder beside it.

    Args:
        out: a local folder, by default ``export`` in the run directory.
        dtype: of every floating tensor; float32 reproduces raylora's numbers most closely.

    Raises:
        RunDirectoryError: there is no run.
        UsageError: its base is not one that is prepared, or its members own the pair.
    """
    store = RunStore(run)
    spec = store.read_spec()
    prepared = prepared_store(store)
    grid = spec.base.grid
    if prepared is None or grid is None:
        raise UsageError(
            f"{store.uri}: its base is quantized by {spec.base.quantization.kind} as it is loaded",
            "export its members: --format peft-lora",
        )
    if not store.storage.is_local and out is None:
        raise UsageError(f"{store.uri}: a base is written to a local folder", "name one with --out")
    target = Path(out or f"{store.uri}/export")
    layers = {layer.name: layer for block in all_layers(prepared, grid) for layer in block}
    task = task_of(spec)
    shell = shell_model(spec.base, task)
    transposed = {name for name in layers if not isinstance(shell.get_submodule(name), nn.Linear)}
    if form == "base-packed":
        _check_packable(layers, grid, transposed)
    folder = target / form
    if folder.exists():
        raise RunDirectoryError(f"{folder}: already exists", "choose another --out, or delete it")
    _write_checkpoint(Path(weights_folder(spec.base)), folder, layers, transposed, form, grid, dtype)
    pair, pair_bytes = None, 0
    if any(layer.pair is not None for layer in layers.values()):
        pair = target / f"{form}-pair"
        pair_bytes = _write_pair(spec, task, shell, layers, pair)
    (folder / "README.md").write_text(_readme(export_name(spec.base), grid, form, pair), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return ExportedBase(str(folder), size, str(pair) if pair else None, pair_bytes)


def _check_packable(layers: Mapping[str, Solved], grid: GridSpec, transposed: Collection[str]) -> None:
    """Raise UsageError for what the packed format cannot hold."""
    for name in transposed:
        raise UsageError(f"{name}: is stored inputs first, which the packed format cannot hold", "use --format base")
    for name, layer in layers.items():
        if layer.quantized.shape[1] % grid.group_of(layer.quantized.shape[1]):
            raise UsageError(
                f"{name}: {layer.quantized.shape[1]} inputs are not whole groups of {grid.group_size}, "
                "which the packed format asks for", "use --format base",
            )


def _write_checkpoint(
    source: Path, folder: Path, layers: Mapping[str, Solved], transposed: Collection[str], form: str, grid: GridSpec,
    dtype: Dtype,
) -> None:
    """Copy a checkpoint with the quantized weights in the place of the original ones."""
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja"):
            shutil.copy(path, staging / path.name)
    index: dict[str, str] = {}
    written: set[str] = set()
    for path in sorted(source.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        with safetensors.safe_open(path, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                layer = _layer_of(key, layers)
                if layer is None:
                    tensor = opened.get_tensor(key)
                    tensors[key] = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
                    continue
                written.add(layer.name)
                tensors |= dict(_replacement(key, layer.quantized, form, dtype, layer.name in transposed))
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, staging / path.name, {"format": "pt"})
        index |= dict.fromkeys(tensors, path.name)
    missing = layers.keys() - written
    if missing:
        shutil.rmtree(staging)
        raise BaseError(f"{source}: the checkpoint has no weight called {min(missing)}", "it is not the one prepared")
    _write_config(staging, grid, form, dtype, list(layers), index)
    staging.rename(folder)


def _layer_of(key: str, layers: Mapping[str, Solved]) -> Solved | None:
    """Return the layer whose weight a checkpoint's tensor is; a backbone's checkpoint leaves out the model's prefix."""
    name, _, part = key.rpartition(".")
    if part != "weight":
        return None
    if name in layers:
        return layers[name]
    found = [layer for own, layer in layers.items() if own.endswith("." + name) or name.endswith("." + own)]
    return found[0] if len(found) == 1 else None


def _replacement(
    key: str, quantized: Quantized, form: str, dtype: Dtype, transposed: bool
) -> Iterator[tuple[str, Tensor]]:
    if form == "base":
        weight_OI = quantized.dequantize().to(getattr(torch, dtype))
        yield key, weight_OI.T if transposed else weight_OI
        return
    outputs, inputs = quantized.shape
    zeros_GO = unpack_codes(quantized.zeros, quantized.bits, outputs * quantized.scales_OG.shape[1])
    zeros_GO = zeros_GO.view(outputs, -1).T.contiguous()
    yield f"{key}_packed", _words(quantized.codes)
    yield f"{key}_scale", quantized.scales_OG.to(getattr(torch, dtype))
    yield f"{key}_zero_point", _words(pack_codes(zeros_GO, quantized.bits)).T
    yield f"{key}_shape", torch.tensor([outputs, inputs])


def _words(packed: Tensor) -> Tensor:
    """Return rows of bytes as rows of int32 words, the last one filled with zeros; both formats fill low bits first."""
    return F.pad(packed, (0, -packed.shape[-1] % 4)).contiguous().view(torch.int32)


def _write_config(
    folder: Path, grid: GridSpec, form: str, dtype: Dtype, names: list[str], index: Mapping[str, str]
) -> None:
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if form == "base-packed":
        by_channel = grid.group_size == "channel"
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": [],
            "config_groups": {"group_0": {
                "targets": [f"re:.*{name.replace('.', '[.]')}$" for name in sorted(names)],
                "weights": {
                    "num_bits": grid.bits, "type": "int", "symmetric": False, "dynamic": False,
                    "strategy": "channel" if by_channel else "group",
                    "group_size": None if by_channel else grid.group_size,
                },
            }},
        }
    path.write_text(json.dumps(config, indent=2) + "\n")
    if (folder / "model.safetensors.index.json").exists():
        total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        content = {"metadata": {"total_size": total}, "weight_map": dict(index)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _write_pair(
    spec: RunSpec, task: Task, shell: nn.Module, layers: Mapping[str, Solved], folder: Path
) -> int:
    """Write the frozen pair as a LoRA whose scale is one, and return its size in bytes."""
    heads = list(find_heads(shell, []))
    assert set(base_linears(shell)) == set(layers)
    pairs = {name: layer.pair for name, layer in layers.items() if layer.pair is not None}
    rank = len(next(iter(pairs.values()))[0])
    tensors: dict[str, Tensor] = {}
    for name, (a_RI, b_OR) in pairs.items():
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = a_RI, b_OR
    sites = [site_of(name, shell.get_submodule(name)) for name in pairs]
    # A classifier's adapter would have to bring a head, and the pair belongs to the base alone.
    task_type = "CAUSAL_LM" if task.auto_class == "AutoModelForCausalLM" else "FEATURE_EXTRACTION"
    lora = LoraSpec(rank=rank, alpha=float(rank))
    peft = to_peft(tensors, lora, sites, target_names(shell, sites, heads), task_type, export_name(spec.base))
    folder.mkdir(parents=True, exist_ok=True)
    content = to_bytes(peft.tensors)
    (folder / "adapter_model.safetensors").write_bytes(content)
    (folder / "adapter_config.json").write_bytes(peft.config_bytes())
    return len(content)


def _readme(name: str, grid: GridSpec, form: str, pair: Path | None) -> str:
    loads = (
        "It loads with `from_pretrained` like the original; its weights are dequantized." if form == "base" else
        "It is in the pack-quantized format of `compressed-tensors`. In transformers, with that package installed: "
        "`from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))`."
    )
    compensated = (
        f"\nIts low-rank pair lies in `{pair.name}` as a PEFT adapter: "
        f"`PeftModel.from_pretrained(model, \"{pair.name}\")` gives the model that raylora trains members on.\n"
        if pair is not None else ""
    )
    return (
        f"---\nbase_model: {name}\ntags: [raylora, {grid.kind}, {grid.bits}-bit]\n---\n\n"
        f"# {name}, {grid.bits} bits by {grid.kind}\n\n{loads}\n{compensated}"
    )
