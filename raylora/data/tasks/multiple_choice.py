"""Multiple choice by a causal language model, which keeps its own head: the options are scored, not classified.

Shapes: N examples, C options, B rows (N, or N * C where the options' texts are scored), T tokens, K kept positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raylora.data.task import (
    UNLABELED,
    BadRow,
    Batch,
    Example,
    PaddingSide,
    check_length,
    collate,
    encode_text,
    leading_ids,
    require_labels,
    require_text,
    token_logprobs,
)
from raylora.errors import DataError
from raylora.spec import TaskSpec
from raylora.spec.starting import Starter

_QUESTION, _OPTIONS = "{question}", "{options}"


class Spec(TaskSpec):
    """Columns ``question``, ``choices`` (a list) and ``answer``: an index from 0, a letter, or a choice's text."""

    kind: Literal["multiple_choice"] = "multiple_choice"
    options: int = Field(ge=2, le=26)
    """How many choices every row has."""
    prompt: str = "Question: {question}\n{options}\nAnswer:"
    """``{question}`` and ``{options}`` are filled in, the latter as lines ``A. text``, ``B. text`` ..."""
    scoring: Literal["answer_token", "option_text"] = "answer_token"
    """The logit of the answer's letter after the prompt, or the log-probability of each option's text."""
    normalize: Literal["none", "length"] = "none"
    """For ``option_text``: ``length`` divides by the number of tokens, so that long options are not at a loss."""

    @model_validator(mode="after")
    def _prompt_is_whole(self) -> Spec:
        fields = re.findall(r"\{\w*\}", self.prompt)
        if fields.count(_QUESTION) != 1 or set(fields) - {_QUESTION, _OPTIONS}:
            raise ValueError("'prompt' must hold {question} once, and no fields but {question} and {options}")
        if self.scoring == "answer_token" and _OPTIONS not in fields:
            raise ValueError("scoring: answer_token needs {options} in 'prompt', or the letters mean nothing")
        if self.scoring == "answer_token" and self.normalize != "none":
            raise ValueError("'normalize' is for scoring: option_text only")
        return self


STARTER = Starter(
    row={"question": "You move closer to a speaker. Its sound becomes", "choices": ["louder", "quieter"], "answer": 0},
    base="pypi:smollm2-135m",
    train="pypi:quartz",
    task={"options": 2, "max_length": 128},
    optimization={"lr": 5e-4, "epochs": 1, "micro_batch": 4},
    train_rows=400, validation_rows=40, test_rows=100, batch=16,
    notes={"task.options": "how many choices every row has"},
)


