"""The ``laplace`` baseline: fit a Gaussian over member 0's matrices on the training rows, and predict every set by it.

Nothing but the predictions is kept: the same rows and the same member give the same Gaussian again, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.adapters.base import Tensors
from raylora.data.task import Example
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.training.curvature import diagonal_curvature, kronecker_curvature
from raylora.engine.training.laplace import Posterior, best_precision, draw_logits
from raylora.engine.training.logit_jacobians import LogitJacobians
from raylora.records import BaselineCost, LaplaceFit
from raylora.spec.baselines import LaplaceSpec

OnRows = Callable[[int], None]


@dataclass(frozen=True)
class FittedLaplace:
    """The Gaussian, and what it takes to ask it."""

    spec: LaplaceSpec
    jacobians: LogitJacobians
    posterior: Posterior
    fit_s: float

    @classmethod
    def on(
        cls, spec: LaplaceSpec, model: PackedModel, member: Tensors, train: Sequence[Example], batch: int,
        on_rows: OnRows,
    ) -> FittedLaplace:
        """Return the Gaussian around a trained member.

        Args:
            train: all training rows, each once, whatever order or bootstrap the member saw them in.
            batch: rows of a forward pass.
            on_rows: told of rows that are done.

        Raises:
            TrainingError: the rows say nothing of the member's matrices.
        """
        started = time.perf_counter()
        jacobians = LogitJacobians(model, member)
        curvature_of = diagonal_curvature if spec.structure == "diagonal" else kronecker_curvature
        curvature = curvature_of(jacobians, train, batch, on_rows)
        squared_norm = sum(float(member[name].double().square().sum()) for name in jacobians.names)
        precision = spec.prior_precision or best_precision(curvature, squared_norm)
        return cls(spec, jacobians, Posterior(curvature, precision), time.perf_counter() - started)

    def predict(self, examples: Sequence[Example], batch: int, seed: int, on_rows: OnRows) -> Tensor:
        """Return draws of each row's logits, S x N x C in float32."""
        found: dict[int, Tensor] = {}
        for indices in self.jacobians.batches(examples, batch):
            chosen = [examples[i] for i in indices]
            logits_NC, jacobian = self.jacobians.of(chosen)
            covariance_NCC = self.posterior.covariance(jacobian)
            drawn_SNC = draw_logits(logits_NC, covariance_NCC, [one.id for one in chosen], seed, self.spec.samples)
            found |= {index: drawn_SNC[:, position] for position, index in enumerate(indices)}
            on_rows(len(indices))
        return torch.stack([found[i] for i in range(len(examples))], dim=1)

    def facts(self) -> LaplaceFit:
        """Return what was fitted."""
        return {
            "structure": self.spec.structure, "prior_precision": self.posterior.precision,
            "determined": self.posterior.determined,
            "matrices_numbers": sum(one.numel() for one in self.posterior.curvature.eigenvalues.values()),
        }

    def cost(self, predict_s: float) -> BaselineCost:
        """Return what it took."""
        return {"fit_s": self.fit_s, "predict_s": predict_s, "stored_numbers": self.posterior.curvature.numbers}
