"""The pools of a mixture of shards: which layers share one, and which of its rows each layer reads.

Shapes: L layers of a group, I inputs, O outputs, R rank of a layer, S = R * l shards that a layer reads.
Letters of the paper (arXiv 2410.00938): e equivalent rank, r rank, p private rank, l shards per vector.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.adapters.base import Site
from raylora.errors import BaseError


@dataclass(frozen=True)
class Budget:
    """The four numbers that decide a pool."""

    rank: int
    equivalent_rank: int
    private_rank: int
    shards: int


@dataclass(frozen=True)
class Group:
    """The layers of one linear type and one shape; they share a pool for A and one for B."""

    name: str
    sites: tuple[Site, ...]
    budget: Budget
    """As asked for; a layer that has nobody to share with gets plain LoRA of the same number of parameters."""

    @property
    def rows(self) -> int:
        """Rows of each of the two pools, e * L * l."""
        return self.budget.equivalent_rank * len(self.sites) * self.budget.shards

    @property
    def public_rows(self) -> int:
        """Rows that every layer may draw, (e - p) * L * l; the private ones follow them, layer by layer."""
        return self.rows - len(self.sites) * self.private_rows

    @property
    def private_rows(self) -> int:
        """Rows that one layer has to itself, p * l."""
        return self.budget.private_rank * self.budget.shards

    @property
    def shard_shapes(self) -> tuple[int, int]:
        """Width of a row of the A pool and of the B pool: I / l and O / l."""
        site = self.sites[0]
        return site.in_features // self.budget.shards, site.out_features // self.budget.shards


def group_name(site: Site) -> str:
    """Return what a layer shares its pools by: the last part of its name, and its shape."""
    return f"{site.name.rpartition('.')[2]}.{site.in_features}x{site.out_features}"


def pool_name(site: Site, side: str) -> str:
    """Return the name of the tensor that a layer's A or B is assembled from."""
    return f"pool.{group_name(site)}.{side}"


def groups_of(sites: Sequence[Site], budget: Budget) -> list[Group]:
    """Return the groups in the order in which the model meets them."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(group_name(site), []).append(site)
    e = budget.equivalent_rank
    alone = Budget(rank=e, equivalent_rank=e, private_rank=e, shards=1)
    return [
        Group(name, tuple(members), budget if len(members) > 1 else alone) for name, members in found.items()
    ]


def draw_index(group: Group, layer: int, seed: int, dissociated: bool) -> Tensor:
    """Return the 2 x S rows that one layer reads of the A pool and of the B pool, int64.

    Public rows are drawn without replacement, private ones follow in order (section 3.4 of the paper).

    Args:
        layer: which of the group's layers, from 0.
        dissociated: draw B's rows on their own; else they are A's (pair dissociation, section 3.3).
    """
    budget = group.budget
    public = (budget.rank - budget.private_rank) * budget.shards
    first = group.public_rows + layer * group.private_rows
    private_S = torch.arange(first, first + group.private_rows)
    sides = []
    for side in ("A", "B" if dissociated else "A"):
        generator = torch.Generator().manual_seed(_seed(seed, group.name, layer, side))
        sides.append(torch.cat([torch.randperm(group.public_rows, generator=generator)[:public], private_S]))
    return torch.stack(sides)


def _seed(*parts: int | str) -> int:
    """Return 63 bits that depend on every part: no draw moves when another group or layer comes or goes."""
    digest = hashlib.blake2b(json.dumps(["mos", *parts]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# --- what fits ----------------------------------------------------------------------------------------
def check_fit(groups: Sequence[Group]) -> None:
    """Refuse numbers that the layers cannot have.

    Raises:
        BaseError: the message names the layers and the nearest numbers that they can have.
    """
    for group in groups:
        site, rank = group.sites[0], group.budget.rank
        most = min(site.in_features, site.out_features)
        if rank > most:
            key = "rank" if len(group.sites) > 1 else "equivalent_rank"
            raise BaseError(
                f"adapter.{key}: {rank} is more than {site.name} ({site.out_features} x {site.in_features}) can have",
                f"use at most {most}",
            )
    shared = [group for group in groups if len(group.sites) > 1]
    _check_shards(shared)
    for group in sorted(shared, key=lambda g: len(g.sites)):
        _check_rank(group)


def _check_shards(groups: Sequence[Group]) -> None:
    """A vector of I or O numbers is cut into l equal shards."""
    for group in groups:
        site, shards = group.sites[0], group.budget.shards
        for what, size in (("inputs", site.in_features), ("outputs", site.out_features)):
            if size % shards:
                sizes = [n for g in groups for n in (g.sites[0].in_features, g.sites[0].out_features)]
                common = math.gcd(*sizes)
                raise BaseError(
                    f"adapter.shards: {shards} does not divide the {size} {what} of {site.name}",
                    f"use {_nearest([n for n in range(1, common + 1) if common % n == 0], shards)}, "
                    f"which divides every adapted layer's sizes",
                )


def _check_rank(group: Group) -> None:
    """Without replacement, a layer can draw no more public rows than there are: r - p <= (e - p) * L."""
    budget, layers = group.budget, len(group.sites)
    r, e, p = budget.rank, budget.equivalent_rank, budget.private_rank
    if r - p <= (e - p) * layers:
        return
    fixes = [f"a rank of at most {p + (e - p) * layers}", f"an equivalent_rank of at least {p + -(-(r - p) // layers)}"]
    if e * layers >= r:
        fixes.append(f"a private_rank of at most {(e * layers - r) // (layers - 1)}")
    raise BaseError(
        f"adapter.rank: {r} with private_rank {p} takes {r - p} public vectors per layer, but the {layers} layers "
        f"of type {group.name} have (equivalent_rank - private_rank) * layers = {(e - p) * layers} between them",
        "use " + ", or ".join(fixes),
    )


def _nearest(valid: Sequence[int], asked: int) -> str:
    below = [n for n in valid if n < asked][-1:]
    above = [n for n in valid if n > asked][:1]
    return " or ".join(str(n) for n in below + above)
