"""The factors of a pair: what rank they can have, and how their product is shared out where a member trains them.

B A = (B D^-1)(D A) for any diagonal D, and before the first step nothing tells the choices apart. AdamW does: its steps
are about as long as the rate whatever a factor's scale, so one step moves the weight by

    dW = dB A + B dA,    |dB A| ~ rate * sqrt(O) |A|,    |B dA| ~ rate * sqrt(I) |B|

and to train c A and B / c at one rate is to train A at 1 / c and B at c times that rate (compare LoRA+,
arXiv 2402.12354). The solutions in closed form give lengths that depend on the residual and the method (``left`` of
CLoQ makes B longer with the root of how many rows were read): rates that suit one do not suit another.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from torch import Tensor

from raylora.errors import BaseError

FRESH_LENGTH = 3**-0.5
"""Of a row of A ~ U(-1/sqrt I, 1/sqrt I), nearly: what a LoRA begins with that starts from no pair."""


def check_rank(rank: int, outputs: int, inputs: int, name: str) -> None:
    """Raise BaseError for a rank that a layer's pair cannot have."""
    if not 0 < rank <= min(outputs, inputs):
        raise BaseError(f"rank: {rank} for {name} ({outputs} x {inputs})", f"use 1 to {min(outputs, inputs)}")


def as_fresh(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product, with A's rows as long as a newly drawn LoRA's, in float32.

    The rate that suits a LoRA from nothing then moves B's part of the weight as it does there. Rows of zeros, for
    directions that calibration never saw, stay.
    """
    length_R = a_RI.double().norm(dim=1)
    by_R = (FRESH_LENGTH / length_R.where(length_R > 0, FRESH_LENGTH)).double()
    return (a_RI.double() * by_R[:, None]).float(), (b_OR.double() / by_R).float()


def as_solved(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors as the method gives them."""
    return a_RI, b_OR
