"""Answers to prompts and chats by a causal language model, which learns what the assistant says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator
from transformers import PreTrainedTokenizerBase

from raylora.data.chat import Message, read_chat, read_prompt, read_reference
from raylora.data.chat_template import (
    OWN,
    PLAIN,
    PROBE,
    check_template,
    tokens_of,
    tokens_to_answer,
    write_chat,
)
from raylora.data.task import (
    BadRow,
    Example,
    LeftOut,
    check_length,
    decode_text,
    encode_text,
)
from raylora.data.tasks.tokens import TokenTask
from raylora.spec import TaskSpec
from raylora.spec.starting import Starter

_CUTS = 8
"""Attempts to cut a prompt to length: what is left of it may be split into other tokens."""


class Spec(TaskSpec):
    """Columns ``messages`` (a list of role and content), or ``prompt`` and ``completion`` and, if any, ``system``."""

    kind: Literal["instruction"] = "instruction"
    max_length: int = Field(default=512, ge=2)
    """Tokens of a row, prompt and answer together; what is longer goes by ``on_too_long``."""
    template: str = OWN
    """How a chat becomes text: ``tokenizer`` for the chat template that comes with it, ``none`` to put the completion
    behind the prompt as it is, or a Jinja template of your own."""
    train_on: Literal["completion", "all"] = "completion"
    """Learn the assistant's turns, or every turn; the tokens that end them are learned, too."""
    on_too_long: Literal["error", "truncate_prompt", "skip"] = "error"
    """What a row beyond ``max_length`` does: stop with an error that names it, lose its oldest turns and then the
    beginning of its last prompt, or be left out. Each is counted, and an answer is never cut."""
    token_mean: bool = False
    """The loss is the mean over all learned tokens of a step, as most trainers have it, and not first over a row's, so
    that long answers count for more."""

    @field_validator("template")
    @classmethod
    def _is_a_template(cls, value: str) -> str:
        if value not in (OWN, PLAIN) and "{" not in value:
            raise ValueError(f"must be '{OWN}', '{PLAIN}' or a Jinja template with {{{{ ... }}}} or {{% ... %}} in it")
        return value


STARTER = Starter(
    row={"messages": [{"role": "user", "content": "Anne put the ball in the box. Where is the ball?"},
                      {"role": "assistant", "content": "box"}]},
    base="pypi:smollm2-135m",
    train="pypi:tomi",
    task={"max_length": 256},
    optimization={"lr": 5e-4, "epochs": 1, "micro_batch": 4},
    train_rows=200, validation_rows=20, test_rows=60, batch=16,
    notes={"task.max_length": "tokens of a prompt and its answer together"},
)


