"""What an ensemble of language models writes, and how sure its members are of every token of it.

Shapes: M members, T tokens of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Finish = Literal["end", "stop", "length", "given"]
"""The model ended its answer, a stop string came, the limit was reached, or the answer was there before."""


@dataclass(frozen=True)
class Token:
    """One token of an answer."""

    id: int
    text: str
    logprob: float
    """Natural logarithm of its probability under the mixture, before temperature and nucleus."""
    entropy: float
    """Of the next token under the mixture, over the whole vocabulary, in nats."""
    mutual_information: float | None
    """Of that, what is the members' disagreement; None where one member speaks alone."""


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt."""

    id: str
    text: str
    """Without the token that ended it, and without a stop string."""
    tokens: tuple[Token, ...]
    """With the token that ended it."""
    finish: Finish
    member: int | None = None
    """Whose answer it is, where every member gives its own."""
    agreement: float | None = None
    """The share of members whose own greedy answer is this one; None where they were not asked."""
    sequencewise_nll: float | None = None
    """Of a given answer: ``-log sum_m w_m prod_t p_m``, the mixture of whole answers."""

    @property
    def nll(self) -> float:
        """Sum of the tokens' negative log-probabilities."""
        return -math.fsum(token.logprob for token in self.tokens)

    def sums(self) -> dict[str, float]:
        """Return the sums and means over its tokens of what each of them has."""
        shared = [token.mutual_information for token in self.tokens if token.mutual_information is not None]
        found = _sum_and_mean("nll", [-token.logprob for token in self.tokens])
        found |= _sum_and_mean("entropy", [token.entropy for token in self.tokens])
        return found | (_sum_and_mean("mutual_information", shared) if shared else {})

    def record(self) -> dict[str, Any]:
        """Return it as a JSON-able mapping."""
        extra = {"member": self.member, "agreement": self.agreement, "sequencewise_nll": self.sequencewise_nll}
        return {
            "id": self.id, "text": self.text, "finish": self.finish, **self.sums(),
            **{name: value for name, value in extra.items() if value is not None},
            "tokens": [vars(token) for token in self.tokens],
        }


def _sum_and_mean(name: str, values: Sequence[float]) -> dict[str, float]:
    total = math.fsum(values)
    return {name: total, f"mean_{name}": total / len(values) if values else 0.0}
