"""How a pair's product is shared out between its factors, against float64, and against a LoRA that starts from none."""

from __future__ import annotations

import torch

from raylora import registry
from raylora.adapters.base import Site
from raylora.init.factors import FRESH_LENGTH, as_fresh, as_solved


def pair(outputs: int = 40, inputs: int = 48, rank: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales_R = torch.tensor([1e-4, 0.1, 1.0, 30.0, 2e3])
    a_RI = torch.randn(rank, inputs, generator=generator) * scales_R[:, None]
    return a_RI, torch.randn(outputs, rank, generator=generator) / scales_R


def test_the_product_stays_and_rows_are_as_long_as_a_fresh_lora_s() -> None:
    a_RI, b_OR = pair()
    found_RI, found_OR = as_fresh(a_RI, b_OR)
    product_OI = b_OR.double() @ a_RI.double()
    torch.testing.assert_close(found_OR.double() @ found_RI.double(), product_OI, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_RI.norm(dim=1), torch.full((5,), FRESH_LENGTH))
    assert as_solved(a_RI, b_OR) == (a_RI, b_OR)


def test_the_lengths_that_the_method_gave_do_not_matter() -> None:
    a_RI, b_OR = pair()
    by_R = torch.tensor([3.0, 1e-3, 7.0, 0.2, 50.0])
    for one, other in zip(as_fresh(a_RI, b_OR), as_fresh(a_RI * by_R[:, None], b_OR / by_R), strict=True):
        torch.testing.assert_close(one, other)


def test_a_fresh_lora_has_rows_of_that_length() -> None:
    adapter = registry.load("adapter", "lora")
    lora = adapter.build(adapter.Spec(rank=8, alpha=8, target_modules=["x"]))
    drawn = lora.build([Site("x", 4096, 64, None)], torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn["x.lora_A"].norm(dim=1), torch.full((8,), FRESH_LENGTH), rtol=0.03, atol=0)


def test_a_direction_that_calibration_never_saw_stays_zero() -> None:
    a_RI, b_OR = pair()
    a_RI[1], b_OR[:, 1] = 0.0, 0.0
    found_RI, found_OR = as_fresh(a_RI, b_OR)
    assert not found_RI[1].any() and not found_OR[:, 1].any()
    assert found_RI.isfinite().all() and found_OR.isfinite().all()
