"""The frozen base: found, loaded and quantized once, then never written to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raylora.adapters.base import Adapter, Site, WholeModel
from raylora.adapters.packed import Slot, attach
from raylora.adapters.side_by_side import adapter_of
from raylora.data.task import Task
from raylora.engine.model.checkpoint import (
    attention_of,
    export_name,
    frozen,
    is_decoder,
    load_config,
    load_model,
    load_tokenizer,
    outside_backbone,
    quantizer_of,
    shell_model,
    weights_folder,
)
from raylora.engine.model.gang import Gang, Round
from raylora.engine.model.machine import compute_dtype
from raylora.engine.model.mapped_base import Source, shared_model
from raylora.engine.model.output_parts import part_rows_of, pass_in_parts
from raylora.engine.model.quantized_layers import Coder, all_layers, content_hash, loading_coder, prepared_coder
from raylora.engine.model.recompute import recompute_blocks
from raylora.engine.model.sites import AdaptedLayers, find_heads
from raylora.engine.model.split_base import split
from raylora.engine.model.token_head import TokenHead, WholeHead, find_token_head
from raylora.engine.model.trunk import Trunk, find_trunk
from raylora.engine.model.twin import twin_of
from raylora.ensemble.outputs import output_of
from raylora.errors import BaseError
from raylora.init.factors import as_fresh, as_solved
from raylora.quant.base import Quantizer
from raylora.quant.linear import QuantizedLinear
from raylora.quant.nf4 import logical_size
from raylora.spec import AdapterSpec, BaseSpec
from raylora.store.run_store import RunStore


@dataclass
class Base:
    """A loaded base with its adapter sites attached; only the slot ever changes."""

    model: nn.Module
    tokenizer: Any
    quantizer: Quantizer
    slot: Slot
    layers: AdaptedLayers
    """The layers that members adapt."""
    trunk: Trunk | None
    """The blocks below the first adapted one, which are the same for all members; None where there are none."""
    token_head: TokenHead
    """What makes the logits of a task that is scored token by token."""
    heads: dict[str, nn.Linear]
    """The task head's linears by name; members own copies, these stay as loaded."""
    fresh_heads: frozenset[str]
    """Heads that the checkpoint does not hold: every member draws its own."""
    device: torch.device
    dtype: torch.dtype
    size_bytes: int
    is_decoder: bool
    initializer_range: float
    export_name: str
    """What an exported adapter calls this base: a hub id or a relative name, never an absolute path."""
    start_pairs: dict[str, tuple[Tensor, Tensor]]
    """By site: (A_RI, B_OR) that a member's own LoRA starts from, where the compensation is trainable."""

    gang: Gang | None = None
    """The ranks that pass the base together, or train its members together, if there are more than one."""
    parameters: int = 0
    """Number of base weights, counted before packing them into fewer bytes."""

    @property
    def sites(self) -> list[Site]:
        """What any member adapts, in the model's order."""
        return self.layers.all.sites

    def sites_of(self, adapter: Adapter) -> list[Site]:
        """Return the layers that members with an adapter have it in."""
        return self.layers.of(adapter.spec).sites

    @contextmanager
    def round(self, kind: Round) -> Iterator[None]:
        """Pass the model within; where it is split, as soon as all ranks agree on this kind of pass."""
        if self.gang is None or not self.gang.place.is_split:
            yield
        else:
            with self.gang.round(kind):
                yield

    def weight_of(self, name: str) -> Tensor:
        """Return a site's frozen weight, O x I, in float32, dequantized if need be.

        Raises:
            BaseError: the base is split, and no rank has a whole weight.
        """
        if self.gang is not None and self.gang.place.is_split:
            raise BaseError(f"{name}: its weight is split over {self.gang.place.size} ranks",
                            "use an adapter that does not read the base's weights, or placement.strategy replicate")
        linear: Any = self.model.get_submodule(name)
        linear = getattr(linear, "base", linear)
        return self.quantizer.dequantize(linear).float()


