"""How many parameters an adapter trains, from a model's shape alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from raylora import registry
from raylora.adapters.base import Adapter, InRounds, PartlyTrained, Site, Tensors, WholeModel
from raylora.adapters.side_by_side import adapter_of
from raylora.engine.model.checkpoint import is_decoder, quiet
from raylora.engine.model.sites import adapter_sites, find_heads
from raylora.errors import SpecError, combine
from raylora.spec import AdapterSpec


def adapter_parameters(adapter: Adapter, sites: Sequence[Site], model: nn.Module, heads: Sequence[str]) -> int:
    """Return the numbers that an adapter trains on these layers of a model; nothing is allocated."""
    if isinstance(adapter, WholeModel):
        return sum(p.numel() for p in adapter.own_weights(model, heads).values())
    return _size(_parted(adapter, sites)[0])


def kept_parameters(adapter: Adapter, sites: Sequence[Site]) -> int:
    """Return the numbers that a member keeps beside those and does not train; nothing is allocated."""
    return 0 if isinstance(adapter, WholeModel) else _size(_parted(adapter, sites)[1])


def _parted(adapter: Adapter, sites: Sequence[Site]) -> tuple[Tensors, Tensors]:
    """Return what is trained and what is kept of a member in its last round, without its head; nothing is allocated."""
    with torch.device("meta"):
        tensors = adapter.build(sites, torch.Generator("cpu")) if sites else {}
    if isinstance(adapter, InRounds):
        return adapter.parted(tensors, adapter.rounds - 1)
    return adapter.parted(tensors) if isinstance(adapter, PartlyTrained) else (tensors, {})


def _size(tensors: Tensors) -> int:
    return sum(t.numel() for t in tensors.values())


def parameter_count(model: Any, adapter: AdapterSpec | Mapping[str, Any]) -> int:
    """Return how many parameters one member's adapter trains on a model; its task head is not counted.

    Args:
        model: a transformers configuration, or a model; of a configuration no weights are made.
        adapter: a spec, or its keys: ``{"kind": "mos", "equivalent_rank": 2, "target_modules": "all-linear"}``.

    Raises:
        SpecError: a key or value that the kind does not have.
        BaseError: the adapter does not fit the model's layers.
    """
    spec = adapter if isinstance(adapter, AdapterSpec) else _spec(adapter)
    shell = model if isinstance(model, nn.Module) else _shell(model)
    backbone_only = getattr(shell, "base_model", None) is shell
    heads = [] if backbone_only else list(find_heads(shell, []))
    built: Adapter = adapter_of(spec)
    return adapter_parameters(built, adapter_sites(shell, built, heads), shell, heads)


def _spec(keys: Mapping[str, Any]) -> AdapterSpec:
    kind = keys.get("kind", "lora")
    try:
        return registry.load("adapter", kind).Spec.model_validate({"kind": kind, **keys})
    except ValidationError as error:
        found = [
            f"{'.'.join(['adapter', *map(str, item['loc'])])}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_url=False)
        ]
        raise SpecError(combine(found, f"not a valid adapter of kind {kind!r}")) from None


def _shell(config: Any) -> Any:
    import transformers

    auto_class = transformers.AutoModelForCausalLM if is_decoder(config) else transformers.AutoModel
    with quiet(), torch.device("meta"):
        try:
            return auto_class.from_config(config)
        except ValueError as error:
            raise SpecError(f"{type(config).__name__}: is not the configuration of a model", str(error)) from error
