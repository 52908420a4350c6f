"""A quantized weight: packed codes, a float16 scale and an integer zero point per group.

Shapes: O outputs, I inputs, G groups per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.errors import BaseError
from raylora.quant.grid import group_count
from raylora.quant.kernels import dequantize
from raylora.quant.packing import check_bits, pack_codes, packed_bytes


@dataclass(frozen=True, eq=False)
class Quantized:
    """weight_OI = (code - zero) * scale; raise BaseError if the tensors do not belong together."""

    bits: int
    group_size: int
    """Inputs that share a scale; the inputs themselves (or more) for one group per row."""
    shape: tuple[int, int]
    codes: Tensor
    """uint8, O x bytes of a row."""
    scales_OG: Tensor
    """float16."""
    zeros: Tensor
    """uint8, the O * G zero points packed in one run."""

    def __post_init__(self) -> None:
        check_bits(self.bits)
        outputs, inputs = self.shape
        groups = group_count(inputs, self.group_size)
        expected = {
            "codes": (torch.uint8, (outputs, packed_bytes(inputs, self.bits))),
            "scales_OG": (torch.float16, (outputs, groups)),
            "zeros": (torch.uint8, (packed_bytes(outputs * groups, self.bits),)),
        }
        for key, (dtype, shape) in expected.items():
            tensor: Tensor = getattr(self, key)
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                raise BaseError(
                    f"{key} is {tensor.dtype} of {tuple(tensor.shape)}, and a {outputs} x {inputs} weight at "
                    f"{self.bits} bits in groups of {self.group_size} needs {dtype} of {shape}"
                )

    @classmethod
    def of_codes(cls, codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, bits: int, group_size: int) -> Quantized:
        """Return codes and zero points (uint8, one each) packed."""
        outputs, inputs = codes_OI.shape
        codes, zeros = pack_codes(codes_OI, bits), pack_codes(zeros_OG.flatten(), bits)
        return cls(bits, group_size, (outputs, inputs), codes, scales_OG, zeros)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], bits: int, group_size: int, shape: tuple[int, int]
    ) -> Quantized:
        """Return what :meth:`to_tensors` took apart."""
        return cls(bits, group_size, shape, tensors["codes"], tensors["scales_OG"], tensors["zeros"])

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what has to be stored beside ``bits``, ``group_size`` and ``shape``."""
        return {"codes": self.codes, "scales_OG": self.scales_OG, "zeros": self.zeros}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight, O x I: exact in float32, rounded once in a narrower type."""
        return dequantize(self.codes, self.scales_OG, self.zeros, self.bits, self.group_size, self.shape, dtype)

    @property
    def size_bytes(self) -> int:
        """What the stored tensors take, scales and zero points included."""
        return sum(tensor.nbytes for tensor in self.to_tensors().values())
