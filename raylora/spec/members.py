"""How many members there are, and what makes them differ."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from raylora.spec.base import Frozen
from raylora.spec.vary import Varied, check_keys, varied_settings


class EarlyStoppingSpec(Frozen):
    """Stop a member when its validation metric has not improved for ``patience`` epochs, and keep its best state."""

    metric: str = "nll"
    """``nll`` serves every task; ``accuracy``, ``brier`` and ``ece`` need classes, ``rmse`` a regression. With
    ``evaluation.generation`` an instruction task has ``exact_match``, ``f1``, ``contains``, ``number`` and ``choice``,
    of each member's own answers to the validation rows."""
    patience: int = Field(default=1, ge=1)
    """How many epochs in a row may be no better than the best before a member stops."""


class PruningSpec(Frozen):
    """Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): who is behind at an epoch's end trains no further.

    Members are compared with those of their pack that still train; who leaves is a member as it was then. With
    ``places`` the place of who leaves is given to the next (asynchronous halving, Li et al., arXiv 1810.05934).
    """

    metric: str = "nll"
    """A metric of the validation rows, as ``early_stopping`` has it."""
    keep: float = Field(default=0.5, gt=0, lt=1)
    """The share that goes on, rounded up: 0.5 is halving."""
    every_epochs: int = Field(default=1, ge=1)
    """Epochs between two comparisons."""
    places: int | None = Field(default=None, ge=1)
    """How many members of a bracket train at once, in one forward; the others begin, in their order, where one has
    left, and are compared with all of the bracket that have come as far by then. By default all begin at once, and each
    pack is a bracket."""
    brackets: int = Field(default=1, ge=1)
    """With ``places``: how many brackets the members are dealt to in turn. One worker trains a bracket, and who is
    pruned depends on the brackets and on nothing else."""

    @model_validator(mode="after")
    def _brackets_have_places(self) -> PruningSpec:
        if self.brackets > 1 and self.places is None:
            raise ValueError("pruning.brackets are of members that wait for places: give pruning.places, too")
        return self


class KLSpec(Frozen):
    """``beta * KL(p_theta || p_base)`` (``forward``) or the other direction (``reverse``); arXiv 2310.00035."""

    beta: float = Field(gt=0)
    """Weight of the divergence beside the task's loss."""
    direction: Literal["forward", "reverse"] = "forward"
    """``forward`` is KL(member || base), ``reverse`` is KL(base || member)."""


class RegularizersSpec(Frozen):
    """The regularizers of LoRA ensembles; each is off by default and combines with the others."""

    early_stopping: EarlyStoppingSpec | None = None
    """Stop each member by its own validation metric; null is off."""
    kl: KLSpec | None = None
    """Keep each member's predictions near the untouched base's; null is off."""
    decay_a: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on the A matrices: each step multiplies them by 1 - lr * decay."""
    decay_b: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on the B matrices, or what takes their place."""
    decay_head: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on the task's head."""


class SelectSpec(Frozen):
    """Which finished members speak: chosen with replacement on the validation rows (Caruana et al., ICML 2004)."""

    method: Literal["greedy"] = "greedy"
    """``greedy``: begin with the best member and add, again and again, the one with which the mixture's validation NLL
    is least, until none lowers it; a member may be added more than once and then weighs more."""
    size: int = Field(default=5, ge=1)
    """How many additions there are at most."""


class EnsembleSpec(Frozen):
    """How many members there are and what makes them differ."""

    members: int = Field(default=5, ge=1)
    """M, how many members are trained."""
    seed: int = 0
    """Member m has this plus m as its seed."""
    seeds: list[int] | None = None
    """A seed per member; by default member m has ``seed + m``. Members that ``vary`` sets apart may have the same."""
    data_order: Literal["own", "shared"] = "own"
    """``own``: each member sees the rows in an order of its own seed. ``shared``: all members see them in one order."""
    bootstrap: bool = False
    """Draw each member's training rows with replacement."""
    data_fraction: float = Field(default=1.0, gt=0, le=1)
    """The share of the training rows that a member learns from, drawn by its own seed. Members take as many steps as
    with all rows: with 0.5 an epoch is two passes over the member's own half."""
    aggregate: Literal["mean_probabilities", "mean_logits"] = "mean_probabilities"
    """What the ensemble predicts: the mean of the members' probabilities, or the softmax of their mean logits."""
    select: SelectSpec | None = None
    """Let those members speak for the ensemble that the validation rows choose; null is all of them."""
    weights: Literal["equal", "stacked"] = "equal"
    """``equal``: the plain mean. ``stacked``: the weights with which the mixture's NLL on the validation rows is least,
    none negative and one in all (stacking of predictive distributions, Yao et al. 2018); with ``select``, of those it
    chose."""
    regularizers: RegularizersSpec = RegularizersSpec()
    """What keeps members from fitting their rows too closely; all off by default."""
    vary: Varied | None = None
    """What members differ in beside their seeds: keys with lists of values, every combination of which is a member's
    (``{optimization.lr: [1e-4, 3e-4, 1e-3]}``), or with a range (``{low: 1e-4, high: 1e-2, log: true}``) that is drawn
    from for each member; or a list with the keys and values of each member. A whole ``adapter`` may be a value too
    (``{adapter: {kind: mos, ...}}``); it is in the run's layers unless it says which."""
    pruning: PruningSpec | None = None
    """End members at epoch ends that are behind the others of their pack, as a sweep may; null is off."""
    min_members: int | None = Field(default=None, ge=1)
    """Finish, marked as degraded, if at least this many members survive; by default all must."""

    @model_validator(mode="after")
    def _seeds_match(self) -> EnsembleSpec:
        if self.seeds is not None and len(self.seeds) != self.members:
            raise ValueError(f"{len(self.seeds)} seeds for {self.members} members: give one seed per member")
        if self.min_members is not None and self.min_members > self.members:
            raise ValueError(f"min_members is {self.min_members}, but there are only {self.members} members")
        if self.members == 1 and self.is_fitted:
            raise ValueError("select and weights: one member alone leaves nothing to choose: raise members")
        if self.pruning is not None and self.regularizers.early_stopping is not None:
            raise ValueError("pruning and regularizers.early_stopping both end members: use one of them")
        if self.pruning is not None and self.pruning.brackets > self.members:
            raise ValueError(f"pruning.brackets is {self.pruning.brackets}, but there are only {self.members} members")
        if self.vary is not None:
            check_keys(self.vary, self.members)
        if self.seeds is not None and len(set(self.seeds)) != len(self.seeds):
            own = list(zip(self.seeds, self.member_settings(), strict=True))
            if any(one in own[:m] for m, one in enumerate(own)):
                raise ValueError("seeds repeat: members with one seed and the same settings are one member")
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether the members' weights are fitted on the validation rows."""
        return self.select is not None or self.weights != "equal"

    @property
    def places(self) -> int | None:
        """How many members of a bracket train at once, where the others wait for their places; None where none do."""
        return self.pruning.places if self.pruning is not None else None

    def member_seeds(self) -> list[int]:
        """Return the seed of each member."""
        return list(self.seeds) if self.seeds is not None else [self.seed + m for m in range(self.members)]

    def member_settings(self) -> list[dict[str, Any]]:
        """Return of each member the keys that it has a value of its own for, and the values."""
        return varied_settings(self.vary, self.member_seeds())
