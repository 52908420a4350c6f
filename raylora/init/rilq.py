"""RILQ: all pairs of a model tuned together, towards what its last block gives in full precision (arXiv 2412.01129).

With h the last block's output in the full model, h' that of the quantized one and its pairs (section 4 of the paper):

    ``(1 - w) * ||h' - h||^2 / ||h||^2 + w * CE(next token)``     over all A, B, by Adam on the calibration text.

What one layer cannot make up for at a low rank, others may: the loss asks for the model's result and for no layer's.
The first term is divided by the size of h here, so that it has one scale for all models; a model that predicts no next
token has that term alone. Pairs begin with A ~ U(-1/sqrt I, 1/sqrt I) and B = 0.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raylora.init.factors import check_rank
from raylora.spec import CompensationSpec


class Spec(CompensationSpec):
    """Pairs of all layers, tuned together so that the model's last block gives what it gives in full precision."""

    reads_full_model: ClassVar[bool] = True
    tunes_together: ClassVar[bool] = True

    kind: Literal["rilq"] = "rilq"
    steps: int = Field(default=200, ge=1)
    """Steps of Adam for the whole model, each on one batch of the calibration text (about 2,048 tokens)."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of the pairs."""
    lm_weight: float = Field(default=0.5, ge=0, lt=1)
    """w, what the loss of the next token weighs beside the last block's output; for causal models."""


class Rilq:
    """Rounds with the quantizer; what a layer alone can be given is where tuning starts."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def solve(
        self, weight_OI: Tensor, quantize: Callable[[Tensor], Any], gram_II: Tensor, name: str
    ) -> tuple[Any, Tensor, Tensor]:
        """Return (Q, A_RI drawn by the layer's name, B_OR zero). Raises: BaseError for a rank beyond a side."""
        (outputs, inputs), rank = weight_OI.shape, self.spec.rank
        check_rank(rank, outputs, inputs, name)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        a_RI = torch.empty(rank, inputs).uniform_(
            -inputs**-0.5, inputs**-0.5, generator=torch.Generator().manual_seed(seed)
        )
        return quantize(weight_OI), a_RI, torch.zeros(outputs, rank)


def build(spec: Spec) -> Rilq:
    """Return the method for a spec."""
    return Rilq(spec)


def discrepancy(found_ND: Tensor, wanted_ND: Tensor) -> Tensor:
    """Return ``||h' - h||^2 / ||h||^2`` over real tokens, in float32."""
    wanted_ND = wanted_ND.float()
    return (found_ND.float() - wanted_ND).square().sum() / wanted_ND.square().sum()