class MultipleChoice:
    """One of a fixed number of options per row, from a causal model's next-token probabilities."""

    auto_class = "AutoModelForCausalLM"
    output = "classes"
    no_label: int | float = UNLABELED
    columns: tuple[str, ...] = ("question", "choices")
    optional_columns: tuple[str, ...] = ()
    label_column: str | None = "answer"

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.num_outputs = spec.options
        self.label_names = list(ascii_uppercase[: spec.options])

    def model_kwargs(self) -> dict[str, Any]:
        """Return nothing: the model keeps its own head."""
        return {}

    def forward_kwargs(self, batch: Batch) -> dict[str, Any]:
        """Return how many last positions need logits, so that B x T x V of them are never made."""
        return {"logits_to_keep": batch.keep}

    def padding_side(self, is_decoder: bool) -> PaddingSide:
        """Return left: answers end where the rows end."""
        return "left"

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer whose answer letters are not single, distinct tokens. Raises: DataError."""
        check_length(self.spec, tokenizer)
        if self.spec.scoring == "answer_token":
            self._answer_ids(tokenizer)

    def content(self, row: Mapping[str, Any]) -> str:
        """Return the question and its choices. Raises: BadRow."""
        return "\n".join([require_text(row, "question"), *self._choices(row)])

    def label(self, row: Mapping[str, Any]) -> int | None:
        """Return the answer's index, from an index, a choice's text or a letter. Raises: BadRow."""
        if "answer" not in row:
            return None
        answer, choices = row["answer"], self._choices(row)
        text = str(answer).strip()
        by_text = [index for index, choice in enumerate(choices) if choice.strip() == text]
        by_letter = [self.label_names.index(text.upper())] if text.upper() in self.label_names else []
        found = by_text or by_letter
        if not found and text.isdecimal() and int(text) < len(choices):
            found = [int(text)]
        if isinstance(answer, int):  # a number is an index, even where a choice reads the same
            found = [answer] if 0 <= answer < len(choices) else []
        if len(found) != 1 or by_text and by_letter and by_text != by_letter and isinstance(answer, str):
            raise BadRow(f"answer {answer!r} is not one index (0 .. {len(choices) - 1}), letter or text of the choices")
        return int(found[0])

    def answer_in_words(self, row: Mapping[str, Any], label: str) -> str:
        """Return the text of the choice with a letter. Raises: BadRow."""
        return self._choices(row)[self.label_names.index(label)]

    def tokenize(self, row: Mapping[str, Any], row_id: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Example, bool]:
        """Return the example; too long a prompt loses the beginning of its question. Raises: BadRow."""
        choices = self._choices(row)
        head, prompt = self._fill(require_text(row, "question"), choices)
        start = leading_ids(tokenizer)
        prompt_ids = start + encode_text(tokenizer, prompt)
        sequences = [prompt_ids]
        spans: tuple[int, ...] = ()
        if self.spec.scoring == "option_text":
            sequences = [start + encode_text(tokenizer, prompt + self._gap() + choice.strip()) for choice in choices]
            spans = tuple(_common(prompt_ids, sequence) for sequence in sequences)
        excess = max(map(len, sequences)) - self.spec.max_length
        if excess > 0:
            first = len(start) + len(encode_text(tokenizer, head))
            tail = len(encode_text(tokenizer, prompt[len(head) + len(row["question"]) :]))
            if first + excess + tail >= len(prompt_ids):
                raise BadRow(f"needs {excess} tokens more than max_length {self.spec.max_length}, without its question")
            sequences = [sequence[:first] + sequence[first + excess :] for sequence in sequences]
            spans = tuple(span - excess for span in spans)
        return Example(row_id, tuple(map(tuple, sequences)), self.label(row), spans), excess > 0

    def blocks(self, example: Example) -> list[Example]:
        """Return the example itself."""
        return [example]

    def collate(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Batch:
        """Pad examples on the left, one row per example or one per option."""
        batch = collate(examples, tokenizer)
        if self.spec.scoring == "answer_token":
            return replace(batch, keep=1, answer_ids_C=torch.tensor(self._answer_ids(tokenizer)))
        lengths = [len(row) - span for e in examples for row, span in zip(e.sequences, e.spans, strict=True)]
        return replace(batch, keep=max(lengths) + 1)  # the token before an option predicts its first one

    def scores(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return scores_NC float32: the letters' logits, or the options' summed log-probabilities."""
        if batch.answer_ids_C is not None:
            return logits[:, -1, batch.answer_ids_C].float()
        logp_BK, mask_BK = token_logprobs(logits, batch)
        score_B = logp_BK.sum(-1)
        if self.spec.normalize == "length":
            score_B = score_B / mask_BK.sum(-1)
        return score_B.view(len(batch), batch.rows_per_example)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy loss_N over the options. Raises: DataError without labels."""
        return F.cross_entropy(scores, require_labels(batch), reduction="none")

    def _choices(self, row: Mapping[str, Any]) -> list[str]:
        choices = row.get("choices")
        if not isinstance(choices, Sequence) or isinstance(choices, str):
            raise BadRow("'choices' is not a list" if choices is not None else "no 'choices'")
        if len(choices) != self.spec.options:
            raise BadRow(f"{len(choices)} choices, but task.options is {self.spec.options}")
        if any(not isinstance(choice, str) or not choice.strip() for choice in choices):
            raise BadRow("a choice is empty or not text")
        return list(choices)

    def _fill(self, question: str, choices: list[str]) -> tuple[str, str]:
        """Return what stands before the question, and the whole prompt; braces in a row's text stay text."""
        listing = "\n".join(f"{letter}. {text.strip()}" for letter, text in zip(self.label_names, choices, strict=True))
        head, tail = (part.replace(_OPTIONS, listing) for part in self.spec.prompt.split(_QUESTION))
        return head, head + question + tail

    def _gap(self) -> str:
        return "" if self.spec.prompt[-1:].isspace() else " "

    def _answer_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        stem = re.split(r"[{}]", self.spec.prompt)[-1] or "Answer:"
        before = encode_text(tokenizer, stem)
        found = []
        for letter in self.label_names:
            after = encode_text(tokenizer, stem + self._gap() + letter)
            if len(after) != len(before) + 1 or after[:-1] != before:
                raise DataError(
                    f"the tokenizer does not write the answer {self._gap() + letter!r} as one token after {stem!r}",
                    "use scoring: option_text, or end 'prompt' differently (with or without a space)",
                )
            found.append(after[-1])
        if len(set(found)) != len(found):
            raise DataError("the tokenizer gives two answer letters one token", "use scoring: option_text")
        return found


def build(spec: Spec) -> MultipleChoice:
    """Return the task that a spec describes."""
    return MultipleChoice(spec)


def _common(prompt: list[int], whole: list[int]) -> int:
    """Return how many tokens two sequences share at the start: a merge across the border belongs to the option."""
    differ = (n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b)
    return max(1, next(differ, min(len(prompt), len(whole))))
