"""The Jensen-Shannon divergence to the teacher's mixture."""

from __future__ import annotations

from typing import Literal

from raylora.distill.base import TemperedSpec
from raylora.distill.loss_functions import jensen_shannon
from raylora.distill.losses.divergence import MixtureLoss


class Spec(TemperedSpec):
    """``a CE + (1 - a) T^2 JS(teacher, student)``; bounded, and near the teacher a quarter of the KL."""

    kind: Literal["js"] = "js"


def build(spec: Spec) -> MixtureLoss:
    """Return the loss that a spec describes."""
    return MixtureLoss(spec, jensen_shannon)
