"""The seam between rows of text and a model: what a row becomes, and what the model's output means.

Shapes: N examples of P options each, B = N * P model rows (P is 1 but for option scoring; fewer rows where they are
packed, :mod:`raylora.data.packed_rows`), T tokens, K positions whose logits the model returned (the last K of T),
V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raylora.errors import DataError
from raylora.spec import TaskSpec

PaddingSide = Literal["left", "right"]
UNLABELED = -1
"""No class's index; a value's task takes NaN, since -1 may be somebody's real value."""


class BadRow(ValueError):
    """One row does not fit the task; the message says why, the reader adds where."""


class LeftOut(BadRow):
    """One row is left out because the task's settings say so; it is counted, and nothing is wrong with it."""


@dataclass(frozen=True)
class Example:
    """One tokenized row: a token sequence, or one per option."""

    id: str
    sequences: tuple[tuple[int, ...], ...]
    label: int | float | None
    """A class's index, or a real value."""
    spans: tuple[int, ...] = ()
    """Per sequence, the first token whose probability counts; empty where only classes are scored."""
    target_ranges: tuple[tuple[int, int], ...] = ()
    """From where to before where the tokens of a single sequence count, if that is not one span to its end."""
    token_types: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Part:
    """Which of every member's examples a batch holds, where several workers train the members together."""

    start: int
    of: int
    """Examples of one member in the whole batch."""
    weight: float
    """What the sum of these examples' losses is to be multiplied by, so that the parts' mean is the whole's mean."""


@dataclass(frozen=True)
class Batch:
    """Padded examples, ready for one forward pass."""

    ids: list[str]
    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    labels_N: Tensor | None
    """int64 classes or float32 values, or None where the examples have no labels."""
    position_ids_BT: Tensor | None = None
    """Given with left padding and packed rows: positions must count from an example's first token."""
    token_type_ids_BT: Tensor | None = None
    target_mask_BT: Tensor | None = None
    """True where a token's own probability is part of the score."""
    keep: int | None = None
    """How many last positions hold every logit that the score needs; None is all of them."""
    weight_N: Tensor | None = None
    """float32: what each example's loss is multiplied by; None is one."""
    answer_ids_C: Tensor | None = None
    """The token of each answer letter."""
    rows_per_example: int = 1
    lengths_K: tuple[int, ...] = ()
    """Where several members' rows lie below each other: the length that each one's own rows need without padding."""
    part: Part | None = None
    """None for whole batches."""
    own_K: tuple[bool, ...] = ()
    """Whose rows hold answers that the member has just written itself: they are nobody's labels. Empty: no one's."""
    segments_BT: Tensor | None = None
    """Where a sequence holds several examples: which one a token is of, by its place in ``ids``; -1 for padding."""

    def __len__(self) -> int:
        """Return the number of examples, N."""
        return len(self.ids)

    def model_inputs(self) -> dict[str, Tensor]:
        """Return the keyword arguments of the model's forward.

        Of packed rows there is no mask: transformers then has a token see those since positions last began anew.
        """
        inputs = {
            "input_ids": self.input_ids_BT,
            "attention_mask": self.attention_mask_BT if self.segments_BT is None else None,
            "position_ids": self.position_ids_BT,
            "token_type_ids": self.token_type_ids_BT,
        }
        return {name: tensor for name, tensor in inputs.items() if tensor is not None}

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, which a GPU copies from while it computes."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        changed: dict[str, Any] = {name: change(value) for name, value in tensors.items()}
        return replace(self, **changed)


def take_part(batch: Batch, index: int, parts: int) -> Batch:
    """Return one of several nearly equal parts of every member's examples, padded as the whole batch is.

    A member with fewer examples than there are parts gives the last parts its first one, at weight 0.
    """
    members = len(batch.lengths_K)
    of = len(batch) // members
    start, end = of * index // parts, of * (index + 1) // parts
    weight = parts / of if end > start else 0.0
    start, end = (start, end) if end > start else (0, 1)
    rows = batch.rows_per_example
    examples = [k * of + n for k in range(members) for n in range(start, end)]
    row_B = torch.tensor([example * rows + row for example in examples for row in range(rows)])

    def taken(name: str, tensor: Tensor) -> Tensor:
        return tensor[row_B] if name.endswith("_BT") else tensor[examples] if name.endswith("_N") else tensor

    tensors = {name: taken(name, value) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, ids=[batch.ids[n] for n in examples], part=Part(start, of, weight), **tensors)  # type: ignore[arg-type]


