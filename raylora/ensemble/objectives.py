"""What weights are fitted by: the NLL of validation rows as a function of the members' weights.

Each is convex in the weights, with its derivatives: of the mixture of probabilities, of the product of experts that
mean logits are, and of a regression's mixture, whose one noise is fitted anew for every weighting.

Shapes: M members, N rows (or tokens), C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raylora.ensemble.gaussian import fit_noise, log_density


@dataclass(frozen=True)
class Derivatives:
    """The NLL's first and second derivatives by the weights."""

    gradient_M: Tensor
    hessian_MM: Tensor


class Objective(Protocol):
    """The mean NLL of some rows."""

    @property
    def members(self) -> int:
        """Return M."""

    def nll(self, weights_M: Tensor) -> float:
        """Return the mean NLL with these weights, which are not negative and one in all."""

    def derivatives(self, weights_M: Tensor) -> Derivatives:
        """Return the derivatives there; a regression's at the noise of :meth:`at`."""

    def at(self, weights_M: Tensor) -> Objective:
        """Return the convex function to minimize near these weights: with whatever is fitted beside them held fixed."""

    def of(self, members: Sequence[int]) -> Objective:
        """Return the same of some of the members."""

    def alike(self) -> list[int]:
        """Return of each member the first that says just the same of every row; itself where none does."""


@dataclass(frozen=True, eq=False)
class MixtureNLL:
    """``-1/N sum_n log sum_m w_m p_m(y_n)``."""

    logp_MN: Tensor
    """Log-probability, or log-density, of each row's label under each member, float64."""

    @property
    def members(self) -> int:
        """Return M."""
        return len(self.logp_MN)

    def nll(self, weights_M: Tensor) -> float:
        """Return the mean NLL."""
        return -float(torch.logsumexp(self.logp_MN + weights_M.log()[:, None], dim=0).mean())

    def derivatives(self, weights_M: Tensor) -> Derivatives:
        """Return ``-mean_n r_mn`` and ``mean_n r_mn r_kn`` with ``r_mn = p_m(y_n) / sum_k w_k p_k(y_n)``."""
        ratio_MN = (self.logp_MN - torch.logsumexp(self.logp_MN + weights_M.log()[:, None], dim=0)).exp()
        return Derivatives(-ratio_MN.mean(dim=1), ratio_MN @ ratio_MN.T / ratio_MN.shape[1])

    def at(self, weights_M: Tensor) -> MixtureNLL:
        """Return itself."""
        return self

    def of(self, members: Sequence[int]) -> MixtureNLL:
        """Return the same of some of the members."""
        return MixtureNLL(self.logp_MN[list(members)])

    def alike(self) -> list[int]:
        """Return of each member the first that says just the same."""
        return first_alike(self.logp_MN)


@dataclass(frozen=True, eq=False)
class LogitsNLL:
    """``-1/N sum_n log softmax_y(sum_m w_m z_m)``: the weighted mean of the members' log-probabilities."""

    logp_MNC: Tensor
    """float64"""
    labels_N: Tensor

    @property
    def members(self) -> int:
        """Return M."""
        return len(self.logp_MNC)

    def _pooled(self, weights_M: Tensor) -> Tensor:
        return torch.log_softmax(torch.tensordot(weights_M, self.logp_MNC, dims=1), dim=-1)

    def nll(self, weights_M: Tensor) -> float:
        """Return the mean NLL."""
        return -float(self._pooled(weights_M).gather(1, self.labels_N[:, None]).mean())

    def derivatives(self, weights_M: Tensor) -> Derivatives:
        """Return ``mean_n (E_p z_m - z_m(y))`` and ``mean_n Cov_p(z_m, z_k)`` under the pooled p."""
        p_NC = self._pooled(weights_M).exp()
        expected_MN = (self.logp_MNC * p_NC).sum(dim=-1)
        own_MN = self.logp_MNC.gather(2, self.labels_N.expand(self.members, -1)[..., None])[..., 0]
        centered_MNC = (self.logp_MNC - expected_MN[..., None]) * p_NC.sqrt()
        flat_MF = centered_MNC.flatten(1)
        return Derivatives((expected_MN - own_MN).mean(dim=1), flat_MF @ flat_MF.T / len(p_NC))

    def at(self, weights_M: Tensor) -> LogitsNLL:
        """Return itself."""
        return self

    def of(self, members: Sequence[int]) -> LogitsNLL:
        """Return the same of some of the members."""
        return LogitsNLL(self.logp_MNC[list(members)], self.labels_N)

    def alike(self) -> list[int]:
        """Return of each member the first that says just the same."""
        return first_alike(self.logp_MNC)


@dataclass(frozen=True, eq=False)
class ValueNLL:
    """``-1/N sum_n log sum_m w_m N(y_n; v_m, s^2)`` with the s that fits the weights best."""

    values_MN: Tensor
    labels_N: Tensor

    @property
    def members(self) -> int:
        """Return M."""
        return len(self.values_MN)

    def nll(self, weights_M: Tensor) -> float:
        """Return the mean NLL; members without weight do not bear on the noise."""
        kept_M = weights_M > 0
        return fit_noise(self.values_MN[kept_M], self.labels_N, weights_M[kept_M]).nll

    def derivatives(self, weights_M: Tensor) -> Derivatives:
        """Return those of :meth:`at`."""
        return self.at(weights_M).derivatives(weights_M)

    def at(self, weights_M: Tensor) -> MixtureNLL:
        """Return the NLL at the noise that fits these weights best."""
        kept_M = weights_M > 0
        noise = fit_noise(self.values_MN[kept_M], self.labels_N, weights_M[kept_M])
        return MixtureNLL(log_density(self.values_MN, self.labels_N, noise.std))

    def of(self, members: Sequence[int]) -> ValueNLL:
        """Return the same of some of the members."""
        return ValueNLL(self.values_MN[list(members)], self.labels_N)

    def alike(self) -> list[int]:
        """Return of each member the first that says just the same."""
        return first_alike(self.values_MN)


def first_alike(said_MN: Tensor) -> list[int]:
    """Return of each member the first whose numbers are bit for bit its own."""
    found: list[int] = []
    for m, own_N in enumerate(said_MN):
        found.append(next((k for k in sorted(set(found)) if torch.equal(said_MN[k], own_N)), m))
    return found
