"""Kubernetes' quantities, such as ``12Gi`` and ``500m``."""

from __future__ import annotations

import math
import re

_UNITS = {
    "": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30,
    "Ti": 2.0**40,
}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")


def amount(quantity: object) -> float | None:
    """Return what a quantity comes to, in bytes or cores; None if it is none."""
    match = _QUANTITY.fullmatch(str(quantity))
    return float(match[1]) * _UNITS[match[2] or ""] if match else None


def gibibytes(size_bytes: float) -> str:
    """Return the quantity of whole GiB that holds so many bytes."""
    return f"{max(1, math.ceil(size_bytes / 2**30))}Gi"
