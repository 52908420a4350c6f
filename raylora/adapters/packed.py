"""K members in one forward: the base runs once over all their rows, each row meets its own member's tensors.

The rows of member k are rows k*B .. (k+1)*B-1 of the batch. What a row meets is decided by its position
alone, so no gradient can reach another member.

Shapes: K members, B rows of one member, T time, N = B*T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from raylora.adapters.base import HEAD, Adapter, NeedsBaseWeights, Site, Tensors, WholeModel


@dataclass(frozen=True)
class Masks:
    """What the dropout of a forward is drawn for: each member's rows, from a generator of the member's own."""

    seeds_K: Sequence[int]
    lengths_K: Sequence[int]
    left_padded: bool
    rows_before: int = 0
    """Rows of a member that workers before this one have, where several share its batch; masks are the whole's."""
    rows: int | None = None
    """Rows of a member in the whole batch, if not all are here."""

    def of(self, start: int, stop: int) -> Masks:
        """Return those of some of the members."""
        return replace(self, seeds_K=self.seeds_K[start:stop], lengths_K=self.lengths_K[start:stop])


@dataclass(frozen=True)
class Dropout:
    """Adapter-input dropout that gives a member the same masks alone and in a pack.

    Each member draws its mask over its own unpadded (B, T_k) rows from a generator seeded by its own seed,
    the step and the site; what other members pad the pack to does not matter.

    A number takes 16 random bits, so that the probability is met to 1 / 131072. They are drawn on the CPU whatever
    the device is, 64 at a time, which takes a quarter of the time that floats do. What is kept is scaled by a
    number of x's type, as torch's own dropout on a CPU does: in bfloat16 it is off by at most 1 / 512.
    """

    probability: float
    masks: Masks

    def apply(self, x_KBTI: Tensor, site_index: int) -> Tensor:
        """Return x with each member's own inputs dropped and the rest scaled up by 1 / (1 - p)."""
        time, masks = x_KBTI.shape[2], self.masks
        kept_of = max(1, round((1.0 - self.probability) * 2**16))  # out of 2^16
        padded = any(length < time for length in masks.lengths_K)
        on_cpu = x_KBTI.device.type == "cpu"
        dtype = x_KBTI.dtype if on_cpu else torch.bool  # another device is sent bytes
        kept = (torch.zeros if padded else torch.empty)(x_KBTI.shape, dtype=dtype)
        for k, (seed, length) in enumerate(zip(masks.seeds_K, masks.lengths_K, strict=True)):
            generator = torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15 * (site_index + 1)) % 2**63)
            length = min(length, time)  # an output layer may be asked for its last positions only
            here, before = x_KBTI.shape[1], masks.rows_before
            shape = (here if masks.rows is None else masks.rows, length, x_KBTI.shape[3])
            count = math.prod(shape)
            words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
            drawn = words.view(torch.int16)[:count].view(shape)[before : before + here]
            start = time - length if masks.left_padded else 0
            torch.le(drawn, kept_of - 2**15 - 1, out=kept[k, :, start : start + length])
        mask = kept if on_cpu else kept.to(x_KBTI.device).to(x_KBTI.dtype)
        return x_KBTI * mask.mul_(2**16 / kept_of)


@dataclass(frozen=True)
class Part:
    """Members of a pack that follow each other and have one adapter: their tensors, ready to use."""

    adapter: Adapter
    members: int
    at_site: Mapping[str, Any]
    """Per adapted layer what :meth:`Adapter.packed_delta` takes; empty turns the adapter off."""
    places: Mapping[str, int] = field(default_factory=dict)
    """Which of the members' own layers each is: their masks of dropout are drawn for it."""
    dropout: Dropout | None = None
    over: NeedsBaseWeights | None = None
    """The adapter again, if its change depends on the frozen layer."""

    def change(self, y: Tensor, x: Tensor, base: nn.Module, site: str) -> Tensor:
        """Return y, the layer's own product of these members' rows x, plus each member's change."""
        if site not in self.at_site:
            return y
        x_KNI = _by_member(x, self.members, self.dropout, self.places.get(site, 0))
        if self.over is not None:
            base_KNO = base(x_KNI) if self.dropout is not None else y.reshape(*x_KNI.shape[:2], -1)
            delta_KNO = self.over.packed_delta_over(base, base_KNO, x_KNI, self.at_site[site])
        else:
            delta_KNO = self.adapter.packed_delta(x_KNI, self.at_site[site])
        return y + delta_KNO.view_as(y).to(y.dtype)


