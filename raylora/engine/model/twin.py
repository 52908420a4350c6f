"""A second set of modules over the same weights: two adapters on one base, none of which sees the other.

A base has one slot, and its adapted layers are where one kind of adapter put them. A teacher that is asked while its
student trains needs places and a slot of its own; with weights of its own it would need as much memory again.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from raylora.adapters.packed import AdaptedLinear, MemberLinear


def twin_of(model: nn.Module) -> Any:
    """Return a copy of a loaded model as it was before adapters were attached, whose tensors are the model's own.

    Blocks that the model runs again in its backward pass are run once: a twin is for forwards without gradients.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # whoever meets an adapted layer takes the layer within
        if isinstance(module, AdaptedLinear | MemberLinear):
            memo[id(module)] = copy.deepcopy(module.base, memo)
    found = copy.deepcopy(model, memo)
    for module in found.modules():
        vars(module).pop("forward", None)  # a wrapper would still run the model that it was put around
    return found
