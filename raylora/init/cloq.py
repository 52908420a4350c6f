"""CLoQ: the rank-R pair that best undoes a layer's quantization error on calibration inputs (arXiv 2501.18475).

With D = W - Q (O x I), H = X^T X + damping and any root G, G^T G = H, the paper takes the SVD G D^T = P Z V^T:

    min over A, B  ||X (D - B A)^T||_F   at   A^T = G^-1 P_R Z_R,  B = V_R   with error sqrt(sum over i > R of z_i^2)

Since G D^T V = P Z, this A^T is D^T V_R: the optimum projects D's outputs on V_R, the top eigenvectors of D H D^T
(O x O). So no root is taken and nothing is inverted, and a singular H needs no special care. Where O > I, D = Q_D R_D
turns the eigenproblem into that of R_D H R_D^T (I x I).

The pair's product is the change itself: divide by a LoRA's alpha / R before loading it into one.

Shapes: O outputs, I inputs, R rank, K directions of a sketch, S the smaller of O and I.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from raylora.errors import BaseError
from raylora.init.factors import check_rank
from raylora.spec import CompensationSpec

Split = Literal["right", "balanced", "left"]
Method = Literal["exact", "fast"]
_OVERSAMPLING = 8
_PRODUCTS = 4


def cloq(
    residual_OI: Tensor, gram_II: Tensor, rank: int, damping: float = 0.01, split: Split = "right",
    method: Method = "exact", seed: int = 0, name: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Return (A_RI, B_OR) in float32 with B A closest to the residual on the calibration inputs.

    ``split`` says which factor carries the singular values Z, in the norm of G: ``right`` A (the paper's default, B
    orthonormal), ``left`` B, ``balanced`` sqrt(Z) each; the products are equal. Z grows with the square root of the
    calibration rows, so for the other two divide the Gram by them. ``exact`` decomposes in float64; ``fast`` finds the
    eigenvectors from seeded random ones, nearly. ``damping`` is relative to mean(diag H); 0 is allowed, for any H.
    Directions that calibration never saw (z = 0) are left out. Raise BaseError for a rank beyond the smaller side,
    shapes that do not fit and entries that are not finite.
    """
    _check(residual_OI, gram_II, rank, name)
    d_OI, h_II = residual_OI.detach().double(), damped(gram_II, damping)
    eigen = _top_eigen_exact(d_OI, h_II) if method == "exact" else _top_eigen_fast(d_OI, h_II, rank, seed)
    square_R, v_OR = eigen[0][:rank], eigen[1][:, :rank]
    seen_R = square_R > eigen[0][0] * torch.finfo(torch.float64).eps * max(d_OI.shape)
    z_R = torch.where(seen_R, square_R, 1.0).sqrt()
    to_b_R = z_R ** {"right": 0.0, "balanced": 0.5, "left": 1.0}[split]
    a_RI = v_OR.T @ d_OI * (seen_R / to_b_R)[:, None]
    return a_RI.float(), (v_OR * (seen_R * to_b_R)).float()


class Spec(CompensationSpec):
    """The pair that leaves the least error on the calibration data, in closed form."""

    kind: Literal["cloq"] = "cloq"
    damping: float = Field(default=0.01, ge=0)
    """Added to the diagonal of the Gram matrix, relative to its mean."""
    split: Split = "right"
    """Which factor carries the singular values: ``right`` is A (the paper's), ``left`` B, ``balanced`` both."""
    method: Method = "exact"
    """``exact`` decomposes in float64; ``fast`` finds the leading directions from seeded random ones, nearly."""


