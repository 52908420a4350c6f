"""Chats as text and as tokens: how a template writes one down, and which of its tokens are learned.

What a model learns is each answer of the assistant and the token that ends it: exactly what it has to write when it is
asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from raylora.data.chat import Message
from raylora.data.task import BadRow, encode_text
from raylora.errors import DataError

PLAIN = "none"
"""The template that writes a prompt and its completion as they are."""
OWN = "tokenizer"
"""The template that comes with the tokenizer."""
PROBE: list[Message] = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
"""What every template must be able to write."""


@dataclass(frozen=True)
class Written:
    """A chat as text, cut into what is only read and what is learned."""

    pieces: tuple[tuple[str, bool], ...]
    """Text, and whether it is an answer; put together they are all of it."""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for text, _ in self.pieces)


def tokens_to_answer(chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Return the tokens of a chat up to where the assistant's answer begins. Raises: BadRow."""
    _check_borders(chat, special_tokens(tokenizer))
    if template == PLAIN:
        return encode_text(tokenizer, _plain_prompt(chat, tokenizer))
    return encode_text(tokenizer, _render(chat, tokenizer, template, asks=True))


def write_chat(
    chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str, learns_all: bool = False
) -> Written:
    """Return a chat as its template writes it, the answers apart.

    Args:
        template: ``tokenizer`` for the tokenizer's own, ``none``, or a Jinja template.
        learns_all: every turn is learned, not the answers alone.

    Raises:
        BadRow: the template refuses the chat, loses or repeats an answer, or writes the same turns differently once
            others follow.
    """
    special = special_tokens(tokenizer)
    _check_borders(chat, special)
    if template == PLAIN:
        written = _plain(chat, tokenizer)
        return Written(((written.text, True),)) if learns_all else written
    whole = _render(chat, tokenizer, template)
    if learns_all:
        lost = next((m["content"] for m in chat if m["content"].strip() not in whole), None)
        if lost is not None:
            raise BadRow(f"the template loses {_short(lost)!r}")
        return Written(_ended([(whole.rstrip(), True)], tokenizer, special))
    pieces: list[tuple[str, bool]] = []
    done = 0
    for number, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before = _render(chat[:number], tokenizer, template, asks=True)
        through = _render(chat[: number + 1], tokenizer, template).rstrip()
        if not whole.startswith(before) or not whole.startswith(through) or len(before) < done:
            raise BadRow("the template writes earlier turns differently once others follow, so that it cannot be said "
                         "which tokens are an answer: use train_on: all, or a template of your own")
        _check_answer(through[len(before) :], message["content"], special)
        pieces += [(whole[done : len(before)], False), (whole[len(before) : len(through)], True)]
        done = len(through)
    return Written(_ended(pieces, tokenizer, special))


def tokens_of(written: Written, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    """Return a chat's tokens and the ranges of those that are learned.

    A text is split into tokens as it will be when the model is asked: the border before an answer is one between
    tokens, too.

    Raises:
        BadRow: the tokenizer cannot put a border there, or the text begins with two start tokens.
    """
    text = written.text
    whole, borders, there = encode_text(tokenizer, text), [0], ""
    is_clean = True
    for piece, _ in written.pieces:
        there += piece
        before = encode_text(tokenizer, there)
        borders.append(len(before))
        is_clean = is_clean and whole[: len(before)] == before
    if not is_clean:  # a merge across a border: put together from pieces, if that is the same text
        parts = [encode_text(tokenizer, piece) for piece, _ in written.pieces]
        whole, borders = [token for part in parts for token in part], [0]
        for part in parts:
            borders.append(borders[-1] + len(part))
        if tokenizer.decode(whole) != tokenizer.decode(encode_text(tokenizer, text)):
            raise BadRow("the tokenizer runs a prompt and its answer together: end the prompt with a line break")
    start = tokenizer.bos_token_id
    if start is not None and whole[:2] == [start, start]:
        raise BadRow(f"the text begins with two start tokens {tokenizer.bos_token!r}: take one out of the template")
    ranges = [
        (max(1, first), last)
        for (_, learned), first, last in zip(written.pieces, borders[:-1], borders[1:], strict=True) if learned
    ]
    return whole, ranges


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the tokens that are no text, such as those that end a turn."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {token for token in (*tokenizer.all_special_tokens, *(t.content for t in added if t.special)) if token}


def check_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Refuse a template that is not there or cannot be read. Raises: DataError."""
    if template == OWN and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "task.template: the tokenizer has no chat template",
            "use template: none for plain prompts and completions, or give a Jinja template",
        )
    if template == PLAIN:
        if tokenizer.eos_token is None:
            raise DataError("task.template: none ends an answer with the tokenizer's end token, and it has none",
                            "give a Jinja template, or set the tokenizer's eos_token")
        return
    try:
        write_chat(PROBE, tokenizer, template)
    except BadRow as error:
        hint = "see https://huggingface.co/docs/transformers/chat_templating"
        raise DataError(f"task.template: {error}", hint) from None


def _plain(chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Written:
    """Return a prompt and its completion as they are, a system text and an empty line before them."""
    *asked, answer = chat
    prompt = _plain_prompt(asked, tokenizer)
    return Written(((prompt, False), (f"{answer['content']}{tokenizer.eos_token}", True)))


def _plain_prompt(asked: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    roles = [message["role"] for message in asked]
    if roles not in (["user"], ["system", "user"]):
        raise BadRow("a chat of several turns needs a template: none takes a prompt and its completion")
    start = tokenizer.bos_token if _starts_with_bos(tokenizer) else ""
    return str(start) + "\n\n".join(message["content"] for message in asked)


def _starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and list(ids[:1]) == [tokenizer.bos_token_id]


def _check_borders(chat: Sequence[Message], special: set[str]) -> None:
    """Refuse a text with a token in it that could end its turn."""
    for message in chat:
        within = next((token for token in sorted(special) if token in message["content"]), None)
        if within is not None:
            raise BadRow(f"the {message['role']}'s text holds {within!r}, which is for the borders of turns")


def _render(
    chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str, asks: bool = False
) -> str:
    """Return a chat as text; ``asks`` leaves it where an answer is to begin."""
    try:  # transformers compiles it in a sandbox that can change nothing
        return str(tokenizer.apply_chat_template(
            [dict(message) for message in chat], chat_template=None if template == OWN else template, tokenize=False,
            add_generation_prompt=asks,
        ))
    except (TemplateError, ValueError, TypeError) as error:
        raise BadRow(f"the template refuses the chat: {error}") from None


def _check_answer(turn: str, content: str, special: set[str]) -> None:
    """Refuse a turn that does not hold its answer exactly once."""
    answer = content.strip()
    if answer not in turn:
        raise BadRow(f"the template loses the answer {_short(answer)!r}")
    rest = turn.replace(answer, "", 1)
    for token in special:
        rest = rest.replace(token, "")
    if answer in rest:
        raise BadRow(f"the template repeats the answer {_short(answer)!r}")


def _ended(
    pieces: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, special: set[str]
) -> tuple[tuple[str, bool], ...]:
    """Return the pieces, the last answer with an end: without one a model would never learn to stop."""
    text, _ = pieces[-1]
    if any(text.endswith(token) for token in special) or tokenizer.eos_token is None:
        return tuple(pieces)
    return (*pieces[:-1], (text + str(tokenizer.eos_token), True))


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
