"""MoS, mixture of shards: layers of one type assemble their A and B from one shared pool (arXiv 2410.00938).

``y = W x + (alpha / r) B_k A_k x`` where the vectors of A_k and B_k are concatenated shards of the pools.
The parameters are e * L * (I + O) per type, whatever the rank r of the layers.

Shapes: K members, N tokens, L layers of a group, I inputs, O outputs, R rank, P rows of a pool, W width of a
row, S = R * l rows that one layer reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from raylora.adapters.base import Site, Tensors, WeightOf
from raylora.adapters.lora import Spec as LoraSpec
from raylora.adapters.pools import Budget, Group, check_fit, draw_index, group_name, groups_of, pool_name
from raylora.spec import AdapterSpec

AtSite = tuple[Tensor, Tensor, float]
"""A_KIR, B_KRO and the scale of one layer."""


class Spec(AdapterSpec):
    """Low-rank matrices made of shards that the layers of one type share.

    The paper's ablations are settings: ``private_rank: 0`` is without privatization, ``shards: 1`` without vector
    sharding, ``pair_dissociation: false`` without dissociation, all three with ``rank`` = ``equivalent_rank`` times
    the number of layers is pure sharing (every layer reads the whole pool), and a smaller rank adds subset selection.
    """

    kind: Literal["mos"] = "mos"
    rank: int = Field(default=4, ge=1)
    """r: the rank of each layer's matrices."""
    equivalent_rank: int = Field(default=2, ge=1)
    """e: the budget; as many trainable parameters as LoRA of this rank."""
    private_rank: int = Field(default=1, ge=0)
    """p: how much of the rank a layer shares with no other."""
    shards: int = Field(default=2, ge=1)
    """l: how many shards, drawn independently, a vector is put together from."""
    pair_dissociation: bool = True
    """Draw the shards of B independently of those of A."""
    alpha: float = Field(default=16.0, gt=0)
    """The change is scaled by ``alpha / rank``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _ranks_agree(self) -> Spec:
        r, e, p = self.rank, self.equivalent_rank, self.private_rank
        if p > e:
            raise ValueError(f"private_rank {p} is more than the whole budget: use at most equivalent_rank, {e}")
        if p == e and r != e:
            raise ValueError(
                f"private_rank = equivalent_rank = {e} leaves nothing to share, so the rank cannot be {r}: "
                f"use rank {e} (plain LoRA), or a private_rank of at most {e - 1}"
            )
        if r < p:
            raise ValueError(f"private_rank {p} is more than the rank: use a private_rank of at most {r}")
        return self

    def budget(self) -> Budget:
        """Return the four numbers that decide the pools."""
        return Budget(self.rank, self.equivalent_rank, self.private_rank, self.shards)


FIRST: tuple[dict[str, Any], ...] = (
    {"rank": 6, "equivalent_rank": 2, "private_rank": 1, "shards": 4, "alpha": 16},
    {"rank": 3, "equivalent_rank": 2, "private_rank": 1, "shards": 2, "alpha": 16},
    {"rank": 2, "equivalent_rank": 2, "private_rank": 1, "shards": 1, "alpha": 16},
)
"""What a first spec begins with; where the layers cannot have it, the next."""


class Mos:
    """The MoS adapter.

    A member holds ``pool.<type>.<I>x<O>.A`` (e*L*l x I/l) and ``.B`` (e*L*l x O/l) per group of layers. Which rows a
    layer reads is drawn from the member's seed: ``<site>.index`` (2 x r*l, for A and for B) is fixed, never saved.
    """

    two_factors: Literal[True] = True

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def check(self, sites: Sequence[Site]) -> None:
        """Raise BaseError if a pool cannot serve its layers; the message gives the nearest numbers that can."""
        check_fit(self._groups(sites))

    def notes(self, sites: Sequence[Site]) -> list[str]:
        """Return which layers have nobody to share a pool with."""
        return [
            f"{group.sites[0].name} is the only adapted layer of its type and shape and has nothing to share: "
            f"it gets plain LoRA of rank {group.budget.rank}, the same number of parameters"
            for group in self._groups(sites) if len(group.sites) == 1
        ]

    def build(self, sites: Sequence[Site], generator: torch.Generator) -> Tensors:
        """Return pools A ~ U(-1/sqrt I, 1/sqrt I) and B = 0.

        The bound is that of the whole vector, not of a shard. Each layer's share is drawn when its turn comes, as
        LoRA draws its A, so that p = e = r and l = 1 give LoRA's numbers.
        """
        groups = {group.name: group for group in self._groups(sites)}
        drawn: dict[str, list[Tensor]] = {name: [] for name in groups}
        for site in sites:
            group = groups[group_name(site)]
            bound, share = site.in_features**-0.5, group.rows // len(group.sites)
            rows_PW = torch.empty(share, group.shard_shapes[0]).uniform_(-bound, bound, generator=generator)
            drawn[group.name].append(rows_PW)
        tensors: Tensors = {}
        for name, group in groups.items():
            tensors[f"pool.{name}.A"] = torch.cat(drawn[name])
            tensors[f"pool.{name}.B"] = torch.zeros(group.rows, group.shard_shapes[1])
        return tensors

    def frozen_tensors(self, sites: Sequence[Site], seed: int, weight_of: WeightOf) -> Tensors:
        """Return which rows each layer reads, as ``<site>.index``, 2 x r*l."""
        return {
            f"{site.name}.index": draw_index(group, layer, seed, self.spec.pair_dissociation)
            for group in self._groups(sites) for layer, site in enumerate(group.sites)
        }

    def decay_group(self, name: str) -> str:
        """Return which decay a tensor takes, by its name."""
        return "a" if name.endswith(".A") else "b"

    def materialize(self, stacked: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, AtSite]:
        """Return per site (A_KIR, B_KRO, scale), with one gather per pool for all its layers and all members.

        Backward, a gather is one ``index_add``, and ``unbind`` one stack.
        """
        ready: dict[str, AtSite] = {}
        for group in self._groups(sites):
            index_KL2S = torch.stack([stacked[f"{site.name}.index"] for site in group.sites], dim=1)
            a_LKRI = _gather(stacked[f"pool.{group.name}.A"], index_KL2S[:, :, 0], group.budget.rank).unbind(1)
            b_LKRO = _gather(stacked[f"pool.{group.name}.B"], index_KL2S[:, :, 1], group.budget.rank).unbind(1)
            scale = self.spec.alpha / group.budget.rank
            for site, a_KRI, b_KRO in zip(group.sites, a_LKRI, b_LKRO, strict=True):
                ready[site.name] = a_KRI.transpose(1, 2), b_KRO, scale
        return ready

    def packed_delta(self, x_KNI: Tensor, at_site: AtSite) -> Tensor:
        """Return (alpha / r) * x A^T B^T per member, in x's type."""
        a_KIR, b_KRO, scale = at_site
        h_KNR = torch.bmm(x_KNI, a_KIR.to(x_KNI.dtype)) * scale
        return torch.bmm(h_KNR, b_KRO.to(x_KNI.dtype))

    def delta_weight(self, tensors: Mapping[str, Tensor], site: Site) -> Tensor:
        """Return (alpha / r) * B A, O x I."""
        a_RI, b_RO = _assembled(tensors, site)
        return (self.spec.alpha / len(a_RI)) * (b_RO.float().T @ a_RI.float())

    def as_lora(self, tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> tuple[LoraSpec, Tensors]:
        """Return a LoRA spec and tensors that change every layer alike: the pools written out layer by layer.

        A layer of smaller rank than the others is filled up with zeros.
        """
        pairs = {site.name: _assembled(tensors, site) for site in sites}
        rank = max(len(a_RI) for a_RI, _ in pairs.values())
        written: Tensors = {}
        for name, (a_RI, b_RO) in pairs.items():
            own, missing = len(a_RI), rank - len(a_RI)
            written[f"{name}.lora_A"] = torch.nn.functional.pad(a_RI, (0, 0, 0, missing))
            b_OR = (b_RO * (self.spec.rank / own)).T  # what LoRA multiplies by is alpha / r everywhere
            written[f"{name}.lora_B"] = torch.nn.functional.pad(b_OR, (0, missing)).contiguous()
        spec = LoraSpec(
            rank=rank, alpha=self.spec.alpha * rank / self.spec.rank, dropout=self.spec.dropout,
            target_modules=self.spec.target_modules, layers=self.spec.layers,
        )
        return spec, written

    def _groups(self, sites: Sequence[Site]) -> list[Group]:
        return groups_of(sites, self.spec.budget())


def _gather(pool_KPW: Tensor, index_KLS: Tensor, rank: int) -> Tensor:
    """Return the rows that each layer of each member reads, put together to K x L x R x (I or O)."""
    members, rows, _ = pool_KPW.shape
    first_K = torch.arange(members, device=index_KLS.device) * rows
    flat = (index_KLS + first_K[:, None, None]).flatten()
    gathered = pool_KPW.flatten(0, 1).index_select(0, flat)
    return gathered.view(members, index_KLS.shape[1], rank, -1)


def _assembled(tensors: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor]:
    """Return one member's (A_RI, B_RO) at a site."""
    index_2S = tensors[f"{site.name}.index"]
    a_RI = tensors[pool_name(site, "A")][index_2S[0]].reshape(-1, site.in_features)
    return a_RI, tensors[pool_name(site, "B")][index_2S[1]].reshape(-1, site.out_features)


def build(spec: Spec) -> Mos:
    """Return the adapter for a spec."""
    return Mos(spec)
