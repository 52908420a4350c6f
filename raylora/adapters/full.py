"""Full fine-tuning: a member is the whole model, every weight trained, beside LoRA in the same harness.

A member holds one float32 tensor per parameter of the base, under the base's own names, and starts from what the
base holds. The base is not written to: its modules run with the member's tensors in the place of their own, cast
to the type that the base computes in, so that gradients reach the float32 tensors (mixed precision).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raylora.adapters.base import Site, Tensors, WeightOf
from raylora.errors import BaseError
from raylora.spec import AdapterSpec

_UNDECAYED = re.compile(r"bias$|(^|\.)(\w*norm\w*|ln_\w+)\.weight$", re.IGNORECASE)
"""Biases and norms, as transformers' Trainer tells them from matrices."""


class Spec(AdapterSpec):
    """Train every weight of the base; the base's own dropout stays off, as for every kind."""

    kind: Literal["full"] = "full"
    target_modules: Literal["auto"] = "auto"
    """Nothing to choose: every weight is trained."""
    layers: Literal["all"] = "all"
    """Nothing to choose: every weight is trained."""
    dropout: float = Field(default=0.0, ge=0, le=0)
    """Nothing to drop: there is no adapter input."""


HAS_TARGETS = False
FIRST_LR = 5e-5
"""The learning rate of a first spec: whole models move much less than adapters."""


class FullModel:
    """Replaces the base's weights by the member's own; there are no sites and no change to add."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def check(self, sites: Sequence[Site]) -> None:
        """Accept every model: :meth:`own_weights` refuses what cannot be trained."""

    def build(self, sites: Sequence[Site], generator: torch.Generator) -> Tensors:
        """Return no tensors: a member starts from the base's weights, not from a draw."""
        return {}

    def frozen_tensors(self, sites: Sequence[Site], seed: int, weight_of: WeightOf) -> Tensors:
        """Return nothing: all of a member is trained."""
        return {}

    def own_weights(self, model: nn.Module, heads: Collection[str]) -> dict[str, nn.Parameter]:
        """Return the model's parameters by name, those of the heads apart; tied ones once, under their first name.

        Raises:
            BaseError: the checkpoint is quantized already, so that its codes cannot be trained.
        """
        found = {
            name: parameter for name, parameter in model.named_parameters()
            if not any(name.startswith(f"{head}.") for head in heads)
        }
        codes = [name for name, parameter in found.items() if not parameter.is_floating_point()]
        if codes or getattr(getattr(model, "config", None), "quantization_config", None):
            which = f" ({codes[0]} holds codes)" if codes else ""
            raise BaseError(
                f"adapter.kind: full trains every weight, and this base is quantized{which}",
                "give the unquantized model with quantization none, or use another adapter",
            )
        return found

    def decay_group(self, name: str) -> str:
        """Return ``a`` for matrices and ``b`` for biases and norms, which are usually left undecayed."""
        return "b" if _UNDECAYED.search(name) else "a"

    def materialize(self, stacked: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Any]:
        """Return nothing for any site: the weights stand in the base's place instead."""
        return {}

    def packed_delta(self, x_KNI: Tensor, at_site: Any) -> Tensor:
        """Never called: no site has anything materialized."""
        raise AssertionError("a member that is a whole model has no delta")

    def delta_weight(self, tensors: Mapping[str, Tensor], site: Site) -> Tensor:
        """Raise BaseError: a member is not a change of single layers."""
        raise BaseError("adapter: a full member is a model of its own, not a change of the base's layers")

    # --- what the engine asks of kinds that are not like the others ---------------------------------
    def notes(self, sites: Sequence[Site]) -> list[str]:
        """Return what a person should know before training."""
        return ["members start alike from the base's weights: they differ by their heads and data order"]

    def unpackable_reason(self) -> str:
        """Return why a pack holds one member of this kind."""
        return "one member per forward: every weight is its own"

    def unsupported_reason(self, quantized: bool) -> str:
        """Return why codes cannot be trained, or nothing for weights that are stored as they are."""
        return "full trains every weight, and codes have no gradient" if quantized else ""


def build(spec: Spec) -> FullModel:
    """Return the adapter for a spec."""
    return FullModel(spec)