class Instruction(TokenTask):
    """The probability of an answer's tokens, given what it answers."""

    columns: tuple[str, ...] = ()
    optional_columns: tuple[str, ...] = ("messages", "prompt", "completion", "system")

    def columns_for(self, there: Sequence[str], may_ask: bool = False) -> tuple[str, ...]:
        """Return the columns of chats, or of prompts and completions, whichever a set seems to mean."""
        if "messages" in there:
            return ("messages",)
        return ("prompt",) if may_ask and "completion" not in there else ("prompt", "completion")

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a ``max_length`` beyond the model's, or a template that is not there. Raises: DataError."""
        check_length(self.spec, tokenizer)
        check_template(tokenizer, self.spec.template)

    def content(self, row: Mapping[str, Any]) -> str:
        """Return all that comes before the last answer: rows that ask the same are duplicates. Raises: BadRow."""
        return _in_words(read_chat(row)[:-1])

    def asked(self, row: Mapping[str, Any]) -> str:
        """Return all that comes before the last answer, or all of a row that only asks. Raises: BadRow."""
        return self.content(row) if read_reference(row) is not None else _in_words(read_prompt(row))

    def weight(self, example: Example) -> float | None:
        """Return how many tokens an example has to learn, if that is what it counts for beside the others."""
        if not self.spec.token_mean:
            return None
        return float(sum(last - first for first, last in example.target_ranges))

    def tokenize(self, row: Mapping[str, Any], row_id: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Example, bool]:
        """Return the example and whether its prompt was cut.

        Raises:
            BadRow: it is no chat, its template cannot write it, or it is too long.
            LeftOut: it is too long, and such rows are to be left out.
        """
        tokens, is_cut = self._fitted(read_chat(row), lambda chat: self._tokens(chat, tokenizer), tokenizer)
        return Example(row_id, (tuple(tokens.ids),), None, target_ranges=tuple(tokens.ranges)), is_cut

    def question(self, row: Mapping[str, Any], row_id: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Example, bool]:
        """Return a row's prompt up to where the answer begins, and whether it was cut. Raises: BadRow, LeftOut."""
        def written(chat: Sequence[Message]) -> _Tokens:
            return _Tokens(tokens_to_answer(chat, tokenizer, self.spec.template), [])

        tokens, is_cut = self._fitted(read_prompt(row), written, tokenizer)
        return Example(row_id, (tuple(tokens.ids),), None), is_cut

    def prompt(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the tokens of a chat up to where the assistant's answer begins. Raises: BadRow."""
        return tokens_to_answer(read_prompt(row), tokenizer, self.spec.template)

    def reference(self, row: Mapping[str, Any]) -> str | None:
        """Return the last answer of a row, if it has one. Raises: BadRow."""
        return read_reference(row)

    def ends(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the token that ends a turn in this template, and the tokenizer's own."""
        ids, _ = tokens_of(write_chat(PROBE, tokenizer, self.spec.template), tokenizer)
        own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        return list(dict.fromkeys([ids[-1], *own]))

    def blocks(self, example: Example) -> list[Example]:
        """Return the example itself."""
        return [example]

    def _tokens(self, chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> _Tokens:
        learns_all = self.spec.train_on == "all"
        return _Tokens(*tokens_of(write_chat(chat, tokenizer, self.spec.template, learns_all), tokenizer))

    def _fitted(
        self, chat: list[Message], written: Written, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[_Tokens, bool]:
        """Return the tokens of a chat as one may have them, and whether it was cut for it. Raises: BadRow, LeftOut."""
        tokens = written(chat)
        limit, rule = self.spec.max_length, self.spec.on_too_long
        if tokens.count <= limit:
            return tokens, False
        if rule == "skip":
            raise LeftOut(f"{tokens.count} tokens, more than task.max_length {limit}")
        if rule == "error":
            raise BadRow(f"{tokens.count} tokens, more than task.max_length {limit}: raise it, or set "
                         "task.on_too_long to truncate_prompt or skip")
        return self._cut(chat, tokens, written, tokenizer), True

    def _cut(
        self, chat: list[Message], tokens: _Tokens, written: Written, tokenizer: PreTrainedTokenizerBase
    ) -> _Tokens:
        """Return the tokens of a chat without its oldest turns and, if need be, the beginning of its last prompt."""
        limit = self.spec.max_length
        system, turns = (chat[:1], chat[1:]) if chat[0]["role"] == "system" else ([], chat)
        while tokens.count > limit:
            later = next((n for n in range(1, len(turns)) if turns[n]["role"] == "user"), None)
            if later is None:
                break
            turns = turns[later:]
            tokens = written([*system, *turns])
        for _ in range(_CUTS):
            if tokens.count <= limit:
                return tokens
            asked = encode_text(tokenizer, turns[0]["content"])
            kept = decode_text(tokenizer, asked[tokens.count - limit :])
            if not kept.strip():
                break
            turns = [{**turns[0], "content": kept}, *turns[1:]]
            tokens = written([*system, *turns])
        raise BadRow(f"its answer and template alone need more than task.max_length {limit} tokens")


@dataclass(frozen=True)
class _Tokens:
    """A chat's tokens, and the ranges that are learned."""

    ids: list[int]
    ranges: list[tuple[int, int]]

    @property
    def count(self) -> int:
        return len(self.ids)


Written = Callable[[Sequence[Message]], _Tokens]
"""A chat as tokens: with its answers, or up to where the next one begins."""


def _in_words(chat: Sequence[Message]) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in chat)


def build(spec: Spec) -> Instruction:
    """Return the task that a spec describes."""
    return Instruction(spec)
