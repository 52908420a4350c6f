"""Members that pass the base together: all of them in one lane, or each in its own where members are whole models.

Shapes: M members, A rows of one member, B = M * A rows member by member, T tokens, K kept positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from raylora.adapters.packed import Pack
from raylora.engine.model.base import Base
from raylora.engine.model.gang import Round
from raylora.engine.model.packed_forward import call
from raylora.engine.model.packed_model import PackedModel


@dataclass
class Lane:
    """Members that share a forward."""

    pack: Pack
    cache: DynamicCache | None = None
    """The keys and values of all that its members have read; without one every pass begins at the first token."""

    def copied(self) -> Lane:
        """Return a lane that remembers the same and from now on goes its own way."""
        return Lane(self.pack, copy.deepcopy(self.cache))

    def keep(self, row_B: Tensor) -> None:
        """Forget all rows but these, by their places among the lane's own."""
        if self.cache is not None:
            self.cache.batch_select_indices(row_B)


def lanes_of(model: PackedModel, stacked: Mapping[str, Tensor], remembers: bool = False) -> list[Lane]:
    """Return the lanes of some members' tensors, stacked over M."""
    config = cast(Any, model.base.model.config)
    pack = model.pack(stacked)
    packs = pack.alone() if pack.weights else [pack]
    return [Lane(one, DynamicCache(config=config) if remembers else None) for one in packs]


def pass_lanes(base: Base, lanes: Sequence[Lane], inputs: Mapping[str, Tensor], keep: int) -> Tensor:
    """Return the logits of the last ``keep`` positions, B x K x V, from all lanes' rows below each other."""
    each = len(next(iter(inputs.values()))) // len(lanes)
    found = []
    for number, lane in enumerate(lanes):
        own: dict[str, Any] = {name: tensor[number * each : (number + 1) * each] for name, tensor in inputs.items()}
        own |= {"past_key_values": lane.cache, "use_cache": lane.cache is not None, "logits_to_keep": keep}
        with base.round(Round.FORWARD):  # a base that is split over a gang is passed by all of it together
            found.append(call(base, lane.pack, own).logits[:, -keep:])
    return torch.cat(found)
