"""What a run trains: its members, and the baselines that are trained beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from raylora import registry
from raylora.adapters.base import InRounds, NeedsBaseWeights, Unpackable, WholeModel
from raylora.adapters.side_by_side import adapter_of
from raylora.data.order import Sample, derive_seed
from raylora.errors import BaseError
from raylora.spec import AdapterSpec, EnsembleSpec, OptimizationSpec, RegularizersSpec, RunSpec
from raylora.spec.baselines import SwagSpec

MADE_OF_MEMBER_0 = ("checkpoints", "swag", "laplace")
"""Baselines that are no units of their own: their predictions are made with member 0, where a run has them."""


class PlanRole(str, Enum):
    """What something is trained for: to be of the ensemble, or to be compared with it."""

    MEMBER = "member"
    MC_DROPOUT = "mc_dropout"
    LAST_LAYER = "last_layer"


@dataclass(frozen=True)
class MemberPlan:
    """One thing to train: a seed, an adapter, and how it is trained."""

    name: str
    role: PlanRole
    seed: int
    adapter: AdapterSpec
    optimization: OptimizationSpec
    regularizers: RegularizersSpec
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it has that is not the run's (``ensemble.vary``), by dotted key."""
    bootstrap: bool = False
    """Whether its rows are drawn with replacement."""
    data_fraction: float = 1.0
    """The share of the training rows that it learns from."""
    swag: SwagSpec | None = None
    """When its weights are counted in, where a baseline draws from their moments; its training knows nothing of it."""

    @property
    def folder(self) -> str:
        """Where its result lies in the run directory."""
        return f"{'members' if self.role is PlanRole.MEMBER else 'baselines'}/{self.name}"

    def stream(self, purpose: str, *parts: int | str) -> int:
        """Return the seed of one of this unit's random streams: ``init``, ``order``, ``dropout``."""
        return derive_seed(self.seed, purpose, *parts)

    def sample_of(self, rows: int) -> Sample | None:
        """Return which of the training rows this unit learns from, or None if from all."""
        size = max(1, round(self.data_fraction * rows))
        if self.bootstrap:
            return Sample(size, self.stream("bootstrap"), with_replacement=True)
        return Sample(size, self.stream("part"), with_replacement=False) if size < rows else None


def member_plans_of(spec: RunSpec) -> list[MemberPlan]:
    """Return every plan of a run, members first."""
    seeds, settings = spec.ensemble.member_seeds(), spec.ensemble.member_settings()
    own: dict[str, RunSpec] = {}  # members are many, what they differ in is little
    plans = []
    for m, (seed, varied) in enumerate(zip(seeds, settings, strict=True)):
        key = repr(varied)
        if key not in own:
            own[key] = spec.with_settings(varied)
        plans.append(_plan(f"member-{m:03d}", PlanRole.MEMBER, seed, own[key], settings=varied))
    plans[0] = replace(plans[0], swag=spec.baselines.swag)
    first = own[repr(settings[0])]
    if spec.baselines.mc_dropout is not None:  # a baseline of one member is trained as the first one
        dropped = first.adapter.model_copy(update={"dropout": spec.baselines.mc_dropout.dropout})
        plans.append(_plan("mc-dropout", PlanRole.MC_DROPOUT, seeds[0], first, dropped, settings[0]))
    none = registry.load("adapter", "none").Spec()
    for m in range(spec.baselines.last_layer):
        seed = seeds[m] if m < len(seeds) else derive_seed(seeds[0], "last-layer", m)
        plans.append(_plan(f"last-layer-{m:03d}", PlanRole.LAST_LAYER, seed, spec, none))
    return plans


def _plan(
    name: str, role: PlanRole, seed: int, spec: RunSpec, adapter: AdapterSpec | None = None,
    settings: Mapping[str, Any] | None = None,
) -> MemberPlan:
    ensemble = spec.ensemble
    return MemberPlan(name, role, seed, adapter or spec.adapter, spec.optimization, ensemble.regularizers,
                      settings or {}, ensemble.bootstrap, ensemble.data_fraction)


def order_seed(plan: MemberPlan, ensemble: EnsembleSpec) -> int:
    """Return the seed of a unit's data order; with ``shared`` order all units see the same batches."""
    if ensemble.data_order == "shared":
        return derive_seed(ensemble.seed, "order")
    return plan.stream("order")


def packable_groups(plans: Sequence[MemberPlan], brackets: int = 1) -> list[list[str]]:
    """Return the units' names grouped by what can share one forward: a role and a penalty, and a bracket.

    Units of one adapter follow each other, since they multiply together. Everything else that members may differ in
    is their own optimizer's business.
    """
    groups: list[list[str]] = []
    kinds: dict[str, dict[str, list[MemberPlan]]] = {}
    for plan in plans:
        kind = kinds.setdefault(repr((plan.role, plan.regularizers.kl)), {})
        kind.setdefault(repr(plan.adapter), []).append(plan)
    for of_adapter in kinds.values():
        together: list[str] = []
        for alike in of_adapter.values():
            names = [plan.name for plan in alike]
            if unpackable_reason(alike[0]):
                groups += [[name] for name in names]
            else:
                together += names
        groups += [part for part in (together[number::brackets] for number in range(brackets)) if part]
    return groups


def member_adapters(spec: RunSpec) -> list[AdapterSpec]:
    """Return the adapters that a run's members have, each once."""
    found = {repr(plan.adapter): plan.adapter for plan in member_plans_of(spec) if plan.role is PlanRole.MEMBER}
    return list(found.values())


def rounds_of(plan: MemberPlan) -> int:
    """Return in how many rounds a plan trains."""
    adapter = adapter_of(plan.adapter)
    return adapter.rounds if isinstance(adapter, InRounds) else 1


def unpackable_reason(plan: MemberPlan) -> str:
    """Return why a plan shares no forward with its like, or nothing if it may."""
    adapter = adapter_of(plan.adapter)
    return adapter.unpackable_reason() if isinstance(adapter, Unpackable) else ""


def check_weights(spec: RunSpec) -> None:
    """Refuse a base whose weights are stored in a way that the adapter cannot work with.

    Raises:
        BaseError: with the adapter's own reason.
    """
    for adapter in map(adapter_of, member_adapters(spec)):
        if not isinstance(adapter, NeedsBaseWeights | WholeModel):
            continue
        reason = adapter.unsupported_reason(not spec.base.quantization.is_dense)
        if reason:
            raise BaseError(
                f"base.quantization: {spec.base.quantization.kind}: {reason}", "use none, or another adapter"
            )


def check_baselines(spec: RunSpec, has_head: bool) -> None:
    """Refuse baselines that the task cannot have.

    Raises:
        BaseError: a last-layer ensemble where there is no head to train, or Monte-Carlo dropout where there is no
            adapter input to drop.
    """
    adapter = adapter_of(spec.adapter)
    if spec.baselines.mc_dropout is not None and isinstance(adapter, WholeModel):
        raise BaseError(
            f"baselines.mc_dropout: drops the adapter's input, and {spec.adapter.kind} has none",
            "leave it out, or use another adapter",
        )
    if not has_head and (spec.baselines.last_layer or spec.adapter.kind == "none"):
        raise BaseError(
            f"baselines.last_layer: a {spec.task.kind} run has no head of its own to train",
            "leave it out, or use task.kind: classification",
        )
