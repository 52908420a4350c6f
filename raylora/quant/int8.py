"""INT8: 8-bit weights with outlier columns kept in 16 bits, through bitsandbytes (arXiv 2208.07339)."""

from __future__ import annotations

from typing import Any, Literal

from raylora.spec import QuantizationSpec


class Spec(QuantizationSpec):
    """8-bit weights; activations are quantized row by row as they are multiplied."""

    kind: Literal["int8"] = "int8"
    threshold: float = 6.0
    """Activations beyond this stay in 16 bits."""


def build(spec: Spec, compute_dtype: Any, skip_modules: list[str]) -> Any:
    """Return the quantization config that ``from_pretrained`` takes."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=spec.threshold, llm_int8_skip_modules=skip_modules
    )
