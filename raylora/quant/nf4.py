"""NF4: 4-bit NormalFloat weights through bitsandbytes (QLoRA, arXiv 2305.14314, section 3)."""

from __future__ import annotations

from typing import Any, Literal

from raylora.spec import QuantizationSpec


class Spec(QuantizationSpec):
    """4-bit weights, dequantized as they are multiplied; works on CPU and GPU."""

    kind: Literal["nf4"] = "nf4"
    double_quant: bool = True
    """Quantize the block scales too: 0.37 bits less per weight."""


def build(spec: Spec, compute_dtype: Any, skip_modules: list[str]) -> Any:
    """Return the quantization config that ``from_pretrained`` takes."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage="uint8",
        llm_int8_skip_modules=skip_modules,
    )
