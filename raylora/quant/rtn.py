"""Round to nearest: the baseline that looks at no data.

Shapes: O outputs, I inputs, G groups per row.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raylora.quant.gram import Factor
from raylora.quant.grid import check_weight, fit_grid, to_codes
from raylora.quant.on_grid import OnGrid
from raylora.quant.quantized import Quantized
from raylora.spec import GridSpec


class Spec(GridSpec):
    """Every weight at the nearest point of its group's grid."""

    kind: Literal["rtn"] = "rtn"
    shrink: float = Field(default=1.0, gt=0, le=1)
    """Multiplies both ends of a group's range: clips a few weights for a finer grid."""


def round_to_nearest(
    weight_OI: Tensor, bits: int, group_size: int, shrink: float = 1.0, name: str = "weight"
) -> Quantized:
    """Return the weight with every entry at the nearest point of its group's grid.

    Raise BaseError for unsupported bits or group sizes, and for entries that are not finite.
    """
    check_weight(weight_OI, name)
    scales_OG, zeros_OG = fit_grid(weight_OI, bits, group_size, shrink, name)
    inputs = weight_OI.shape[1]
    scales_OI, zeros_OI = (each.repeat_interleave(group_size, 1)[:, :inputs].float() for each in (scales_OG, zeros_OG))
    codes_OI = to_codes(weight_OI.float(), scales_OI, zeros_OI, bits).to(torch.uint8)
    return Quantized.of_codes(codes_OI, scales_OG, zeros_OG, bits, group_size)


class RoundToNearest(OnGrid[Spec]):
    """Rounds every weight on its own."""

    def quantize(self, weight_OI: Tensor, factor: Factor | None, name: str) -> Quantized:
        """Return the nearest codes; what is known of the inputs is not looked at. Raises: BaseError."""
        group_size = self.spec.group_of(weight_OI.shape[1])
        return round_to_nearest(weight_OI, self.spec.bits, group_size, self.spec.shrink, name)


def build(spec: Spec) -> RoundToNearest:
    """Return the quantizer for a spec."""
    return RoundToNearest(spec)
