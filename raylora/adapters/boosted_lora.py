"""XGBLoRA: low-rank pairs fitted one after another, each to what the sum of those before leaves (arXiv 2410.19694).

Training is cut into T rounds. Round t trains a fresh pair on top of the frozen sum of all before it,

    ``f_t(x) = W x + (alpha / r) sum_{s < t} B_s A_s x + (alpha / r) B_t A_t x``,

as gradient boosting fits each weak learner to the loss of the sum before it (Zhang et al., section 4). The paper merges
a finished pair into W; here it stays beside W, which members share and which may be packed codes. The sum of T
pairs of rank r is a LoRA of rank T r, and that is what a member is.

Shapes: K members, N tokens, I inputs, O outputs, R rank of one round, D = R times the rounds that are done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from raylora.adapters.base import Site, Tensors, WeightOf
from raylora.adapters.lora import Lora
from raylora.adapters.lora import Spec as LoraSpec
from raylora.adapters.low_rank import check_rank, uniform
from raylora.spec import AdapterSpec


class Spec(AdapterSpec):
    """Rounds of training, each of which adds a low-rank pair to the frozen sum of those before it."""

    kind: Literal["boosted_lora"] = "boosted_lora"
    rounds: int = Field(default=4, ge=1)
    """T: equal parts of the training, each with a pair and optimizer moments of its own; a head trains through all."""
    rank_per_round: int = Field(default=1, ge=1)
    """r: the rank of each pair; a finished member is a LoRA of rank ``rounds * rank_per_round``."""
    alpha: float = Field(default=2.0, gt=0)
    """Each pair's change is scaled by ``alpha / rank_per_round``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)


FIRST: tuple[dict[str, Any], ...] = (
    {"rounds": 4, "rank_per_round": 2, "alpha": 4}, {"rounds": 2, "rank_per_round": 1, "alpha": 2},
)
"""What a first spec begins with; where the layers cannot have it, the next."""


class BoostedLora:
    """The boosted adapter; a member holds ``<site>.lora_A`` (T R x I) and ``<site>.lora_B`` (O x T R), round by round.

    Rounds that have not begun are zero. While it trains, the round's own part is ``<site>.lora_A`` (R x I) and
    ``<site>.lora_B`` (O x R), and what is done is ``<site>.done_A`` (D x I) and ``<site>.done_B`` (O x D) beside it.
    """

    two_factors: Literal[True] = True
    keeps_inputs = True

    def __init__(self, spec: Spec) -> None:
        self.spec, self.rounds, self.rank = spec, spec.rounds, spec.rank_per_round
        self.whole = Lora(LoraSpec(
            rank=self.rounds * self.rank, alpha=self.rounds * spec.alpha, dropout=spec.dropout,
            target_modules=spec.target_modules, layers=spec.layers,
        ))
        """The LoRA that a member is, of the same scale."""

    def check(self, sites: Sequence[Site]) -> None:
        """Raise BaseError if a pair has more rank than a layer's smaller side; their sum may have."""
        check_rank("rank_per_round", self.rank, sites)

    def notes(self, sites: Sequence[Site]) -> list[str]:
        """Return that a member's rounds wait for each other, and members do not."""
        if self.rounds == 1:
            return []
        return [f"a member is a chain of {self.rounds} rounds, which train one after another whatever the number of "
                "workers; members are chains of their own, and share forwards or train at the same time"]

    def build(self, sites: Sequence[Site], generator: torch.Generator) -> Tensors:
        """Return the first round's A ~ U(-1/sqrt I, 1/sqrt I), and zeros: its B, and all of the rounds to come."""
        tensors: Tensors = {}
        for site in sites:
            later = torch.zeros((self.rounds - 1) * self.rank, site.in_features)
            first_RI = uniform(self.rank, site.in_features, site.in_features, generator)
            tensors[f"{site.name}.lora_A"] = torch.cat([first_RI, later])
            tensors[f"{site.name}.lora_B"] = torch.zeros(site.out_features, self.rounds * self.rank)
        return tensors

    def begin_round(
        self, tensors: Mapping[str, Tensor], sites: Sequence[Site], round: int, generator: torch.Generator
    ) -> Tensors:
        """Return a member whose part of a round is fresh: A drawn as the first round's, B zero, and so no change."""
        begun = {name: tensor.clone() for name, tensor in tensors.items()}
        rows = self._rows(round)
        for site in sites:
            drawn_RI = uniform(self.rank, site.in_features, site.in_features, generator)
            begun[f"{site.name}.lora_A"][rows] = drawn_RI.to(begun[f"{site.name}.lora_A"].device)
            begun[f"{site.name}.lora_B"][:, rows] = 0.0
        return begun

    def parted(self, tensors: Mapping[str, Tensor], round: int = 0) -> tuple[Tensors, Tensors]:
        """Return the pair of a round, and beside it the pairs of those before."""
        rows, done = self._rows(round), slice(0, round * self.rank)
        trained: Tensors = {}
        kept: Tensors = {}
        for name, tensor in tensors.items():
            site, _, factor = name.rpartition(".lora_")
            trained[name] = tensor[rows] if factor == "A" else tensor[:, rows]
            if round:
                kept[f"{site}.done_{factor}"] = tensor[done] if factor == "A" else tensor[:, done]
        return trained, kept

    def joined(self, trained: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensors:
        """Return the pairs that are done, the one that is trained and zeros for those to come."""
        tensors: Tensors = {}
        for name, tensor in trained.items():
            site, _, factor = name.rpartition(".lora_")
            axis, done = (0, 1)[factor == "B"], kept.get(f"{site}.done_{factor}")
            parts = [tensor] if done is None else [done, tensor]
            shape = list(tensor.shape)
            shape[axis] = self.rounds * self.rank - sum(part.shape[axis] for part in parts)
            tensors[name] = torch.cat([*parts, tensor.new_zeros(shape)], dim=axis)
        return tensors

    def frozen_tensors(self, sites: Sequence[Site], seed: int, weight_of: WeightOf) -> Tensors:
        """Return nothing: all of a member is saved."""
        return {}

    def decay_group(self, name: str) -> str:
        """Return which decay a tensor takes, by its name; what is done takes none."""
        return self.whole.decay_group(name)

    def materialize(self, stacked: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return per site (A_KIR, B_KRO) of whole members, or of what is done and what is trained of them."""
        whole: Tensors = {}
        for site in sites:
            for factor, axis in (("A", 1), ("B", 2)):
                name, done = f"{site.name}.lora_{factor}", stacked.get(f"{site.name}.done_{factor}")
                whole[name] = stacked[name] if done is None else torch.cat([done, stacked[name]], dim=axis)
        return self.whole.materialize(whole, sites)

    def packed_delta(self, x_KNI: Tensor, at_site: tuple[Tensor, Tensor]) -> Tensor:
        """Return (alpha / r) * x A^T B^T per member, the sum of all pairs, in x's type."""
        return self.whole.packed_delta(x_KNI, at_site)

    def delta_weight(self, tensors: Mapping[str, Tensor], site: Site) -> Tensor:
        """Return (alpha / r) * sum of B_t A_t, O x I."""
        return self.whole.delta_weight(tensors, site)

    def peft_config(self) -> dict[str, Any]:
        """Return what PEFT calls the LoRA that a member is."""
        return self.whole.peft_config()

    def _rows(self, round: int) -> slice:
        return slice(round * self.rank, (round + 1) * self.rank)


def build(spec: Spec) -> BoostedLora:
    """Return the adapter for a spec."""
    return BoostedLora(spec)
