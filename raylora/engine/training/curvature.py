"""The curvature of a member's training loss over its LoRA matrices, diagonal or Kronecker-factored.

It is the Fisher information: of a row, ``J^T (diag(p) - p p^T) J`` with J the Jacobian of its logits and p its
probabilities. Labels are drawn from the model (the true Fisher, which for a softmax is the generalized Gauss-Newton
matrix), not read from the rows. It is summed over the training rows.

Shapes: N rows, C classes, O x I a matrix, T real tokens, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from raylora.adapters.base import Adapter, Site, Tensors
from raylora.adapters.lora import Lora
from raylora.data.task import Batch, Example
from raylora.engine.model.gang import Round
from raylora.engine.model.packed_forward import pass_pack
from raylora.engine.model.packed_model import StepTensors
from raylora.engine.training.logit_jacobians import LogitJacobians
from raylora.engine.training.predict import batches_by_length
from raylora.quant.gram import Gram

OnRows = Callable[[int], None]
"""Told of rows that are done; may raise to stop."""


@dataclass(frozen=True)
class Curvature:
    """A symmetric matrix over a member's LoRA matrices, as its eigenvalues and, by matrix, where its axes point.

    An axis of a matrix is ``u_O v_I^T``: what a matrix X (O x I) is along the axes is ``U^T X V``. Without factors the
    axes are the entries themselves.
    """

    eigenvalues: Tensors
    """By matrix, O x I in float64, none negative."""
    factors: Mapping[str, tuple[Tensor, Tensor]]
    """By matrix, U (O x O) and V (I x I) in float64; empty for a diagonal."""

    def rotated(self, name: str, jacobian: Tensor) -> Tensor:
        """Return a Jacobian ... x O x I along the axes, in float64."""
        jacobian = jacobian.double()
        if name not in self.factors:
            return jacobian
        left_OO, right_II = self.factors[name]
        return left_OO.T @ jacobian @ right_II

    @property
    def numbers(self) -> int:
        """How many numbers it takes."""
        axes = sum(u.numel() + v.numel() for u, v in self.factors.values())
        return axes + sum(values.numel() for values in self.eigenvalues.values())


def diagonal_curvature(
    jacobians: LogitJacobians, examples: Sequence[Example], batch: int, on_rows: OnRows
) -> Curvature:
    """Return the exact diagonal of the Fisher information, ``sum_n sum_c p_c (J_c - sum_d p_d J_d)^2``."""
    total = {name: torch.zeros(jacobians.member[name].shape, dtype=torch.float64) for name in jacobians.names}
    for indices in jacobians.batches(examples, batch):
        logits_NC, found = jacobians.of([examples[i] for i in indices])
        p_NC11 = logits_NC.softmax(dim=1)[:, :, None, None]
        for name, jacobian in found.items():
            centered = jacobian.double()
            centered = centered - (p_NC11 * centered).sum(dim=1, keepdim=True)
            total[name] += (p_NC11 * centered**2).sum(dim=(0, 1))
        on_rows(len(indices))
    return Curvature(total, {})


def kronecker_curvature(
    jacobians: LogitJacobians, examples: Sequence[Example], batch: int, on_rows: OnRows
) -> Curvature:
    """Return ``1/T (sum g g^T) x (sum a a^T)`` per LoRA matrix, its eigenvalues and axes.

    K-FAC for weights that a row's tokens share, in its "expand" form: tokens count as if they were rows (Martens and
    Grosse, arXiv 1503.05671; Eschenhagen et al., arXiv 2311.00636). a is what a matrix multiplies and g the
    gradient by what it gives, at each token; for one row of one token it is exact.
    """
    grams = _Grams(jacobians)
    for indices in batches_by_length(examples, batch):
        grams.add([examples[i] for i in indices])
        on_rows(len(indices))
    return grams.curvature()


class _Grams:
    """The Gram matrices of inputs and of output gradients, by LoRA matrix."""

    def __init__(self, jacobians: LogitJacobians) -> None:
        self.jacobians = jacobians
        self.recorder = _Recorder(cast(Lora, jacobians.model.adapter))  # a run with another kind is refused
        self.model = replace(jacobians.model, adapter=cast(Adapter, self.recorder))
        self.inputs = {name: Gram(jacobians.member[name].shape[1]) for name in jacobians.names}
        self.gradients = {name: Gram(jacobians.member[name].shape[0]) for name in jacobians.names}

    def add(self, examples: Sequence[Example]) -> None:
        """Add the tokens of some rows."""
        model, task = self.model, self.model.task
        batch = task.collate(examples, model.base.tokenizer).to(model.base.device)
        step = StepTensors(model, {n: t[None] for n, t in self.jacobians.member.items()})
        self.recorder.seen.clear()
        with model.base.round(Round.TRAIN):
            scores_NC = task.scores(pass_pack(model.base, task, step.pack, batch), batch)
            names, seen = list(self.recorder.seen), list(self.recorder.seen.values())
            for name, (inputs, _) in zip(names, seen, strict=True):
                self.inputs[name].add(_real(inputs, batch), name)
            with model.base.slot.use(step.pack):
                for cotangent_NC in _cotangents(scores_NC.detach()):
                    found = torch.autograd.grad(
                        scores_NC, [outputs for _, outputs in seen], cotangent_NC, retain_graph=True, allow_unused=True
                    )
                    for name, gradient in zip(names, found, strict=True):
                        if gradient is not None:
                            self.gradients[name].add(_real(gradient, batch), name)

    def curvature(self) -> Curvature:
        """Return what they make together."""
        eigenvalues: Tensors = {}
        factors = {}
        for name in self.jacobians.names:
            of_outputs_O, left_OO = torch.linalg.eigh(self.gradients[name].matrix_II)
            of_inputs_I, right_II = torch.linalg.eigh(self.inputs[name].matrix_II)
            product_OI = of_outputs_O.clamp(min=0)[:, None] * of_inputs_I.clamp(min=0)[None]
            eigenvalues[name], factors[name] = product_OI / self.inputs[name].rows, (left_OO, right_II)
        return Curvature(eigenvalues, factors)


class _Recorder(Lora):
    """LoRA as it is, which keeps what each of its matrices multiplies and gives."""

    def __init__(self, lora: Lora) -> None:
        super().__init__(lora.spec)
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def materialize(self, stacked: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Any]:
        """Return LoRA's pairs with their sites' names."""
        return {name: (name, *pair) for name, pair in super().materialize(stacked, sites).items()}

    def packed_delta(self, x_KNI: Tensor, at_site: Any) -> Tensor:
        """Return LoRA's change, in two products of which both sides are kept."""
        name, a_KIR, b_KRO = at_site
        h_KNR = torch.bmm(x_KNI, a_KIR.to(x_KNI.dtype))
        scaled_KNR = h_KNR * self.scale
        y_KNO = torch.bmm(scaled_KNR, b_KRO.to(x_KNI.dtype))
        self.seen[f"{name}.lora_A"] = x_KNI, h_KNR
        self.seen[f"{name}.lora_B"] = scaled_KNR, y_KNO
        return y_KNO


def _cotangents(logits_NC: Tensor) -> list[Tensor]:
    """Return C cotangents, N x C each, with ``sum_c v_c v_c^T = diag(p) - p p^T``: ``v_c = sqrt(p_c) (e_c - p)``."""
    p_NC = logits_NC.double().softmax(dim=1)
    one_CC = torch.eye(p_NC.shape[1], dtype=torch.float64, device=p_NC.device)
    return [(p_NC[:, c : c + 1].sqrt() * (one_CC[c] - p_NC)).to(logits_NC.dtype) for c in range(p_NC.shape[1])]


def _real(values_KND: Tensor, batch: Batch) -> Tensor:
    """Return the values at real tokens; where a layer sees one position per row, at all."""
    mask_BT = batch.attention_mask_BT
    values_ND = values_KND.detach().flatten(0, 1)
    return values_ND[mask_BT.flatten().bool()] if len(values_ND) == mask_BT.numel() else values_ND
