"""No adapter: only the task's head is trained. Members of this kind are a last-layer ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from raylora.adapters.base import Site, Tensors, WeightOf
from raylora.spec import AdapterSpec


class Spec(AdapterSpec):
    """Train the head on the untouched base."""

    kind: Literal["none"] = "none"
    dropout: float = Field(default=0.0, ge=0, le=0)
    """Nothing to drop: there is no adapter input."""


HAS_TARGETS = False


class NoAdapter:
    """Changes nothing; all of a member's tensors belong to its head."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def check(self, sites: Sequence[Site]) -> None:
        """Accept every model."""

    def build(self, sites: Sequence[Site], generator: torch.Generator) -> Tensors:
        """Return no tensors."""
        return {}

    def frozen_tensors(self, sites: Sequence[Site], seed: int, weight_of: WeightOf) -> Tensors:
        """Return nothing: all of a member is trained."""
        return {}

    def decay_group(self, name: str) -> str:
        """Never asked: there are no adapter tensors."""
        raise KeyError(name)

    def materialize(self, stacked: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, None]:
        """Return nothing for any site, which leaves the base's own output."""
        return {}

    def packed_delta(self, x_KNI: Tensor, at_site: None) -> Tensor:
        """Never called: no site has anything materialized."""
        raise AssertionError("a member without an adapter has no delta")

    def delta_weight(self, tensors: Mapping[str, Tensor], site: Site) -> Tensor:
        """Return zeros, O x I."""
        return torch.zeros(site.out_features, site.in_features)

    def peft_config(self) -> dict[str, Any]:
        """Return the settings of a LoRA adapter that has no tensors: PEFT then loads the head alone."""
        return {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "lora_dropout": 0.0}


def build(spec: Spec) -> NoAdapter:
    """Return the adapter for a spec."""
    return NoAdapter(spec)