class Cloq:
    """Quantize, then compensate what was lost."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def solve(
        self, weight_OI: Tensor, quantize: Callable[[Tensor], Any], gram_II: Tensor, name: str
    ) -> tuple[Any, Tensor, Tensor]:
        """Return (Q, A_RI, B_OR); D is the weight as it was, not as MagR left it, minus Q."""
        quantized = quantize(weight_OI)
        residual_OI = weight_OI.double() - quantized.dequantize().double()
        spec = self.spec
        a_RI, b_OR = cloq(
            residual_OI, gram_II, spec.rank, spec.damping, split=spec.split, method=spec.method, name=name
        )
        return quantized, a_RI, b_OR


def build(spec: Spec) -> Cloq:
    """Return the method for a spec."""
    return Cloq(spec)


def calibration_error(residual_OI: Tensor, gram_II: Tensor) -> float:
    """Return ||X D^T||_F = sqrt(tr(D H D^T)), computed in float64; the residual may be D - B A as well."""
    d_OI = residual_OI.detach().double()
    return float(((d_OI @ gram_II.double()) * d_OI).sum().clamp_(min=0).sqrt())


def optimal_error(residual_OI: Tensor, gram_II: Tensor, rank: int, damping: float = 0.0) -> float:
    """Return what the best pair leaves of it, sqrt(sum over i > R of z_i^2); with damping, in the damped norm."""
    _check(residual_OI, gram_II, rank, "layer")
    square_S, _ = _top_eigen_exact(residual_OI.detach().double(), damped(gram_II, damping))
    return float(square_S[rank:].sum().sqrt())


def damped(gram_II: Tensor, damping: float) -> Tensor:
    """Return H + damping * mean(diag H) * I in float64, or damping * I where H is zero altogether."""
    gram_II = gram_II.double()
    mean = float(gram_II.diagonal().mean())
    added = torch.full_like(gram_II.diagonal(), damping * (mean if mean > 0 else 1.0))
    return gram_II + torch.diag(added)


def _top_eigen_exact(d_OI: Tensor, h_II: Tensor) -> tuple[Tensor, Tensor]:
    """Return all S eigenvalues of D H D^T that can differ from 0, largest first, and their vectors (O x S)."""
    outputs, inputs = d_OI.shape
    if outputs <= inputs:
        return _eigen(d_OI, h_II)
    basis_OS, d_SI = torch.linalg.qr(d_OI)
    square_S, v_SS = _eigen(d_SI, h_II)
    return square_S, basis_OS @ v_SS


def _top_eigen_fast(d_OI: Tensor, h_II: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the K largest eigenvalues of D H D^T, nearly, and their vectors (O x K), K at least R.

    A randomised block Krylov method (arXiv 1504.05477, algorithm 2): like subspace iteration it multiplies a few times
    with D H D^T, which is one power iteration of a randomised SVD of G D^T, but it keeps every product. What OPTQ
    leaves has a flat spectrum, where the last product alone misses several per cent of the reduction.
    """
    size = min(rank + _OVERSAMPLING, *d_OI.shape)
    if size * _PRODUCTS >= min(d_OI.shape):  # nothing to save
        return _top_eigen_exact(d_OI, h_II)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(len(d_OI), size, generator=generator, dtype=torch.float64).to(d_OI.device)
    blocks = []
    for _ in range(_PRODUCTS):
        block, _ = torch.linalg.qr(d_OI @ (h_II @ (d_OI.T @ block)))
        blocks.append(block)
    basis_OK, _ = torch.linalg.qr(torch.cat(blocks, 1))
    square_K, v_KK = _eigen(basis_OK.T @ d_OI, h_II)
    return square_K, basis_OK @ v_KK


def _eigen(d_OI: Tensor, h_II: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of D H D^T, largest first and none below 0, and the eigenvectors."""
    square_O, v_OO = torch.linalg.eigh(d_OI @ h_II @ d_OI.T)
    return square_O.flip(0).clamp_(min=0), v_OO.flip(1)


def _check(residual_OI: Tensor, gram_II: Tensor, rank: int, name: str) -> None:
    outputs, inputs = residual_OI.shape
    if tuple(gram_II.shape) != (inputs, inputs):
        raise BaseError(f"{name}: {inputs} inputs, and a Gram matrix of {tuple(gram_II.shape)}")
    check_rank(rank, outputs, inputs, name)
    for what, tensor in (("residual", residual_OI), ("Gram matrix", gram_II)):
        if not bool(torch.isfinite(tensor).all()):
            raise BaseError(f"{name}: the {what} has NaN or infinite entries")
