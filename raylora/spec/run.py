"""RunSpec: everything that decides what a run computes, in one frozen value."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, cast

from pydantic import Field, ValidationError, field_validator, model_validator

from raylora.spec.base import AnyAdapter, AnyTask, AnyTracker, Frozen, said_by
from raylora.spec.baselines import BaselinesSpec
from raylora.spec.data import DataSpec
from raylora.spec.evaluation import EvaluationSpec
from raylora.spec.members import EnsembleSpec
from raylora.spec.model import BaseSpec
from raylora.spec.names import NAME_PATTERN
from raylora.spec.placement import PlacementSpec
from raylora.spec.students import DistillFromSpec, DistillSpec
from raylora.spec.training import CheckpointingSpec, OptimizationSpec, ProfileSpec
from raylora.spec.vary import with_settings

_LATER: dict[str, dict[str, Any]] = {
    "optimization": {"cache_trunk": False, "pack_rows": False, "lora_plus_ratio": 1.0},
    "evaluation": {"generation": None},
    "ensemble": {"select": None, "weights": "equal", "pruning": None, "vary": None, "data_fraction": 1.0},
    "baselines": {"temperature": False, "swag": None, "laplace": None},
}
"""Keys that came after the first runs, and what stands for nothing: runs from before a key keep their digest."""


class RunSpec(Frozen):
    """A whole run. Two specs with one digest compute the same thing."""

    name: str | None = None
    """The run's folder below ``storage_path``: lower case, digits and dashes; by default made from the digest."""
    storage_path: str = "runs"
    """A local folder or an fsspec URI; the run's own directory is made below it."""
    base: BaseSpec
    """The frozen model that all members share."""
    adapter: AnyAdapter = Field(default_factory=lambda: cast(Any, {"kind": "lora"}))
    """What is trained in each member."""
    task: AnyTask
    """What a row means and what the model is asked for."""
    data: DataSpec
    """The rows."""
    ensemble: EnsembleSpec = EnsembleSpec()
    """How many members, and what makes them differ."""
    optimization: OptimizationSpec = OptimizationSpec()
    """How each member is trained."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """What is measured after training."""
    baselines: BaselinesSpec = BaselinesSpec()
    """Comparisons trained and evaluated in the same run."""
    placement: PlacementSpec = PlacementSpec()
    """Where members train."""
    checkpointing: CheckpointingSpec = CheckpointingSpec()
    """How often states are committed, and how often is tried again."""
    tracking: list[AnyTracker] = Field(default_factory=lambda: cast(Any, [{"kind": "tensorboard"}]))
    """Where the numbers of the run are shown while it goes on; an empty list is nowhere but in the run directory."""
    profile: ProfileSpec | None = None
    """A trace of a few steps of each job; what ``raylora run --profile`` asks for."""
    distill: DistillSpec | None = None
    """Teach a student when the ensemble is finished."""
    distill_from: DistillFromSpec | None = None
    """What a student learns from; only in a student's own run."""

    @field_validator("name")
    @classmethod
    def _safe_name(cls, value: str | None) -> str | None:
        if value is not None and not NAME_PATTERN.match(value):
            raise ValueError(f"run name {value!r} must match {NAME_PATTERN.pattern}")
        return value

    @field_validator("storage_path")
    @classmethod
    def _no_secret_in_uri(cls, value: str) -> str:
        if re.match(r"^[a-z0-9+]+://[^/@]+:[^/@]+@", value):
            raise ValueError("a URI with a password does not belong in a spec: use the environment's credentials")
        return value

    @field_validator("tracking")
    @classmethod
    def _each_once(cls, value: list[AnyTracker]) -> list[AnyTracker]:
        kinds = [tracker.kind for tracker in value]
        if len(set(kinds)) != len(kinds):
            raise ValueError("a kind is given twice: give each at most once")
        return value

    @model_validator(mode="after")
    def _decay_is_stable(self) -> RunSpec:
        rules, ratio = self.ensemble.regularizers, self.optimization.lora_plus_ratio
        for key in ("decay_a", "decay_b", "decay_head"):
            decay, factor = getattr(rules, key), ratio if key == "decay_b" else 1.0
            lr, rate = self.optimization.lr * factor, "lr" if factor == 1 else "lr * lora_plus_ratio"
            if decay and self.optimization.optimizer == "sgd":
                raise ValueError(f"ensemble.regularizers.{key} is decoupled decay, which sgd lacks: use adamw")
            if lr * decay >= 1:
                raise ValueError(
                    f"{rate} * {key} = {lr * decay:.3g} >= 1: each step would multiply by {1 - lr * decay:.3g}; lower "
                    f"ensemble.regularizers.{key} below {1 / lr:.3g} or optimization.lr below {1 / decay / factor:.3g}"
                )
        return self

    @model_validator(mode="after")
    def _members_are_valid(self) -> RunSpec:
        known: list[dict[str, Any]] = []
        for m, settings in enumerate(self.ensemble.member_settings()):
            if settings and settings not in known:
                known.append(settings)
                try:
                    self.with_settings(settings)
                except ValidationError as error:
                    raise ValueError(f"ensemble.vary: member {m} with {settings}: {said_by(error)}") from None
        return self

    def with_settings(self, settings: Mapping[str, Any]) -> RunSpec:
        """Return this run as a member with such settings of its own sees it. Raises: ValueError."""
        if not settings:
            return self
        content = self.model_dump(mode="json")
        content["ensemble"]["vary"] = None
        seeds = self.ensemble.seeds
        if seeds is not None and len(set(seeds)) != len(seeds):  # of members that settings tell apart
            content["ensemble"]["seeds"] = None
        return RunSpec.model_validate(with_settings(content, settings))

    def members_alone(self) -> dict[str, Any]:
        """Return this run's plain data without what is done beside its members, or when they have ended."""
        content = self.model_dump(mode="json")
        content |= {"baselines": BaselinesSpec(single=False).model_dump(mode="json"), "distill": None}
        content["evaluation"] |= {"in_distribution": {}, "out_of_distribution": {}, "generation": None}
        return content

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the result; a run that is taken up again must not differ in it.

        Where it runs is not part of it: a member is the same in any pack, to float tolerance. Nor is where it is
        shown, what is measured on the way, or whom it teaches afterwards.
        """
        left_out = {"name", "storage_path", "placement", "checkpointing", "tracking", "profile", "distill"}
        if self.distill_from is None:  # runs from before there were students keep their digest
            left_out.add("distill_from")
        found = self.model_dump(mode="json", exclude=left_out)
        if self.distill_from is not None:  # nor those from before a teacher was asked, was weighted, or had answered
            given, later = found["distill_from"], ("members", "weights", "answers")
            found["distill_from"] = {k: v for k, v in given.items() if k not in later or v is not None}
        for section, defaults in _LATER.items():
            found[section] = {k: v for k, v in found[section].items() if k not in defaults or v != defaults[k]}
        if not self.optimization.cache_trunk:
            del found["optimization"]["cache_trunk_gb"]
        if self.ensemble.pruning is not None and self.ensemble.pruning.places is None:
            del found["ensemble"]["pruning"]["places"], found["ensemble"]["pruning"]["brackets"]
        return found

    def digest(self) -> str:
        """Return the SHA-256 of the spec's identity."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def run_name(self) -> str:
        """Return the run's name: its own, or one made from the digest."""
        return self.name or f"run-{self.digest()[:8]}"


BaselinesSpec.model_rebuild()
RunSpec.model_rebuild()
