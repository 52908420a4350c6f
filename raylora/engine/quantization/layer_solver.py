"""One group of linear layers with a common input: quantized, compensated, and measured on its calibration data.

A pure function of weights, Gram matrix and spec, so groups can be solved anywhere and in any order.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raylora import registry
from raylora.engine.model.quantized_layers import Solved
from raylora.init.cloq import calibration_error, optimal_error
from raylora.quant.base import PreparedQuantizer
from raylora.quant.gram import Factor
from raylora.quant.quantized import Quantized
from raylora.spec import CompensationSpec, GridSpec


@dataclass(frozen=True)
class GroupJob:
    """Linears that read the same input, and what is known of it."""

    weights_OI: dict[str, Tensor]
    gram_II: Tensor | None
    """None where nothing was calibrated."""
    quantization: GridSpec
    compensation: CompensationSpec | None = None
    cross_II: Tensor | None = None
    """Of those inputs with what the full model has in their place, where a method compares with it."""


Solve = Callable[[Sequence[GroupJob]], list[list[Solved]]]
"""Solves groups, perhaps in parallel, and returns their layers in the groups' order."""


def solve_here(jobs: Sequence[GroupJob]) -> list[list[Solved]]:
    """Solve groups in this process, one after another."""
    return [solve_group(job) for job in jobs]


def solve_group(job: GroupJob) -> list[Solved]:
    """Quantize every linear of a group and compute its pair; what depends on the input alone is factored once.

    Raises:
        BaseError: naming the layer, for weights or inputs that are not finite.
    """
    names = "/".join(job.weights_OI)
    factor = Factor(job.gram_II, getattr(job.quantization, "damping", 0.01), names) if job.gram_II is not None else None
    quantizer: PreparedQuantizer = registry.load("quantization", job.quantization.kind).build(job.quantization)
    method = None
    if job.compensation is not None:
        method = registry.load("compensation", job.compensation.kind).build(job.compensation)
    solved = []
    for name, weight in job.weights_OI.items():
        started = time.perf_counter()
        weight_OI = weight.float()

        def quantize(changed_OI: Tensor, name: str = name) -> Quantized:
            return quantizer.quantize(changed_OI, factor, name)

        pair: tuple[Tensor, Tensor] | None = None
        if method is None:
            quantized = quantize(weight_OI)
        else:
            assert factor is not None
            towards = {} if job.cross_II is None else {"cross_II": job.cross_II}
            quantized, a_RI, b_OR = method.solve(weight_OI, quantize, factor.gram_II, name, **towards)
            pair = compact(a_RI), compact(b_OR)
        seconds = time.perf_counter() - started
        errors = errors_of(weight_OI, quantized, pair, factor) if factor is not None else {}
        solved.append(Solved(name, quantized, pair, errors, seconds))
    return solved


def compact(factor: Tensor) -> Tensor:
    """Return a factor as it is stored: float16, or float32 if it does not fit."""
    half = factor.to(torch.float16)
    return half if bool(torch.isfinite(half).all()) else factor.to(torch.float32)


def errors_of(
    weight_OI: Tensor, quantized: Quantized, pair: tuple[Tensor, Tensor] | None, factor: Factor
) -> dict[str, float]:
    """Return ``||X M^T||_F`` on the damped calibration data, for M = the weight, its quantization error, what is left.

    ``svd`` is what a truncated SVD of the same error would leave, which does not look at the data (as LoftQ's last
    step), and ``theory`` the least that any pair of the rank could leave (arXiv 2501.18475, theorem 3.1).
    """
    h_II = factor.damped_II
    residual_OI = weight_OI.double() - quantized.dequantize().double()
    found = {
        "weight": calibration_error(weight_OI.double(), h_II),
        "quantized": calibration_error(residual_OI, h_II),
    }
    if pair is not None:
        a_RI, b_OR = (each.double() for each in pair)
        rank = len(a_RI)
        found["compensated"] = calibration_error(residual_OI - b_OR @ a_RI, h_II)
        found["svd"] = calibration_error(_without_largest(residual_OI, rank), h_II)
        found["theory"] = optimal_error(residual_OI, h_II, rank)
    return found


def _without_largest(residual_OI: Tensor, rank: int) -> Tensor:
    """Return D without its ``rank`` largest singular directions, by eigenvectors of its smaller side."""
    wide = residual_OI.shape[0] <= residual_OI.shape[1]
    side = residual_OI @ residual_OI.T if wide else residual_OI.T @ residual_OI
    vectors = torch.linalg.eigh(side).eigenvectors[:, -rank:]
    return residual_OI - (vectors @ (vectors.T @ residual_OI) if wide else (residual_OI @ vectors) @ vectors.T)


def layer_tensors(solved: Solved) -> dict[str, Tensor]:
    """Return a layer's tensors under the names they are stored by."""
    parts: dict[str, Any] = solved.quantized.to_tensors()
    if solved.pair is not None:
        parts |= {"pair_A": solved.pair[0], "pair_B": solved.pair[1]}
    return {f"{solved.name}|{key}": tensor.contiguous().cpu() for key, tensor in parts.items()}
