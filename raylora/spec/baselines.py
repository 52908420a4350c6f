"""What an ensemble is compared with in its own run: other ways to say how sure a model is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raylora.spec.base import Frozen


class MCDropoutSpec(Frozen):
    """One member trained and evaluated with dropout on the adapter input."""

    dropout: float = Field(default=0.1, gt=0, lt=1)
    """The dropout that the member is trained and evaluated with."""
    passes: int = Field(default=8, ge=2)
    """How many evaluations with dropout make the prediction."""


class SwagSpec(Frozen):
    """Weights drawn from where member 0's were in the last part of its training (SWAG-diagonal, arXiv 1902.02476)."""

    samples: int = Field(default=8, ge=2)
    """How many weight vectors are drawn, which predict together."""
    last: float = Field(default=0.5, gt=0, le=1)
    """The share of the training, up to its end, in which weights are counted in. The paper keeps the learning rate
    constant meanwhile (``optimization.schedule: constant``); one that falls to zero leaves little variance."""
    every_steps: int | None = Field(default=None, ge=1)
    """Count them in every so many steps, back from the last one; by default about 20 times."""
    variance_scale: float = Field(default=0.5, gt=0)
    """The variance that weights are drawn with, as a share of theirs; 1/2 as in the paper's equation 1, whose other
    half is of low rank and is not here."""


class LaplaceSpec(Frozen):
    """A Gaussian around member 0's LoRA matrices, from the curvature of its loss (arXiv 2308.13111)."""

    structure: Literal["diagonal", "kronecker"] = "diagonal"
    """Of the curvature: ``diagonal`` is exact but for what lies off it; ``kronecker`` is the product of what a matrix
    multiplies and of the gradients by what it gives, over all tokens (K-FAC)."""
    prior_precision: float | None = Field(default=None, gt=0)
    """Of the Gaussian prior around zero; by default the one with the greatest marginal likelihood of the training
    rows."""
    samples: int = Field(default=64, ge=2)
    """Draws of each row's logits, in pairs of opposite ones, whose probabilities are averaged."""


class BaselinesSpec(Frozen):
    """Comparisons trained and evaluated in the same run."""

    single: bool = True
    """One LoRA model: member 0 on its own, at no extra cost."""
    mc_dropout: MCDropoutSpec | None = None
    """One member with dropout, evaluated several times; null is off."""
    last_layer: int = Field(default=0, ge=0)
    """Members of an ensemble of heads on the untouched base; 0 is off."""
    checkpoints: int = Field(default=0, ge=0)
    """The last n epoch ends of member 0 as a cheap ensemble; 0 is off."""
    temperature: bool = False
    """Member 0 with its logits divided by one temperature, fitted on the validation rows (arXiv 1706.04599)."""
    swag: SwagSpec | None = None
    """Several draws of member 0's weights around their mean; costs no training; null is off."""
    laplace: LaplaceSpec | None = None
    """What is known of member 0's LoRA matrices from its training rows, and of each row's logits for it; costs no
    training; null is off."""