@dataclass
class Pack:
    """What the adapted layers read during one forward: the members' tensors, ready to use."""

    parts: Sequence[Part]
    """One where all members have one adapter; its rows of a batch follow those of the parts before it."""
    heads: Mapping[str, Tensor]
    """Stacked head tensors, ``<module>.weight`` K x O x I and ``<module>.bias`` K x O."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Stacked weights that stand in for the base's own, where members are whole models."""

    @property
    def members(self) -> int:
        """How many members share the forward."""
        return sum(part.members for part in self.parts)

    def dropping(self, masks: Masks) -> Pack:
        """Return the pack with the dropout of each part's adapter, if it has any."""
        parts, start = [], 0
        for part in self.parts:
            stop, probability = start + part.members, part.adapter.spec.dropout
            parts.append(replace(part, dropout=Dropout(probability, masks.of(start, stop)) if probability else None))
            start = stop
        return replace(self, parts=parts)

    def alone(self) -> list[Pack]:
        """Return a pack per member, for what cannot share a forward."""
        weights, heads = ({n: t.unbind() for n, t in tensors.items()} for tensors in (self.weights, self.heads))
        return [
            replace(self, parts=[replace(self.parts[0], members=1)], weights={n: t[k] for n, t in weights.items()},
                    heads={n: t[k][None] for n, t in heads.items()})
            for k in range(self.members)
        ]


class Slot:
    """The one mutable thing in an adapted base: which pack, if any, the current forward reads."""

    def __init__(self) -> None:
        self.pack: Pack | None = None

    @contextmanager
    def use(self, pack: Pack) -> Iterator[None]:
        """Run forwards with a pack; the base is itself again afterwards, also after an error."""
        self.pack = pack
        try:
            yield
        finally:
            self.pack = None


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus the change of whichever members are in the slot."""

    def __init__(self, base: nn.Module, site: Site, slot: Slot) -> None:
        super().__init__()
        self.base, self.site, self.slot = base, site, slot

    @property
    def weight(self) -> Tensor:
        """The frozen weight; some architectures look at a layer's weight for its type."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x), plus each member's delta for its own rows."""
        y = self.base(x)
        pack = self.slot.pack
        if pack is None:
            return y
        name = self.site.name
        if len(pack.parts) == 1:
            return pack.parts[0].change(y, x, self.base, name)
        rows = [part.members * (len(x) // pack.members) for part in pack.parts]
        own = zip(pack.parts, y.split(rows), x.split(rows), strict=True)
        return torch.cat([part.change(y_B, x_B, self.base, name) for part, y_B, x_B in own])


class MemberLinear(nn.Module):
    """A linear layer of the task head: each member has its own; without a pack it is the base's."""

    def __init__(self, base: nn.Linear, name: str, slot: Slot) -> None:
        super().__init__()
        self.base, self.name, self.slot = base, name, slot

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the member's own weight, in float32: logits are never rounded to bfloat16."""
        pack = self.slot.pack
        if pack is None:
            return self.base(x)
        weight_KOI = pack.heads[f"{self.name}.weight"]
        x_KNI = x.float().reshape(pack.members, -1, x.shape[-1])
        y_KNO = torch.bmm(x_KNI, weight_KOI.transpose(1, 2))
        bias_KO = pack.heads.get(f"{self.name}.bias")
        if bias_KO is not None:
            y_KNO = y_KNO + bias_KO[:, None]
        return y_KNO.view(*x.shape[:-1], -1)


def _by_member(x: Tensor, members: int, dropout: Dropout | None, index: int) -> Tensor:
    rows = x.reshape(members, -1, *x.shape[1:])
    if dropout is not None:
        timed = rows if rows.dim() == 4 else rows.unsqueeze(2)
        if rows.dim() != 4:  # a pooled position has no time: every member's length is one
            dropout = replace(dropout, masks=replace(dropout.masks, lengths_K=[1] * members))
        rows = dropout.apply(timed, index)
    return rows.reshape(members, -1, x.shape[-1])


