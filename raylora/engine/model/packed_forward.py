"""The model's own forward with a pack in the slot; members that are whole models take turns.

Shapes: B model rows of all members, T time, D width between blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from raylora.adapters.packed import Pack
from raylora.data.task import Batch, Task
from raylora.engine.model.base import Base


def inputs_of(base: Base, task: Task, batch: Batch) -> dict[str, Any]:
    """Return what the model's forward is given."""
    return {**batch.model_inputs(), **task.forward_kwargs(batch), **({"use_cache": False} if base.is_decoder else {})}


def pass_pack(base: Base, task: Task, pack: Pack, batch: Batch, hidden_BTD: Tensor | None = None) -> Tensor:
    """Return the logits; ``hidden_BTD`` is what the trunk made of the batch, if that is known."""
    inputs = inputs_of(base, task, batch)
    if pack.weights:
        return torch.cat([
            call(base, own, {n: v.chunk(pack.members)[k] if isinstance(v, Tensor) else v
                             for n, v in inputs.items()}).logits
            for k, own in enumerate(pack.alone())
        ])
    replaced = nullcontext() if base.trunk is None or hidden_BTD is None else base.trunk.replaced(hidden_BTD)
    with replaced:
        return call(base, pack, inputs).logits


def call(base: Base, pack: Pack, inputs: Mapping[str, Any]) -> Any:
    """Return the model's output with a pack in the slot, or with the weights of a single member in place of its own.

    Tied weights follow their first name.
    """
    with base.slot.use(pack):
        if not pack.weights:
            return base.model(**inputs)
        types = {name: parameter.dtype for name, parameter in base.model.named_parameters()}
        weights = {name: weight.to(types[name]) for name, weight in pack.weights.items()}
        return functional_call(base.model, weights, kwargs=dict(inputs))