class Task(Protocol):
    """What a row means, what the model is asked for, and how its logits become scores and losses."""

    spec: Any
    auto_class: str
    """``AutoModelForSequenceClassification`` or ``AutoModelForCausalLM``."""
    output: str
    """The registered name of what it predicts: ``classes``, ``value``, ``tokens``."""
    num_outputs: int
    """C, how many scores a row gets; 0 where it is scored token by token."""
    no_label: int | float
    """The label of a training row that only a teacher can say something about."""
    label_names: list[str]
    columns: tuple[str, ...]
    """Columns that every set must have, the label's apart."""
    optional_columns: tuple[str, ...]
    label_column: str | None
    """None where the text is its own label."""

    def model_kwargs(self) -> dict[str, Any]:
        """Return what ``auto_class.from_pretrained`` needs beyond the model's name."""

    def forward_kwargs(self, batch: Batch) -> dict[str, Any]:
        """Return what the forward pass needs beyond ``batch.model_inputs()``."""

    def padding_side(self, is_decoder: bool) -> PaddingSide:
        """Return where the tokenizer must pad."""

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that cannot serve the task. Raises: DataError."""

    def content(self, row: Mapping[str, Any]) -> str:
        """Return the row's text, by which duplicates are found. Raises: BadRow."""

    def label(self, row: Mapping[str, Any]) -> int | float | None:
        """Return the row's class or value, or None where it has no label column. Raises: BadRow."""

    def tokenize(self, row: Mapping[str, Any], row_id: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Example, bool]:
        """Return the example and whether it was truncated. Raises: BadRow."""

    def blocks(self, example: Example) -> list[Example]:
        """Return the pieces of an example that are batched on their own; all but language modeling have one."""

    def collate(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Batch:
        """Pad examples on the tokenizer's padding side."""

    def scores(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return float32 scores_NC whose softmax over C is the model's prediction, or which, for C = 1, are it."""

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return the float32 loss_N of each example. Raises: DataError without labels."""


@runtime_checkable
class AnswersInWords(Protocol):
    """A task whose labels stand for something else in every row."""

    def answer_in_words(self, row: Mapping[str, Any], label: str) -> str:
        """Return what a label stands for in a row."""


@runtime_checkable
class ReadsEither(Protocol):
    """A task that knows rows of more than one shape."""

    def columns_for(self, there: Sequence[str], may_ask: bool = False) -> tuple[str, ...]:
        """Return the columns that a set with these columns must have.

        Args:
            may_ask: rows that only ask are fine, too.
        """


@runtime_checkable
class Asks(Protocol):
    """A task whose model can be asked to write."""

    def prompt(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the tokens after which the model is to write. Raises: BadRow."""

    def reference(self, row: Mapping[str, Any]) -> str | None:
        """Return the answer that a row holds, or None where there is none. Raises: BadRow."""

    def ends(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the tokens that end what it writes."""


@runtime_checkable
class ReadsQuestions(Asks, Protocol):
    """A task that learns answers, and to which a set may be put whose rows only ask."""

    def asked(self, row: Mapping[str, Any]) -> str:
        """Return all that a row asks, with or without an answer: by it duplicates are found. Raises: BadRow."""

    def question(self, row: Mapping[str, Any], row_id: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Example, bool]:
        """Return what a row asks, without targets, and whether it was cut. Raises: BadRow, LeftOut."""


@runtime_checkable
class CutsRows(Protocol):
    """A task whose examples are pieces of rows."""

    def document(self, example_id: str) -> str:
        """Return the id of the row that an example is a piece of."""


@runtime_checkable
class WeighsExamples(Protocol):
    """A task whose examples need not count the same in the loss of a step."""

    def weight(self, example: Example) -> float | None:
        """Return what an example counts for beside the others, or None where all count the same."""


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token, or the end token of a decoder that has none; the mask hides it either way."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise DataError("the tokenizer has neither a padding nor an end token", "set its pad_token and save it again")


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a text's tokens and none that the tokenizer would add."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def decode_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of one sequence of tokens, special ones included."""
    text: Any = tokenizer.decode(list(tokens))
    return str(text)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before any text: a start token, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = (n for n in range(len(full)) if full[n : n + len(bare)] == bare)
    return list(full[: next(starts, 0)])


def check_length(spec: TaskSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse more tokens per row than the model has positions.

    Raises:
        DataError: naming both lengths.
    """
    if spec.max_length > tokenizer.model_max_length:
        limit = int(tokenizer.model_max_length)
        raise DataError(f"task.max_length is {spec.max_length}, but the model takes {limit} tokens", f"use {limit}")


def require_text(row: Mapping[str, Any], column: str) -> str:
    """Return a text column's value. Raises: BadRow when it is absent, empty or not text."""
    value = row.get(column)
    if value is None:
        raise BadRow(f"no {column!r}")
    if not isinstance(value, str):
        raise BadRow(f"{column!r} is a {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"{column!r} is empty")
    return value


def collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Pad examples to the longest; left padding brings position ids that start at the first real token."""
    side: PaddingSide = "left" if tokenizer.padding_side == "left" else "right"
    rows = [sequence for example in examples for sequence in example.sequences]
    longest = max(map(len, rows))
    types = [row for example in examples for row in example.token_types or ()]
    spans = [span for example in examples for span in example.spans]
    labels = [example.label for example in examples if example.label is not None]
    mask_BT = torch.stack([_fit(torch.ones(len(row), dtype=torch.int64), longest, 0, side) for row in rows])
    targets = [torch.arange(len(row)) >= span for row, span in zip(rows, spans, strict=False)]
    targets = targets or [_in_ranges(example) for example in examples if example.target_ranges]
    return Batch(
        ids=[example.id for example in examples],
        input_ids_BT=torch.stack([_fit(torch.tensor(row), longest, pad_id(tokenizer), side) for row in rows]),
        attention_mask_BT=mask_BT,
        labels_N=torch.tensor(labels) if len(labels) == len(examples) else None,
        position_ids_BT=_positions(mask_BT) if side == "left" else None,
        token_type_ids_BT=torch.stack([_fit(torch.tensor(t), longest, 0, side) for t in types]) if types else None,
        target_mask_BT=torch.stack([_fit(t, longest, 0, side) for t in targets]) if targets else None,
        rows_per_example=len(examples[0].sequences),
    )


def collate_pack(task: Task, examples_K: Sequence[Sequence[Example]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Pad several members' examples once, to the longest of all: the rows of member k are the k-th block along B."""
    batch = task.collate([example for examples in examples_K for example in examples], tokenizer)
    lengths_K = (max(len(row) for example in examples for row in example.sequences) for examples in examples_K)
    return replace(batch, lengths_K=tuple(lengths_K))


def repeat(batch: Batch, members: int) -> Batch:
    """Return the batch once per member, one below the other, for members that all read the same rows."""
    rows: dict[str, Any] = {
        name: value.repeat(members, *[1] * (value.dim() - 1))
        for name, value in vars(batch).items() if isinstance(value, Tensor) and name.endswith(("_BT", "_N"))
    }
    lengths_K = (batch.input_ids_BT.shape[1],) * members
    return replace(batch, ids=batch.ids * members, lengths_K=lengths_K, **rows)


def token_logprobs(logits_BKV: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logp_BK float32, the log-probability of each token given those before it, and mask_BK.

    Column k belongs to the token at position T - K + k, so that with K = T the columns are the tokens. The
    first column has nothing before it and, like all that is not a target, is 0 and masked.
    """
    assert batch.target_mask_BT is not None
    kept = logits_BKV.shape[1]
    tokens_BK, mask_BK = batch.input_ids_BT[:, -kept:], batch.target_mask_BT[:, -kept:].clone()
    mask_BK[:, 0] = False
    nll = F.cross_entropy(logits_BKV[:, :-1].flatten(0, 1).float(), tokens_BK[:, 1:].flatten(), reduction="none")
    logp_BK = F.pad(-nll.view(len(tokens_BK), kept - 1), (1, 0))
    return logp_BK.masked_fill(~mask_BK, 0.0), mask_BK


def mean_per_example(values_BT: Tensor, batch: Batch) -> Tensor:
    """Return the mean over each example's target tokens, N, of values that belong to the tokens and are 0 elsewhere."""
    assert batch.target_mask_BT is not None
    return sum_per_example(values_BT, batch) / sum_per_example(batch.target_mask_BT.long(), batch)


def sum_per_example(values_BK: Tensor, batch: Batch) -> Tensor:
    """Return the sum over each example's tokens, N, of values that belong to the last K of the T tokens."""
    if batch.segments_BT is None:
        return values_BK.sum(-1)
    of_BK = batch.segments_BT[:, -values_BK.shape[1] :] + 1  # padding is summed too, apart from all examples
    sums = values_BK.new_zeros(len(batch) + 1)
    return sums.index_add(0, of_BK.flatten(), values_BK.flatten())[1:]


def require_labels(batch: Batch) -> Tensor:
    """Return labels_N. Raises: DataError when the batch has none."""
    if batch.labels_N is None:
        raise DataError(f"examples {batch.ids[0]} ... have no labels", "a loss needs a labeled set")
    return batch.labels_N


def _in_ranges(example: Example) -> Tensor:
    position_T = torch.arange(len(example.sequences[0]))
    return torch.stack([(position_T >= first) & (position_T < last) for first, last in example.target_ranges]).any(0)


def _fit(x: Tensor, length: int, value: int, side: PaddingSide) -> Tensor:
    missing = length - x.shape[-1]
    return F.pad(x, (missing, 0) if side == "left" else (0, missing), value=value)


def _positions(mask_BT: Tensor) -> Tensor:
    return (mask_BT.cumsum(-1) - 1).clamp(min=0)
