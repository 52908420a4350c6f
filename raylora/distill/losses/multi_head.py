"""One student head per teacher member: the members' disagreement survives in the heads (Hydra, arXiv 2001.04694).

Shapes: B examples, M teacher members, H heads, C classes. A student's outputs are H blocks of C, head 0 first.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raylora.distill.base import TemperedSpec
from raylora.distill.loss_functions import kd_loss, softened
from raylora.distill.uncertainty import of_heads
from raylora.errors import SpecError


class Spec(TemperedSpec):
    """The mean over heads of ``a CE(z_h, y) + (1 - a) T^2 KL(softmax(z_m / T) || softmax(z_h / T))``, m = h mod M."""

    kind: Literal["multi_head"] = "multi_head"
    heads: int = Field(default=5, ge=1)
    """At least as many as the teacher has members; a multiple of M keeps them equally weighted."""


class MultiHead:
    """Each head is trained as its member was, labels included; only the body is shared."""

    teaches = "classes"
    reinterprets_logits = False

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def outputs(self, num_labels: int) -> int:
        """Return H * C."""
        return self.spec.heads * num_labels

    def per_example(self, student_outputs: Tensor, targets: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss B of student_outputs B x (H C) against the members' logits B x M x C.

        Raises:
            SpecError: there are fewer heads than members, some of whom would not be used.
        """
        heads, members = self.spec.heads, targets.shape[1]
        if heads < members:
            raise SpecError(
                f"{heads} heads for {members} teacher members, and the last {members - heads} would not be used",
                f"set heads to {members}, or use kind kl, which learns the mean of all members",
            )
        member_of_H = torch.arange(heads, device=targets.device) % members
        teacher_logp_BHC = softened(targets[:, member_of_H], self.spec.temperature)
        logits_BHC = self._by_head(student_outputs)
        of_each = kd_loss(
            logits_BHC.flatten(0, 1),
            teacher_logp_BHC.flatten(0, 1),
            None if labels is None else labels.repeat_interleave(heads),
            self.spec.temperature,
            self.spec.task_weight,
        )
        return of_each.view(-1, heads).mean(dim=1)

    def predict(self, student_outputs: Tensor) -> dict[str, Tensor]:
        """Return the heads' mixture, its entropy, and the split into the heads' own and their disagreement."""
        return of_heads(self._by_head(student_outputs))

    def _by_head(self, outputs_BO: Tensor) -> Tensor:
        return outputs_BO.unflatten(1, (self.spec.heads, -1))


def build(spec: Spec) -> MultiHead:
    """Return the loss that a spec describes."""
    return MultiHead(spec)
