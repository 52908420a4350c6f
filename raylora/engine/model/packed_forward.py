"""The model's own forward with a pack in the slot; members that are whole models take turns.

Shapes: B model rows of all members, T time, D width between blocks.
"""

from __future__ import annotations

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
            _forward_own(base, own, {n: v.chunk(pack.members)[k] if isinstance(v, Tensor) else v
                                     for n, v in inputs.items()})
            for k, own in enumerate(pack.alone())
        ])
    replaced = nullcontext() if base.trunk is None or hidden_BTD is None else base.trunk.replaced(hidden_BTD)
    with base.slot.use(pack), replaced:
        return base.model(**inputs).logits


def _forward_own(base: Base, pack: Pack, inputs: dict[str, Any]) -> Tensor:
    """Return the logits of one member whose weights stand in for the base's; tied weights follow their first name."""
    types = {name: parameter.dtype for name, parameter in base.model.named_parameters()}
    weights = {name: weight.to(types[name]) for name, weight in pack.weights.items()}
    with base.slot.use(pack):
        return functional_call(base.model, weights, kwargs=inputs).logits
