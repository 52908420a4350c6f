"""The base as it comes: weights in the compute type."""

from __future__ import annotations

from typing import Any, Literal

from raylora.spec import QuantizationSpec


class Spec(QuantizationSpec):
    """No quantization."""

    kind: Literal["none"] = "none"


def build(spec: Spec, compute_dtype: Any, skip_modules: list[str]) -> None:
    """Return what transformers is told about quantization: nothing."""
    return None
