"""The forward KL to the teacher's mixture, as in KD-LoRA (arXiv 2410.20777)."""

from __future__ import annotations

from typing import Literal

from raylora.distill.base import TemperedSpec
from raylora.distill.loss_functions import forward_kl
from raylora.distill.losses.divergence import MixtureLoss


class Spec(TemperedSpec):
    """``a CE + (1 - a) T^2 KL(teacher || student)``: the student covers all that the teacher holds possible."""

    kind: Literal["kl"] = "kl"


def build(spec: Spec) -> MixtureLoss:
    """Return the loss that a spec describes."""
    return MixtureLoss(spec, forward_kl)
