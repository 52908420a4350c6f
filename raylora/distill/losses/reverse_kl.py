"""The reverse KL to the teacher's mixture, which MiniLLM (arXiv 2306.08543) argues for."""

from __future__ import annotations

from typing import Literal

from raylora.distill.base import TemperedSpec
from raylora.distill.loss_functions import reverse_kl
from raylora.distill.losses.divergence import MixtureLoss


class Spec(TemperedSpec):
    """``a CE + (1 - a) T^2 KL(student || teacher)``: the student rather drops a class than invent one."""

    kind: Literal["reverse_kl"] = "reverse_kl"


def build(spec: Spec) -> MixtureLoss:
    """Return the loss that a spec describes."""
    return MixtureLoss(spec, reverse_kl)