def attach(model: nn.Module, sites: Sequence[Site], heads: Sequence[str]) -> Slot:
    """Replace the sites and the head's linears by layers that read one shared slot.

    Returns:
        The slot; with nothing in it the model computes what it computed before.
    """
    slot = Slot()
    for site in sites:
        _replace(model, site.name, AdaptedLinear(model.get_submodule(site.name), site, slot))
    for name in heads:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        _replace(model, name, MemberLinear(linear, name, slot))
    return slot


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def stack(members: Sequence[Mapping[str, Tensor]], parts: Sequence[int] | None = None) -> Tensors:
    """Stack the tensors of K members along a new first axis.

    Args:
        parts: for members of several adapters, which of them each has, counted up from 0 along the members; the names
            of their tensors are then marked with it, but for those of heads.

    Raises:
        ValueError: members of one adapter do not have the same names, so they cannot share a forward.
    """
    marked = members if parts is None else [_marked(one, part) for one, part in zip(members, parts, strict=True)]
    for own in set(parts or [0]):
        alike = [m.keys() for m, part in zip(marked, parts or [0] * len(marked), strict=True) if part == own]
        if any(keys != alike[0] for keys in alike):
            raise ValueError("members of one pack must have the same tensors")
    names = dict.fromkeys(name for member in marked for name in member)
    return {name: torch.stack([m[name] for m in marked if name in m]) for name in names}


def unstack(stacked: Mapping[str, Tensor]) -> list[Tensors]:
    """Return the tensors of each member of a stack, under their own names."""
    found: list[Tensors] = []
    for part, tensors in split(stacked).items():
        heads = {name: t for name, t in stacked.items() if part is not None and name.startswith(HEAD)}
        first, count = len(found), len(next(iter(tensors.values())))
        found += [
            {n: t[k] for n, t in tensors.items()} | {n: t[first + k] for n, t in heads.items()} for k in range(count)
        ]
    return found


def split(stacked: Mapping[str, Tensor]) -> dict[int | None, Tensors]:
    """Return a stack part by part, each under its own names; whole under None where all have one adapter.

    Heads, which all members have, are no part's.
    """
    found: dict[int | None, Tensors] = {}
    is_marked = any(_MARK in name for name in stacked)
    for name, tensor in stacked.items():
        part, mark, own = name.partition(_MARK)
        if mark or not is_marked:
            found.setdefault(int(part) if mark else None, {})[own if mark else name] = tensor
    return dict(sorted(found.items(), key=lambda item: item[0] or 0))


def member_count(stacked: Mapping[str, Tensor]) -> int:
    """Return how many members a stack has."""
    return sum(len(next(iter(tensors.values()))) for tensors in split(stacked).values())


_MARK = "#"
"""Between the number of a part and the name of its tensor; no module has it in its name."""


def _marked(member: Mapping[str, Tensor], part: int) -> Tensors:
    return {name if name.startswith(HEAD) else f"{part}{_MARK}{name}": t for name, t in member.items()}


def make_pack(
    adapters: Adapter | Sequence[Adapter], sites: Sequence[Site] | Sequence[Sequence[Site]],
    stacked: Mapping[str, Tensor], adapters_on: bool = True,
) -> Pack:
    """Split stacked tensors into adapters and heads and materialize the adapters once.

    Args:
        adapters: the one of all members, or that of each part.
        sites: the layers that those are in, of all members or of each part.
        adapters_on: ``False`` keeps the heads and leaves the base as it was before any training, the
            reference of the KL regularizer.
    """
    heads = {n.removeprefix(HEAD): t for n, t in stacked.items() if n.startswith(HEAD)}
    parts: list[Part] = []
    weights: Tensors = {}
    for number, tensors in split(stacked).items():
        found = (adapters[number or 0], sites[number or 0]) if isinstance(adapters, Sequence) else (adapters, sites)
        adapter, own = cast("tuple[Adapter, Sequence[Site]]", found)
        inner = {n: t for n, t in tensors.items() if not n.startswith(HEAD)}
        at_site = adapter.materialize(inner, own) if adapters_on and inner else {}
        over = adapter if isinstance(adapter, NeedsBaseWeights) else None
        places = {site.name: place for place, site in enumerate(own)}
        parts.append(Part(adapter, len(next(iter(tensors.values()))), at_site, places, over=over))
        weights |= inner if adapters_on and isinstance(adapter, WholeModel) else {}
    return Pack(parts, heads, weights)
