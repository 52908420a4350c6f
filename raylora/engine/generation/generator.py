"""Ask a finished ensemble of language models: it answers in one voice or each member in its own, and says how sure.

Shapes: M members, N prompts, T tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from torch import Tensor

from raylora.adapters.base import Tensors
from raylora.adapters.packed import member_count
from raylora.data.task import Asks, BadRow, Example
from raylora.engine.generation.answers import Answer, Finish, Token
from raylora.engine.generation.decoder import Decoder, Sampling, Written
from raylora.engine.generation.score import Scored, score
from raylora.engine.model.packed_model import PackedModel
from raylora.ensemble.aggregate import log_mean_exp
from raylora.ensemble.answer_metrics import normalized
from raylora.errors import DataError, UsageError

BATCH = 16
"""Prompts that are answered at once, unless another number is given."""
Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A text, a chat, or a row with the task's columns."""


@dataclass(frozen=True)
class Piece:
    """What came of one answer at one step, for whoever reads along."""

    id: str
    member: int | None
    token: Token
    text: str
    """The text that is complete with it; nothing while a character is not, or while a stop string may have begun."""


@dataclass
class _Draft:
    """One answer while it is written."""

    id: str
    member: int | None
    tokens: list[Token] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    text: str = ""
    shown: int = 0
    """Characters that a reader has seen."""
    finish: Finish = "length"


def sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int, each_member: bool) -> Sampling:
    """Return checked settings. Raises: UsageError."""
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}", "allow at least one token")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature is {temperature}", "use 0 for the most probable token, or a positive number")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p}", "use a share above 0 and up to 1")
    return Sampling(max_new_tokens, temperature, top_p, seed, each_member=each_member)