def load_base(
    spec: BaseSpec, adapters: AdapterSpec | Sequence[AdapterSpec], task: Task, device: torch.device,
    prepared: RunStore | None = None, gang: Gang | None = None, recompute: bool = False, sharing: Base | None = None,
    output_in_parts: bool = False,
) -> Base:
    """Load, quantize, freeze and attach.

    Args:
        adapters: the one of all members, or all that members have.
        prepared: where the quantized layers lie, for the kinds that are prepared beforehand.
        gang: the ranks to split the base over, if its place says so; they all load it together.
        recompute: run blocks again in the backward pass instead of keeping their activations.
        sharing: a loaded base of the same spec, not split, whose weights this one reads, too.
        output_in_parts: pass the output layer in parts of the vocabulary, of which a split base has no more at once.

    Raises:
        BaseError: the base is not there or not prepared, the adapter does not fit it, or its output layer is to be
            passed in parts and cannot.
    """
    dtype = compute_dtype(spec.dtype, device)
    tokenizer = load_tokenizer(spec, task)
    # Where it is split, a rank sends its device what it holds, and the whole stays where it is mapped.
    is_split = gang is not None and gang.place.is_split
    place = torch.device("cpu") if is_split else device
    if sharing is None:
        model, missing = frozen_model(spec, task, place, dtype, prepared)
    else:
        model, missing = twin_of(sharing.model, sharing.quantizer), [f"{name}.weight" for name in sharing.fresh_heads]
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    heads = find_heads(model, missing)
    specs = [adapters] if isinstance(adapters, AdapterSpec) else adapters
    # A prepared base's sites are those of the original: a layer that is stored the other way round is exported so.
    original = shell_model(spec, task) if spec.grid is not None else model
    layers = AdaptedLayers.find(original, specs, list(heads))
    head_modules = {name: model.get_submodule(name) for name in heads}
    held = [*model.parameters(), *(b for m in model.modules() if isinstance(m, QuantizedLinear) for b in m.buffers())]
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    if recompute:
        recompute_blocks(model)
    parameters = _parameters(model)
    quantizer = quantizer_of(spec)
    part_rows = part_rows_of(model, quantizer) if output_in_parts else 0
    slot = attach(model, layers.all.sites, list(heads))
    options = {"use_cache": False} if is_decoder(model.config) else {}
    trunk = find_trunk(model, layers.all.sites, options) if not is_split else None
    token_head: TokenHead = WholeHead()
    if output_of(task.output).per_token and not any(isinstance(adapter_of(one), WholeModel) for one in specs):
        token_head = find_token_head(model, options, device)
    if output_in_parts:
        if isinstance(token_head, WholeHead):
            raise BaseError(
                f"placement.output_layer: parts: {type(model).__name__}: {token_head.reason or 'no token is scored'}",
                "use placement.output_layer whole",
            )
        pass_in_parts(model, part_rows)
    if gang is not None and is_split:
        split(model, layers.all.sites, head_modules, slot, quantizer, gang, device, token_head)
    return Base(
        model=model,
        tokenizer=tokenizer,
        quantizer=quantizer,
        slot=slot,
        layers=layers,
        trunk=trunk,
        token_head=token_head,
        heads=head_modules,
        fresh_heads=frozenset(name for name, fresh in heads.items() if fresh),
        device=device,
        dtype=dtype,
        size_bytes=size_bytes,
        is_decoder=is_decoder(model.config),
        initializer_range=float(getattr(model.config, "initializer_range", 0.02)),
        export_name=export_name(spec),
        start_pairs=_start_pairs(spec, prepared),
        gang=gang,
        parameters=parameters,
    )


def frozen_model(
    spec: BaseSpec, task: Task, device: torch.device, dtype: torch.dtype, prepared: RunStore | None = None
) -> tuple[Any, Sequence[str]]:
    """Return the frozen, quantized model over this machine's one copy, and the names that its checkpoint lacks.

    Nothing is attached to it. Raises: BaseError.
    """
    if spec.grid is not None and prepared is None:
        raise BaseError(f"base.quantization: {spec.grid.kind} is prepared beforehand", "run `raylora prepare`")
    if getattr(load_config(spec), "quantization_config", None) is not None:
        return load_model(spec, task, device, dtype)  # in a format that is transformers' own business
    with_pair = not _is_trainable(spec)
    shell = partial(shell_model, spec, task, dtype=dtype, attn_implementation=attention_of(spec, device))

    def coder() -> Coder:  # asked for only where the base has to be made
        if spec.grid is not None and prepared is not None:
            return prepared_coder(prepared, spec.grid, dtype, with_pair)
        return loading_coder(quantizer_of(spec), device, dtype, outside_backbone(shell()))

    model, missing = shared_model(Source(
        weights=Path(weights_folder(spec)),
        settings={
            "model": [task.auto_class, task.model_kwargs()],
            "quantization": spec.quantization.model_dump(mode="json"),
            "prepared": [content_hash(prepared), with_pair] if prepared is not None else None,
        },
        load=partial(load_model, spec, task, torch.device("cpu"), "auto"),
        shell=shell, coder=coder, quantizer=quantizer_of(spec), device=device, dtype=dtype,
    ))
    return frozen(model), missing


def _parameters(model: nn.Module) -> int:
    """Return how many weights a model has, counted before packing them into fewer bytes."""
    coded = (m for m in model.modules() if isinstance(m, QuantizedLinear))
    return sum(logical_size(p) for p in model.parameters()) + sum(
        m.in_features * m.out_features + (0 if m.bias is None else m.bias.numel()) for m in coded
    )


def _is_trainable(spec: BaseSpec) -> bool:
    """Return whether the compensating pairs are the members' and not the base's."""
    return spec.compensation is not None and spec.compensation.trainable


def _start_pairs(spec: BaseSpec, prepared: RunStore | None) -> dict[str, tuple[Tensor, Tensor]]:
    if spec.grid is None or prepared is None or not _is_trainable(spec):
        return {}
    assert spec.compensation is not None
    shared_out = as_fresh if spec.compensation.start == "fresh" else as_solved
    layers = (layer for block in all_layers(prepared, spec.grid) for layer in block)
    return {layer.name: shared_out(*layer.pair) for layer in layers if layer.pair is not None}


def head_tensors(base: Base) -> dict[str, Tensor]:
    """Return float32 copies of the head as loaded, by ``<module>.weight`` and ``<module>.bias``."""
    return {
        f"{name}.{key}": parameter.detach().float().cpu().clone()
        for name, module in base.heads.items()
        for key, parameter in module.named_parameters()
    }


