"""A member's tensors: how it starts, and what it needs beside them but does not train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raylora.adapters.base import HEAD, Adapter, NeedsBaseWeights, Tensors, WholeModel
from raylora.engine.model.base import Base
from raylora.engine.model.serialization import layout_of


def frozen_tensors_of(base: Base, adapter: Adapter, seed: int) -> Tensors:
    """Return what a member of this seed needs but does not train, on the base's device."""
    sites = base.sites_of(adapter)
    if not sites:
        return {}
    return {n: t.to(base.device) for n, t in adapter.frozen_tensors(sites, seed, base.weight_of).items()}


def expected_layout(base: Base, adapter: Adapter, frozen_tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return the layout that a member of this adapter has on this base, with its untrained tensors."""
    if not frozen_tensors:
        return None
    with torch.device("meta"):  # shapes only
        return layout_of(adapter.build(base.sites_of(adapter), torch.Generator("cpu")), frozen_tensors)


def start_tensors(base: Base, adapter: Adapter) -> Tensors:
    """Return the adapter tensors that start from the base's trainable pairs; none where the pairs are frozen.

    A layer multiplies by alpha / R, so B is divided by it.
    """
    tensors: Tensors = {}
    if adapter.spec.kind != "lora":  # the heads of a last-layer ensemble
        return tensors
    scale: float = adapter.scale  # type: ignore[attr-defined]
    for name, (a_RI, b_OR) in base.start_pairs.items():
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = a_RI.float().clone(), b_OR.float() / scale
    return tensors


def initial_member(
    base: Base, adapter: Adapter, head: Mapping[str, Tensor], seed: int, start_value: float = 0.0
) -> Tensors:
    """Return a fresh member: the adapter's tensors, and a head drawn anew where the checkpoint has none.

    Everything comes from one generator seeded by the member, so equal seeds give equal members.

    Args:
        start_value: the bias of a head drawn anew that has one output.
    """
    generator = torch.Generator().manual_seed(seed)
    sites = base.sites_of(adapter)
    tensors = adapter.build(sites, generator) if sites else {}
    tensors |= start_tensors(base, adapter) if sites else {}
    if isinstance(adapter, WholeModel):
        own = adapter.own_weights(base.model, base.heads)
        tensors = {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in own.items()}
    if isinstance(adapter, NeedsBaseWeights):
        tensors = adapter.from_weights(tensors, sites, base.weight_of)
    for name, value in head.items():
        module, _, key = name.rpartition(".")
        if module in base.fresh_heads:
            value = torch.zeros_like(value)
            if key == "weight":
                value.normal_(0.0, base.initializer_range, generator=generator)
            elif value.numel() == 1:
                value.fill_(start_value)
        tensors[HEAD + name] = value.clone()
    return tensors
