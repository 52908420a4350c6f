"""How a member is trained, and what is kept on the way."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raylora.spec.base import Frozen

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizationSpec(Frozen):
    """How a member is trained; every number is per member, whatever else shares its worker."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW with decoupled weight decay, or plain gradient descent without momentum."""
    lr: float = Field(default=5e-4, gt=0)
    """The highest learning rate of the schedule."""
    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """LoRA+ (Hayou et al., arXiv 2402.12354): B learns at ``lora_plus_ratio * lr``, A and the head at ``lr``; 1 is off.
    The paper advises about 16 with a smaller ``lr``. For kinds that are two factors: lora, mos, melora, prolora,
    boosted_lora."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate moves after the warmup: to zero in a line or along a cosine, or not at all."""
    warmup: float = Field(default=0.06, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows; 3 by default, unless ``steps`` is given."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, in place of ``epochs``."""
    restarts: tuple[float, ...] = ()
    """Epochs (steps, where ``steps`` is given) after which the schedule starts anew, with its warmup: what lets a
    finished run train on."""
    micro_batch: int = Field(default=16, ge=1)
    """Rows of one member in one forward pass."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches whose gradients are averaged into one optimizer step."""
    group_by_length: bool = False
    """Batch rows of like length: less padding, a data order that is a little less random."""
    pack_rows: bool = False
    """Train on several short rows in one sequence of at most ``task.max_length`` tokens, none of which sees another:
    hardly any padding, and the losses and gradients of a row per sequence; for tasks that learn token by token.
    Evaluations keep a row per sequence."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Each member's own gradient norm is clipped to this."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed ZeRO stage over the adapter parameters."""
    cache_trunk: bool = False
    """Keep on disk what the blocks below the first adapted one make of the training rows, in bfloat16, and read it
    instead of computing it in every epoch; needs ``adapter.layers: {last: k}``."""
    cache_trunk_gb: float = Field(default=10.0, gt=0)
    """How many gigabytes ``cache_trunk`` may take on each disk that it is on; rows beyond are computed every time."""

    @model_validator(mode="after")
    def _one_length(self) -> OptimizationSpec:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give 'epochs' or 'steps', not both")
        return self

    @model_validator(mode="after")
    def _cached_by_row(self) -> OptimizationSpec:
        if self.pack_rows and self.cache_trunk:
            raise ValueError("cache_trunk keeps rows in sequences of their own: give it or 'pack_rows', not both")
        return self

    @model_validator(mode="after")
    def _restarts_in_order(self) -> OptimizationSpec:
        length = self.steps or self.epochs or math.inf
        ends = [0.0, *self.restarts, length]
        if any(one >= other for one, other in itertools.pairwise(ends)):
            raise ValueError(f"restarts must rise between 0 and the end of training ({length:g})")
        return self


class CheckpointingSpec(Frozen):
    """How often a member's state is committed, and how it is retried."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between two commits; by default they are made at the end of each epoch."""
    num_to_keep: int = Field(default=2, ge=1)
    """How many commits of each member that still trains are kept."""
    max_failures: int = Field(default=3, ge=0)
    """How often a member may be restarted from its last commit after its worker died."""
    keep_final: bool = True
    """Keep the last state of finished members, with their optimizers (about three times a member's size): from it a run
    can train on, and a damaged member is made again without training."""


class ProfileSpec(Frozen):
    """A trace of a few steps of each job, in ``RUN/profile``; what ``raylora run --profile`` asks for."""

    skip: int = Field(default=2, ge=0)
    """How many steps are left out first: they are slower, as memory is allocated and kernels are chosen."""
    steps: int = Field(default=3, ge=1)
    """How many steps are recorded."""
