"""The Gram matrix H = X^T X of a layer's calibration inputs, and what is factored from it once.

H is all that OPTQ, MagR and CLoQ need to know of the data, so X is summed up as it streams by and never stored.

Shapes: N rows, I inputs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from raylora.errors import BaseError

_ROWS_AT_ONCE = 1024
"""Few enough that a float32 sum of products stays good to six digits; then float64 takes over."""


class Gram:
    """X^T X, undamped and not divided by the rows, summed over batches."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.rows = 0
        self._sum_II = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)

    @property
    def matrix_II(self) -> Tensor:
        """H in float64, exactly symmetric."""
        return (self._sum_II + self._sum_II.T) / 2

    def add(self, x: Tensor, name: str = "layer") -> None:
        """Add the rows of x (... x I, any float type); raise BaseError if they do not fit, or are not finite.

        A batch that is refused may have been added in part.
        """
        x_NI = x.detach().reshape(-1, x.shape[-1])
        if x_NI.shape[1] != len(self._sum_II):
            raise BaseError(f"{name}: inputs of width {x_NI.shape[1]} for a Gram matrix of {len(self._sum_II)}")
        for part_NI in x_NI.split(_ROWS_AT_ONCE):
            part_NI = part_NI.to(self._sum_II.device, torch.float32)
            product_II = part_NI.T @ part_NI
            if not bool(torch.isfinite(product_II.diagonal()).all()):  # the diagonal meets every entry
                raise BaseError(
                    f"{name}: calibration inputs have NaN or infinite entries, or overflow",
                    "run the calibration in float32 or bfloat16, and check the model's own output",
                )
            self._sum_II += product_II
            self.rows += len(part_NI)


class Cross:
    """X'^T X of the same rows in two models, summed over batches as :class:`Gram` does."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.matrix_II = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)

    def add(self, x_NI: Tensor, other_NI: Tensor) -> None:
        """Add rows x_NI of the first model and the same rows of the second."""
        for part_NI, own_NI in zip(x_NI.split(_ROWS_AT_ONCE), other_NI.split(_ROWS_AT_ONCE), strict=True):
            self.matrix_II += part_NI.to(self.matrix_II.device, torch.float32).T @ own_NI.to(
                self.matrix_II.device, torch.float32
            )


def damped(gram_II: Tensor, damping: float) -> Tensor:
    """Return H + damping * mean(diag H) * I in float64, or damping * I where H is zero altogether."""
    gram_II = gram_II.double()
    mean = float(gram_II.diagonal().mean())
    added = torch.full_like(gram_II.diagonal(), damping * (mean if mean > 0 else 1.0))
    return gram_II + torch.diag(added)


class Factor:
    """What OPTQ needs of a Gram matrix, computed when first asked for and shared by all layers with that input."""

    def __init__(self, gram_II: Tensor, damping: float = 0.01, name: str = "layer") -> None:
        self.gram_II, self.damping, self.name = gram_II, damping, name

    @functools.cached_property
    def dead_I(self) -> Tensor:
        """True for inputs that were always zero: no weight there was ever used."""
        return self.gram_II.diagonal() == 0

    @functools.cached_property
    def damped_II(self) -> Tensor:
        """H + damping * mean(diag H) * I, float64."""
        return damped(self.gram_II, self.damping)

    @functools.cached_property
    def inverse_root_II(self) -> Tensor:
        """The upper triangular U with U^T U = (damped H)^-1, float64: the Cholesky factor of the inverse.

        With J the reversal, J H J = L L^T gives H = M M^T with M = J L J upper triangular, hence U = M^-1: one Cholesky
        factor and one triangular inverse, where the textbook takes two factors and a full inverse. A dead input is
        tied to no other, so its diagonal may be anything but zero. Raise BaseError for a matrix that is singular.
        """
        matrix_II = self.damped_II + torch.diag((self.damped_II.diagonal() == 0).double())
        lower_II, failed = torch.linalg.cholesky_ex(matrix_II.flip(0, 1))
        if int(failed) or not bool(torch.isfinite(lower_II).all()):
            raise BaseError(
                f"{self.name}: the calibration inputs do not span its input space (damping {self.damping:g})",
                "use a damping above 0, such as 0.01, or more calibration rows",
            )
        identity_II = torch.eye(len(lower_II), dtype=torch.float64, device=lower_II.device)
        return torch.linalg.solve_triangular(lower_II.flip(0, 1), identity_II, upper=True)