class Generator:
    """The members of a run as one writer."""

    def __init__(self, model: PackedModel, stacked: Tensors, rule: str, weights_M: Tensor | None = None) -> None:
        """Take the members' tensors, stacked over M, and how they are aggregated: alike, or by weights.

        Raises:
            UsageError: the task's model does not write.
        """
        if not isinstance(model.task, Asks):
            raise UsageError(f"a {model.task.spec.kind} run has no model that writes", "use predict")
        self.model, self.stacked, self.rule = model, stacked, rule
        self.weights_M = weights_M
        self.task: Asks = model.task
        self.tokenizer: Any = model.base.tokenizer
        self.members = member_count(stacked)
        self.ends = self.task.ends(self.tokenizer)

    def answers(
        self, prompts: Iterable[Prompt], sampling: Sampling, stop: Sequence[str] = (), batch: int = BATCH,
        agreement: bool = False,
    ) -> Iterator[list[Answer]]:
        """Yield the answers to each prompt in order, one or one per member; so many prompts are in memory at once.

        Args:
            agreement: ask every member for its own greedy answer, too, and say how many agree.

        Raises:
            DataError: a prompt is empty, of no known shape, or too long for the model; nothing was written then.
        """
        numbered = enumerate(prompts)
        while chunk := list(islice(numbered, batch)):
            tokens = [self._tokens(prompt, number, sampling) for number, prompt in chunk]
            names = [self._name(prompt, number) for number, prompt in chunk]
            ways = [sampling, *([replace(sampling, each_member=True, temperature=0.0)] if agreement else [])]
            found, *own_too = self.voices(tokens, names, ways, stop)
            for own in own_too:
                found = [[replace(one, agreement=agreement_of(one, members)) for one in answers]
                         for answers, members in zip(found, own, strict=True)]
            yield from found

    def stream(self, prompt: Prompt, sampling: Sampling, stop: Sequence[str] = ()) -> Iterator[Piece]:
        """Yield an answer's pieces as they are written. Raises: DataError, as for :meth:`answers`."""
        tokens, name = self._tokens(prompt, 0, sampling), self._name(prompt, 0)
        for pieces, _ in self._steps(self._decoder([tokens], [name], sampling), stop):
            yield from pieces

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Return what the members say of answers that are there. Raises: DataError, naming the row."""
        examples = []
        for number, row in enumerate(rows):
            try:
                examples.append(self.model.task.tokenize(row, str(row.get("id", number)), self.tokenizer)[0])
            except BadRow as error:
                raise DataError(f"row {number}: {error}") from None
        found = []
        for example, said in zip(examples, self._scores(examples), strict=True):
            numbers = zip(said.token_P.tolist(), said.logprob_P.tolist(), said.entropy_P.tolist(),
                          said.mutual_information_P.tolist(), strict=True)
            tokens = tuple(Token(one, self.tokenizer.decode([one]), *rest) for one, *rest in numbers)
            whole_M = said.member_logprob_MP.double().sum(dim=1)
            sequencewise = -float(log_mean_exp(whole_M, self.weights_M))
            text = text_of(self.tokenizer, said.token_P.tolist())
            found.append(Answer(example.id, text, tokens, "given", sequencewise_nll=sequencewise))
        return found

    def written(
        self, prompts: Sequence[list[int]], names: Sequence[str], sampling: Sampling, stop: Sequence[str] = ()
    ) -> list[list[Answer]]:
        """Return the answers to prompts that are tokens already, one or one per member. Raises: DataError."""
        return self.voices(prompts, names, [sampling], stop)[0]

    def voices(
        self, prompts: Sequence[list[int]], names: Sequence[str], ways: Sequence[Sampling], stop: Sequence[str] = ()
    ) -> list[list[list[Answer]]]:
        """Return :meth:`written` of each of several ways; the members read the prompts once. Raises: DataError."""
        for name, prompt in zip(names, prompts, strict=True):
            self._check_length(f"prompt {name}", prompt, max(ways, key=lambda way: way.max_new_tokens))
        first = self._decoder(prompts, names, ways[0])
        decoders = [first.fork(self._own(way)) for way in ways[1:]]
        decoders.insert(0, first)
        found: list[list[list[Answer]]] = []
        while decoders:  # the last goes first, and what it remembers with it
            found.insert(0, self._answers_of(decoders.pop(), len(prompts), stop))
        return found

    def _answers_of(self, decoder: Decoder, prompts: int, stop: Sequence[str]) -> list[list[Answer]]:
        drafts: dict[tuple[int, int | None], _Draft] = {}
        for _, drafts in self._steps(decoder, stop):  # noqa: B007
            pass
        speakers: list[int | None] = list(range(self.members)) if decoder.sampling.each_member else [None]
        return [[_answer(drafts[row, speaker]) for speaker in speakers] for row in range(prompts)]

    def _decoder(self, prompts: Sequence[list[int]], names: Sequence[str], sampling: Sampling) -> Decoder:
        return Decoder(self.model, self.stacked, prompts, names, self._own(sampling), self.ends)

    def _own(self, sampling: Sampling) -> Sampling:
        weights = None if self.weights_M is None else tuple(self.weights_M.tolist())
        return replace(sampling, rule=self.rule, weights=weights)

    def _scores(self, examples: Sequence[Example]) -> Iterator[Scored]:
        return score(self.model, self.stacked, examples, self.rule, self.weights_M)

    def _steps(
        self, decoder: Decoder, stop: Sequence[str]
    ) -> Iterator[tuple[list[Piece], dict[tuple[int, int | None], _Draft]]]:
        names = decoder.names
        drafts: dict[tuple[int, int | None], _Draft] = {}
        for written in decoder.steps():
            pieces = []
            for one in written:
                draft = drafts.setdefault((one.row, one.member), _Draft(names[one.row], one.member))
                pieces.append(self._take(draft, one, stop))
                if draft.finish == "stop":
                    decoder.finish(one.row, one.member)
            yield pieces, drafts
        held = [draft for draft in drafts.values() if draft.shown < len(draft.text)]
        rest = [Piece(one.id, one.member, one.tokens[-1], one.text[one.shown :]) for one in held]
        yield rest, drafts

    def _take(self, draft: _Draft, one: Written, stop: Sequence[str]) -> Piece:
        """Put a token behind a draft and return what a reader may see of it now."""
        ends = one.token in self.ends
        token = Token(one.token, self.tokenizer.decode([one.token]), one.logprob, one.entropy, one.mutual_information)
        draft.tokens.append(token)
        if ends:
            draft.finish = "end"
        else:
            draft.ids.append(one.token)
            draft.text = text_of(self.tokenizer, draft.ids)
        places = [place for text in stop if (place := draft.text.find(text)) >= 0]
        if places:
            draft.text, draft.finish = draft.text[: min(places)], "stop"
        done = draft.finish != "length"
        upto = len(draft.text) if done else _certain(draft.text, stop)
        shown, draft.shown = draft.text[draft.shown : upto], max(draft.shown, upto)
        return Piece(draft.id, draft.member, token, shown)

    def _tokens(self, prompt: Prompt, number: int, sampling: Sampling) -> list[int]:
        try:
            tokens = self.task.prompt(_row(prompt), self.tokenizer)
        except BadRow as error:
            raise DataError(f"prompt {number}: {error}") from None
        if not tokens:
            raise DataError(f"prompt {number} is empty", "ask something")
        self._check_length(f"prompt {number}", tokens, sampling)
        return tokens

    def _check_length(self, what: str, tokens: Sequence[int], sampling: Sampling) -> None:
        check_length(self.model.base.model.config, self.tokenizer, what, tokens, sampling.max_new_tokens)

    def _name(self, prompt: Prompt, number: int) -> str:
        given = prompt.get("id") if isinstance(prompt, Mapping) else None
        return str(number if given is None else given)


def check_length(config: Any, tokenizer: Any, what: str, tokens: Sequence[int], max_new_tokens: int) -> None:
    """Refuse a prompt that with its answer is longer than a model of this config reads. Raises: DataError."""
    limit = _positions(config, tokenizer)
    if limit is not None and len(tokens) + max_new_tokens > limit:
        raise DataError(
            f"{what} has {len(tokens)} tokens, and with {max_new_tokens} to write that is more than the {limit} that "
            "the model can read", "shorten it, or lower max_new_tokens",
        )


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return tokens as people read them, those that are no text left out."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def _row(prompt: Prompt) -> Mapping[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt, "prompt": prompt}
    return prompt if isinstance(prompt, Mapping) else {"messages": list(prompt)}


def _answer(draft: _Draft) -> Answer:
    return Answer(draft.id, draft.text, tuple(draft.tokens), draft.finish, draft.member)


def agreement_of(answer: Answer, members: Sequence[Answer]) -> float:
    """Return the share of members whose own answer is this one, once normalized."""
    return statistics.fmean(normalized(one.text) == normalized(answer.text) for one in members)


def _certain(text: str, stop: Sequence[str]) -> int:
    """Return how much of an unfinished text cannot change: not a broken character, nor what may begin a stop string."""
    end = len(text.rstrip("\ufffd"))
    begun = (length for string in stop for length in range(1, len(string)) if text[:end].endswith(string[:length]))
    return end - max(begun, default=0)


def _positions(config: Any, tokenizer: Any) -> int | None:
    """Return how many tokens a model can read, if that is limited."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    found = [limit for limit in (own, int(tokenizer.model_max_length)) if limit is not None and limit < 10**9]
    return min(found, default=None)
