"""Where members train."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from raylora.spec.base import Frozen


class PlacementSpec(Frozen):
    """Where members train; ``auto`` is decided from the machine and explained by ``raylora plan``."""

    strategy: Literal["auto", "replicate", "shard"] = "auto"
    """Whether every worker has the whole base (those of one machine read the same pages), or each holds a part of it
    and gathers the rest block by block as it computes (DeepSpeed ZeRO-3); ``auto`` splits it where a whole one
    does not fit, or where that is much faster."""
    ranks: int | Literal["auto"] = "auto"
    """Over how many processes a base is split, at least 2; for strategy shard."""
    recompute: bool = False
    """Run every block again in the backward pass instead of keeping its activations: less memory for about a third more
    time, and the same members bit for bit."""
    output_layer: Literal["whole", "parts"] = "whole"
    """How a language model's output layer is passed: ``whole``, or in ``parts`` of the vocabulary of at most a block's
    bytes or a 128th of it. A base that is split then has no more of it, and of embeddings that are the same table, than
    a part at once; it is gathered twice per chunk of positions in place of once a pass. Members are the same
    bit for bit whether the base is split or not, but for ``whole`` and ``parts`` to tolerance only."""
    data_parallel: int = Field(default=1, ge=1)
    """How many processes train the same members, each on its part of every batch; the effective batch stays the
    spec's, and ``optimization.zero_stage`` 1 or 2 splits the optimizer's state between them."""
    workers: int | Literal["auto"] = "auto"
    """How many processes train, at least 1."""
    members_per_worker: int | Literal["auto"] = "auto"
    """How many members one worker trains in one forward pass."""
    cpus_per_worker: int | Literal["auto"] = "auto"
    """Cores of each worker, at least 1."""
    gpus_per_worker: Literal["auto", 0, 1] = "auto"
    """GPUs of each worker; ``auto`` is one where the machine has any."""
    scheduling: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy: workers close together (PACK) or apart (SPREAD); STRICT takes no other answer."""
    min_workers: int | None = Field(default=None, ge=1)
    """With how many workers a run begins; the others join as machines appear, as under an autoscaler. By default with
    one, and ``workers`` beyond what the cluster has are refused; with a number they are waited for."""
    resources: dict[str, float] = {}
    """What else each worker needs, as Ray names it: ``{"accelerator_type:H100": 0.001}``, or your own."""
    start_timeout_s: float = Field(default=180.0, gt=0)
    """How long a run waits for the cluster to give it ``min_workers`` workers, and, when all are lost, one."""
    split_last: bool = False
    """Cut the last packs that wait into smaller ones once there are fewer than workers, so that each gets a share. Who
    shares a pack decides a member's last bits: members of packs that were cut equal those of whole ones to tolerance
    only, and which packs are cut depends on when workers are free."""

    @field_validator("resources")
    @classmethod
    def _amounts(cls, value: dict[str, float]) -> dict[str, float]:
        for name, amount in value.items():
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ValueError(f"{name} is placement.cpus_per_worker's or gpus_per_worker's to say, or Ray's own")
            if not amount > 0:
                raise ValueError(f"{name}: must be more than 0")
        return value

    @field_validator("ranks")
    @classmethod
    def _several(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 2:
            raise ValueError("must be at least 2, or 'auto'")
        return value

    @model_validator(mode="after")
    def _begins_with_what_is_asked_for(self) -> PlacementSpec:
        if self.min_workers is not None and isinstance(self.workers, int) and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        return self

    @field_validator("workers", "members_per_worker", "cpus_per_worker")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1, or 'auto'")
        return value
