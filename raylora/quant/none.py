"""The base as it comes: weights in the compute type."""

from __future__ import annotations

from typing import Any, Literal

from raylora.spec import QuantizationSpec


class Spec(QuantizationSpec):
    """No quantisation."""

    kind: Literal["none"] = "none"


def build(spec: Spec, compute_dtype: Any, skip_modules: list[str]) -> None:
    """Return what transformers is told about quantisation: nothing."""
    return None
