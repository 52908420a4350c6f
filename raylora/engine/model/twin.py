"""A second set of modules over the same weights: two adapters on one base, none of which sees the other.

A base has one slot, and its adapted layers are where one kind of adapter put them. A teacher that is asked while its
student trains needs places and a slot of its own; with weights of its own it would need as much memory again.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from raylora.adapters.packed import AdaptedLinear, MemberLinear
from raylora.engine.model.output_parts import OutputInParts
from raylora.quant.base import Quantizer


def twin_of(model: nn.Module, quantizer: Quantizer) -> Any:
    """Return a copy of a loaded model as it was before adapters were attached, whose tensors are the model's own.

    Blocks that the model runs again in its backward pass are run once: a twin is for forwards without gradients.

    Args:
        quantizer: of the model's layers. Those of a library may hold tensors that are no parameters, or move them at
            their first forward, which would then be the other's loss.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            held = quantizer.held(module)
            quantizer.hold(module, held)  # as after its first forward
            memo |= {id(tensor): tensor for tensor in held.values()}
    memo |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # whoever meets an adapted layer takes the layer within
        if isinstance(module, AdaptedLinear | MemberLinear):
            memo[id(module)] = copy.deepcopy(module.base, memo)
        elif isinstance(module, OutputInParts):
            memo[id(module)] = copy.deepcopy(module.as_linear(), memo)
    found = copy.deepcopy(model, memo)
    for module in found.modules():
        vars(module).pop("forward", None)  # a wrapper would still run the model that it was put around
    return found
