"""What members remember while they write answers: keys and values, counted as transformers' caches hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_ROWS = 32
"""More rows at once hardly save time: the slowest of them decides when the others' places are free."""


def rows_at_once(batch: int, members: int) -> int:
    """Return how many prompts so many members answer together, where a forward pass is to have ``batch`` rows."""
    return max(1, min(MOST_ROWS, batch // members))


@dataclass(frozen=True)
class CacheShape:
    """Layers of a model that remember alike."""

    width: int
    """Numbers that they keep of a token, keys and values of all of them together."""
    layers: int = 1
    window: int = 0
    """How many tokens they see, the one that is read among them; 0 is all."""

    def tokens(self, prompt: int, written: int) -> int:
        """Return how many tokens are held after a prompt and some more, one by one.

        What a window leaves of a prompt is a view of all of it, until the next token is read.
        """
        return min(self.window, prompt + written) if self.window and written else prompt + written


@dataclass(frozen=True)
class AnswerShape:
    """Answers that are written side by side."""

    prompt: int
    """Tokens of the longest prompt; the others are padded to it."""
    new_tokens: int
    """Of an answer, at most."""
    rows: int
    """Prompts that each member answers at once, at most."""
    batch: int = 0
    """Model rows that a forward pass is to have, shared out among the members; 0 is as many as it takes."""
    members: int = 0
    """Who writes; 0 are those that train together."""
    ways: int = 1
    """In how many ways the same prompts are gone on from: the mixture's, and the members' own."""

    def rows_of(self, members: int) -> int:
        """Return how many prompts each of so many members answers at once."""
        return min(self.rows, rows_at_once(self.batch, members)) if self.batch else self.rows


def cached_bytes(
    caches: Sequence[CacheShape], answers: AnswerShape, members: int, number_bytes: int, written: int | None = None
) -> int:
    """Return what caches take at most, or after so many written tokens: of every member one, for each way to go on.

    The ways are gone one after another: while one grows, the others wait with what was remembered of the prompts.
    """
    rows = members * answers.rows_of(members) * number_bytes

    def held(read: int) -> int:
        return rows * sum(kind.width * kind.tokens(answers.prompt, read) for kind in caches)

    last = answers.new_tokens - 1  # nobody reads the last one
    grown = held(written) if written is not None else max(held(0), held(last))
    return grown + (answers.ways - 1) * held(0)
