"""All sets of a run: read, split without leakage, tokenized, counted and described."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from raylora.data.splits import Pool, divide, fresh, judge, read_pool
from raylora.data.task import UNLABELED, BadRow, Example, LeftOut, ReadsQuestions, Task, decode_text
from raylora.errors import DataError
from raylora.spec import DataSpec, EvaluationSpec, SetSpec


@dataclass(frozen=True)
class LoadedSet:
    """The examples of one set, and what was done to its rows."""

    name: str
    origin: str
    examples: list[Example]
    labeled: bool
    truncated: int
    """Rows cut to ``task.max_length``."""
    skipped: int
    """Bad rows left out under ``on_bad_row: skip``."""
    duplicates: int
    """Rows left out because their text was already used, in this set or in an earlier one."""
    content_hash: str
    """SHA-256 of ids, tokens and labels: what the model will see."""
    left_out: int = 0
    """Rows that the task's settings leave out, such as those that are too long."""
    text_keys: frozenset[str] = frozenset()
    """By which a text is found again in another set; see :func:`raylora.data.splits.text_key`."""
    only_asks: bool = False
    """Whether the examples are prompts without answers: nothing is predicted of them, but they can be answered."""
    content_of: Mapping[str, str] = field(default_factory=dict)
    """Row id -> hash of its text to the letter, which says whether a model with another tokenizer read the same."""

    def describe(self, label_names: Sequence[str]) -> str:
        """Return one line for people."""
        said, without = self._labels(label_names)
        longest = max(len(sequence) for example in self.examples for sequence in example.sequences)
        kind = "prompts without answers" if self.only_asks else "examples"
        parts = [f"{self.name}: {len(self.examples):,} {kind} from {self.origin}"]
        if said or not self.labeled:
            parts.append(f"labels {said}" if said else "unlabeled")
        parts.append(f"longest {longest} tokens")
        counts = (without, "without label"), (self.truncated, "truncated"), (self.skipped, "skipped")
        for count, what in (*counts, (self.left_out, "too long and left out"), (self.duplicates, "duplicates")):
            if count:
                parts.append(f"{count:,} {what}")
        return "; ".join(parts)

    def _labels(self, label_names: Sequence[str]) -> tuple[str, int]:
        """Return the shares of the classes or the range of the values in words, and how many rows lack a label."""
        found = [example.label for example in self.examples]
        values = [label for label in found if isinstance(label, float) and not math.isnan(label)]
        if values:
            said = f"{min(values):g} to {max(values):g}, mean {sum(values) / len(values):.3g}"
            return said, len(found) - len(values)
        classes = Counter(label for label in found if isinstance(label, int) and label != UNLABELED)
        said = ", ".join(f"{label_names[label]} {classes[label]:,}" for label in sorted(classes))
        return said, len(found) - classes.total() if classes else 0

    def preview(self, count: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return the first examples as id, label and decoded tokens, one line each."""
        return [line for example in self.examples[:count] for line in _shown(example, tokenizer)]


@dataclass(frozen=True)
class DataSets:
    """Every set of a run."""

    train: LoadedSet
    validation: LoadedSet
    test: LoadedSet
    in_distribution: dict[str, LoadedSet]
    out_of_distribution: dict[str, LoadedSet]
    label_names: list[str]

    def all(self) -> list[LoadedSet]:
        """Return the sets in reading order."""
        named = [*self.in_distribution.values(), *self.out_of_distribution.values()]
        return [self.train, self.validation, self.test, *named]

    def describe(self) -> list[str]:
        """Return one line per set."""
        return [loaded.describe(self.label_names) for loaded in self.all()]

    def preview(self, count: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return the first tokenized training examples, for people to check the format."""
        return self.train.preview(count, tokenizer)

    def evaluated_keys(self) -> set[str]:
        """Return the keys of all texts that predictions are scored on."""
        return {key for loaded in self.all() if loaded is not self.train for key in loaded.text_keys}

    def content_hash(self) -> str:
        """Return one SHA-256 over all sets: a resumed run must find the same."""
        text = json.dumps([[loaded.name, loaded.content_hash] for loaded in self.all()])
        return hashlib.sha256(text.encode()).hexdigest()


def load_sets(
    data: DataSpec,
    evaluation: EvaluationSpec,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    base_dir: Path | None = None,
    transfer: SetSpec | None = None,
    asks: bool = False,
) -> DataSets:
    """Read, check, split and tokenize every set of a run; relative file paths start at ``base_dir``.

    Rows of ``transfer`` join the training set without labels, but for texts that are in any other set; with ``asks``
    nothing but what they ask is read of them.

    ``validation_rows`` and ``test_rows`` size the sets that are split off the training set; sets of their own
    are used whole, or as far as their ``rows`` say.

    Raises:
        DataError: a set is missing, too small, has bad rows, or does not fit the task or the tokenizer.
    """
    task.check(tokenizer)
    own = {name: spec for name, spec in (("validation", data.validation), ("test", data.test)) if spec is not None}
    sizes = {"test": data.test_rows, "validation": data.validation_rows}
    pool = read_pool("train", data.train, data, task, True, base_dir)
    train, parts = divide(pool, {name: size for name, size in sizes.items() if name not in own}, data)
    used = train.keys().union(*(part.keys() for part in parts.values()))
    for name, spec in own.items():
        parts[name] = fresh(read_pool(name, spec, data, task, True, base_dir), used)
        used |= parts[name].keys()
    known = train.keys() | parts["validation"].keys()

    def named(specs: Mapping[str, SetSpec], labeled: bool) -> dict[str, LoadedSet]:
        pools = {
            name: read_pool(name, spec, data, task, labeled, base_dir, may_ask=not labeled)
            for name, spec in specs.items()
        }
        return {name: _tokenized(fresh(pool, known), data, task, tokenizer) for name, pool in pools.items()}

    loaded = _tokenized(train, data, task, tokenizer)
    _check_classes(loaded, task)
    sets = DataSets(
        train=loaded,
        validation=_tokenized(parts["validation"], data, task, tokenizer),
        test=_tokenized(parts["test"], data, task, tokenizer),
        in_distribution=named(evaluation.in_distribution, labeled=True),
        out_of_distribution=named(evaluation.out_of_distribution, labeled=False),
        label_names=list(task.label_names),
    )
    if transfer is None:
        return sets
    seen = set(loaded.text_keys) | sets.evaluated_keys()
    extra = fresh(read_pool("transfer", transfer, data, task, False, base_dir, may_ask=asks), seen)
    extra = replace(extra, only_asks=asks and isinstance(task, ReadsQuestions))
    return replace(sets, train=_with_transfer(loaded, _tokenized(extra, data, task, tokenizer), task.no_label))


def _tokenized(pool: Pool, data: DataSpec, task: Task, tokenizer: PreTrainedTokenizerBase) -> LoadedSet:
    examples: list[Example] = []
    content_of: dict[str, str] = {}
    bad: list[str] = []
    truncated = left_out = 0
    tokenize, content = task.tokenize, task.content
    if pool.only_asks and isinstance(task, ReadsQuestions):
        tokenize, content = task.question, task.asked
    for good in pool.rows:
        try:
            example, cut = tokenize(good.row.values, good.id, tokenizer)
            content_of[good.id] = content_hash(content(good.row.values))
        except LeftOut:
            left_out += 1
            continue
        except BadRow as error:
            bad.append(f"{good.row.place}: {error}")
            continue
        truncated += cut
        examples += task.blocks(example)
    judge(pool.name, bad, len(pool.rows), data)
    if not examples:
        said = f": {left_out:,} are too long" if left_out else ""
        raise DataError(f"{pool.name}: {pool.origin} has no usable row{said}", "check its columns and its text")
    skipped, digest = pool.skipped + len(bad), digest_of(examples)
    return LoadedSet(
        pool.name, pool.origin, examples, pool.labeled, truncated, skipped, pool.duplicates, digest, left_out,
        frozenset(pool.keys()), pool.only_asks, content_of,
    )


def _with_transfer(train: LoadedSet, extra: LoadedSet, no_label: int | float) -> LoadedSet:
    """Return the training set with rows that only a teacher labels; their ids cannot be mistaken for its own."""
    examples = [
        *train.examples,
        *(replace(example, id=f"transfer:{example.id}", label=no_label) for example in extra.examples),
    ]
    return replace(
        train, origin=f"{train.origin} and {extra.origin}", examples=examples, labeled=False,
        truncated=train.truncated + extra.truncated, skipped=train.skipped + extra.skipped,
        duplicates=train.duplicates + extra.duplicates, left_out=train.left_out + extra.left_out,
        content_hash=digest_of(examples),
        text_keys=train.text_keys | extra.text_keys,
        content_of={**train.content_of, **{f"transfer:{i}": content for i, content in extra.content_of.items()}},
    )


def _shown(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a line per sequence; where only some tokens are learned, they stand in [[ ]]."""
    if not example.target_ranges:
        label = "" if example.label is None else f", label {example.label}"
        return [
            f"{example.id} [{len(sequence)} tokens{label}] {tokenizer.decode(list(sequence))!r}"
            for sequence in example.sequences
        ]
    tokens, text, done = list(example.sequences[0]), "", 0
    for first, last in example.target_ranges:
        text += f"{decode_text(tokenizer, tokens[done:first])}[[{decode_text(tokenizer, tokens[first:last])}]]"
        done = last
    learned = sum(last - first for first, last in example.target_ranges)
    text += decode_text(tokenizer, tokens[done:])
    return [f"{example.id} [{len(tokens)} tokens, {learned} of them in [[ ]] are learned] {text!r}"]


def content_hash(content: str) -> str:
    """Return a hash of a text to the letter."""
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _check_classes(train: LoadedSet, task: Task) -> None:
    labels = {example.label for example in train.examples}
    if task.label_column is not None and len(labels) == 1:
        (only,) = labels
        name = task.label_names[only] if isinstance(only, int) else only
        raise DataError(
            f"all {len(train.examples):,} training rows of {train.origin} have one label, {name!r}",
            "check the label column and how the file is sorted: there is nothing to learn",
        )


def digest_of(examples: Sequence[Example]) -> str:
    """Return the SHA-256 of ids, tokens and labels."""
    digest = hashlib.sha256()
    for example in examples:
        facts = [example.id, example.sequences, example.label, *example.target_ranges]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()
