"""What a person reads of an example: its tokens, decoded, short enough for a table.

Runs keep tokens and no text, so a text is as the model read it: in lower case where the tokenizer knows no other,
without what was cut off, and with the tokenizer's own spacing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from raylora.data.sets import DataSets
from raylora.data.task import Example

MOST_CHARACTERS = 200
BETWEEN = " ⏐ "
"""Stands between the texts of a pair, and before each option."""


def text_finder(sets: DataSets, tokenizer: PreTrainedTokenizerBase) -> Callable[[str, str], str]:
    """Return a function from a set's name and a row's id to the row's text, or nothing where there is no such row."""
    found: dict[str, dict[str, Example]] = {}

    def text_of(set_name: str, row_id: str) -> str:
        if set_name not in found:
            found[set_name] = {
                example.id: example for one in sets.all() if one.name == set_name for example in one.examples
            }
        example = found[set_name].get(row_id)
        return "" if example is None else shortened(parts_of(example, tokenizer))

    return text_of


def parts_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return an example's texts: one, the two of a pair, or a prompt and its options."""
    if example.spans:  # every sequence repeats the prompt before its option
        first = example.sequences[0]
        pieces: list[Sequence[int]] = [first[: example.spans[0]]]
        pieces += [row[span:] for row, span in zip(example.sequences, example.spans, strict=True)]
    else:
        pieces = [piece for row in example.sequences for piece in _between_marks(row, tokenizer)]
    texts = [" ".join(str(tokenizer.decode(list(piece), skip_special_tokens=True)).split()) for piece in pieces]
    return [text for text in texts if text]


def shortened(texts: Sequence[str], limit: int = MOST_CHARACTERS) -> str:
    """Return texts side by side in at most ``limit`` characters; a short one leaves its room to the others."""
    room = limit - len(BETWEEN) * (len(texts) - 1)
    kept: dict[int, str] = {}
    for index in sorted(range(len(texts)), key=lambda n: len(texts[n])):
        share = max(1, room // (len(texts) - len(kept)))
        kept[index] = texts[index] if len(texts[index]) <= share else texts[index][: share - 1].rstrip() + "…"
        room -= len(kept[index])
    return BETWEEN.join(kept[index] for index in range(len(texts)))[:limit]


def _between_marks(row: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the runs of tokens between those that begin, separate and end texts."""
    marks = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    pieces: list[list[int]] = [[]]
    for token in row:
        if token in marks:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return [piece for piece in pieces if piece]
