"""Members of several adapters in one forward: which part of a pack is whose.

The base runs once over all rows, whatever adapters the members have; in every adapted layer the members of one adapter
multiply together, and those of another beside them. No tensor is padded, so a member's numbers are those that it has
among members of its own adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from raylora import registry
from raylora.adapters.base import Adapter, Tensors
from raylora.adapters.packed import stack
from raylora.spec import AdapterSpec


def adapter_of(spec: AdapterSpec) -> Adapter:
    """Return the adapter for a spec."""
    return registry.load("adapter", spec.kind).build(spec)


@dataclass(frozen=True)
class SideBySide:
    """The adapters of members that are stacked in this order."""

    adapters: Adapter | Sequence[Adapter]
    """The one of all members, or that of each part."""
    parts: Sequence[int] | None
    """The part that each member is in, if they have several adapters."""

    @classmethod
    def of(cls, specs: Sequence[AdapterSpec]) -> SideBySide:
        """Return a part for every run of members with equal adapters."""
        parts = [0]
        for before, spec in zip(specs, specs[1:], strict=False):
            parts.append(parts[-1] + (spec != before))
        firsts = [adapter_of(specs[parts.index(part)]) for part in range(parts[-1] + 1)]
        return cls(firsts, parts) if len(firsts) > 1 else cls(firsts[0], None)

    def stack(self, members: Sequence[Mapping[str, Tensor]], places: Sequence[int] | None = None) -> Tensors:
        """Return the stacked tensors of all members, or of those at some places. Raises: ValueError."""
        parts = self.parts
        if parts is not None and places is not None:
            parts = [parts[place] for place in places]
        return stack(members, parts)
