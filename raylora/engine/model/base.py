"""The frozen base: found, loaded and quantized once, then never written to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raylora import registry
from raylora.adapters.base import Adapter, Site
from raylora.adapters.packed import Slot, attach
from raylora.data.task import Task
from raylora.engine.model.checkpoint import export_name, is_decoder, load_model, load_tokenizer, quantizer_of
from raylora.engine.model.machine import compute_dtype
from raylora.engine.model.quantized_layers import all_layers, install
from raylora.engine.model.sites import adapter_sites, find_heads, target_names
from raylora.engine.model.trunk import Trunk, find_trunk
from raylora.errors import BaseError
from raylora.quant.base import Quantizer
from raylora.quant.linear import QuantizedLinear
from raylora.quant.nf4 import logical_size
from raylora.spec import AdapterSpec, BaseSpec, GridSpec
from raylora.store.run_store import RunStore


@dataclass
class Base:
    """A loaded base with its adapter sites attached; only the slot ever changes."""

    model: nn.Module
    tokenizer: Any
    quantizer: Quantizer
    slot: Slot
    sites: list[Site]
    trunk: Trunk | None
    """The blocks below the first adapted one, which are the same for all members; None where there are none."""
    heads: dict[str, nn.Linear]
    """The task head's linears by name; members own copies, these stay as loaded."""
    fresh_heads: frozenset[str]
    """Heads that the checkpoint does not hold: every member draws its own."""
    device: torch.device
    dtype: torch.dtype
    size_bytes: int
    is_decoder: bool
    initializer_range: float
    target_modules: list[str]
    """The sites as PEFT names them: by their endings where those select the same layers, else in full."""
    export_name: str
    """What an exported adapter calls this base: a hub id or a relative name, never an absolute path."""
    start_pairs: dict[str, tuple[Tensor, Tensor]]
    """By site: (A_RI, B_OR) that a member's own LoRA starts from, where the compensation is trainable."""

    def weight_of(self, name: str) -> Tensor:
        """Return a site's frozen weight, O x I, in float32, dequantized if need be."""
        linear: Any = self.model.get_submodule(name)
        linear = getattr(linear, "base", linear)
        return self.quantizer.dequantize(linear).float()

    @property
    def parameters(self) -> int:
        """Number of base weights, counted before packing them into fewer bytes."""
        coded = (m for m in self.model.modules() if isinstance(m, QuantizedLinear))
        return sum(logical_size(p) for p in self.model.parameters()) + sum(
            m.in_features * m.out_features + (0 if m.bias is None else m.bias.numel()) for m in coded
        )


def load_base(
    spec: BaseSpec, adapter_spec: AdapterSpec, task: Task, device: torch.device, prepared: RunStore | None = None
) -> Base:
    """Load, quantize, freeze and attach.

    Args:
        prepared: where the quantized layers lie, for the kinds that are prepared beforehand.

    Raises:
        BaseError: the base is not there or not prepared, or the adapter does not fit it.
    """
    dtype = compute_dtype(spec.dtype, device)
    tokenizer = load_tokenizer(spec, task)
    model, missing = load_model(spec, task, device, dtype)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    heads = find_heads(model, missing)
    adapter: Adapter = registry.load("adapter", adapter_spec.kind).build(adapter_spec)
    sites = adapter_sites(model, adapter, list(heads))
    head_modules = {name: model.get_submodule(name) for name in heads}
    targets = target_names(model, sites, list(heads))
    # The sites are those of the original: a layer that is stored the other way round is still exported so.
    start_pairs = _install_prepared(model, spec, spec.grid, dtype, prepared) if spec.grid is not None else {}
    held = [*model.parameters(), *(b for m in model.modules() if isinstance(m, QuantizedLinear) for b in m.buffers())]
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    slot = attach(model, sites, list(heads))
    return Base(
        model=model,
        tokenizer=tokenizer,
        quantizer=quantizer_of(spec),
        slot=slot,
        sites=sites,
        trunk=find_trunk(model, sites, {"use_cache": False} if is_decoder(model.config) else {}),
        heads=head_modules,
        fresh_heads=frozenset(name for name, fresh in heads.items() if fresh),
        device=device,
        dtype=dtype,
        size_bytes=size_bytes,
        is_decoder=is_decoder(model.config),
        initializer_range=float(getattr(model.config, "initializer_range", 0.02)),
        target_modules=targets,
        export_name=export_name(spec),
        start_pairs=start_pairs,
    )


def _install_prepared(
    model: nn.Module, spec: BaseSpec, grid: GridSpec, dtype: torch.dtype, prepared: RunStore | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Put the prepared layers in place, block by block; return the pairs that are the members' and not the base's."""
    if prepared is None:
        raise BaseError(f"base.quantization: {grid.kind} is prepared beforehand", "run `raylora prepare`")
    trainable = spec.compensation is not None and spec.compensation.trainable
    start: dict[str, tuple[Tensor, Tensor]] = {}
    for layers in all_layers(prepared, grid):
        install(model, layers, dtype, with_pair=not trainable)
        if trainable:
            start |= {layer.name: layer.pair for layer in layers if layer.pair is not None}
    return start


def head_tensors(base: Base) -> dict[str, Tensor]:
    """Return float32 copies of the head as loaded, by ``<module>.weight`` and ``<module>.bias``."""
    return {
        f"{name}.{key}": parameter.detach().float().cpu().clone()
        for name, module in base.heads.items()
        for key, parameter in module.named_parameters()
    }


