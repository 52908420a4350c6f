"""Reading a language model's targets: by example id, a shard at a time, from one worker's files or several.

Shapes: P target positions of all asked-for examples, K kept tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import safetensors

from raylora.distill.files import DAMAGED, checked, read_facts
from raylora.distill.keys import Keys, check_same
from raylora.distill.tokens import KIND, concatenate, unpack_shard
from raylora.distill.topk import TopK
from raylora.errors import DataError, StoreError

SHARED = ("teacher_digest", "members", "vocabulary", "k", "temperature")


@dataclass(frozen=True)
class _Shard:
    name: str
    sha256: str
    first_row: int
    examples: int


class TokenTargets:
    """The targets of N examples; numbers are read when asked for, and the shards used last stay in memory."""

    def __init__(
        self, read: Callable[[str], bytes], prefixes: Sequence[str] = (KIND,), cache_bytes: int = 512 * 2**20
    ) -> None:
        """Read the facts alone: of one stream, or of several that taught different rows with the same members.

        Args:
            read: returns the content of a file by its name, or raises FileNotFoundError.
            cache_bytes: shards that stay in memory, as bytes on disk; shuffled reading is slow if few of them fit.

        Raises:
            StoreError: the facts are missing or damaged.
            DataError: the streams belong to different teachers, or one example is in two of them.
        """
        if not prefixes:
            raise DataError("no targets to read", "name at least one prefix")
        all_facts = [read_facts(_read(read, f"{prefix}.json"), f"{prefix}.json", KIND) for prefix in prefixes]
        ids: list[str] = []
        content_hashes: list[str] = []
        self._shards: list[_Shard] = []
        try:
            for name in SHARED:
                values = [facts[name] for facts in all_facts]
                if any(value != values[0] for value in values):
                    raise DataError(f"targets differ in {name}: {values}", "put only those of one teacher together")
            for shard in (shard for facts in all_facts for shard in facts["shards"]):
                self._shards.append(_Shard(shard["name"], shard["sha256"], len(ids), len(shard["ids"])))
                ids += shard["ids"]
                content_hashes += shard["content_hashes"]
            self.positions: int = sum(facts["positions"] for facts in all_facts)
            self.size_bytes: int = sum(facts["size_bytes"] for facts in all_facts)
            first = all_facts[0]
            self.teacher_digest: str = first["teacher_digest"]
            self.members: tuple[int, ...] = tuple(first["members"])
            self.vocabulary: int = first["vocabulary"]
            self.k: int = first["k"]
            self.temperature: float = first["temperature"]
        except (KeyError, TypeError) as error:
            raise StoreError(f"{prefixes[0]}.json is damaged: no {error}", DAMAGED) from error
        self.keys = Keys(ids, content_hashes)
        self._read, self._cache_bytes, self._cached_bytes = read, cache_bytes, 0
        self._cache: OrderedDict[int, tuple[list[TopK], int]] = OrderedDict()

    @property
    def bytes_per_token(self) -> float:
        """Return the measured size of the shards over the number of target positions."""
        return self.size_bytes / self.positions

    def check(
        self, *, teacher_digest: str, vocabulary: int, temperature: float, content_hash_of: Mapping[str, str]
    ) -> None:
        """Refuse a student these targets were not made for, before it is trained.

        Args:
            content_hash_of: the transfer set, from id to the hash of its *token ids*, which another tokenizer changes.

        Raises:
            DataError: another teacher, vocabulary or temperature, an unknown id or changed content.
        """
        check_same("teacher", self.teacher_digest, teacher_digest, "make targets with this teacher")
        check_same("vocabulary", self.vocabulary, vocabulary, "teacher and student need the same tokenizer")
        check_same("temperature", self.temperature, temperature, "make targets at this temperature")
        self.keys.check(content_hash_of)

    def gather(self, ids: Sequence[str], content_hashes: Sequence[str] | None = None) -> tuple[TopK, list[int]]:
        """Return these examples' targets below each other, in their order, and how many positions each has.

        That is the order of ``student_logits[target_mask]``; compare the lengths with the mask's before using them.

        Raises:
            DataError: the teacher has not seen an id or, if hashes are given, has seen other content under it.
            StoreError: a shard is missing or damaged.
        """
        rows = self.keys.rows(ids, content_hashes)
        if not rows:
            raise DataError("no ids were given", "give at least one id")
        found: dict[int, TopK] = {}
        for number, shard in enumerate(self._shards):  # by shard, so that a small cache reads each once per call
            wanted = [row for row in rows if shard.first_row <= row < shard.first_row + shard.examples]
            if wanted:
                examples = self._load(number)
                found |= {row: examples[row - shard.first_row] for row in wanted}
        return concatenate([found[row] for row in rows]), [len(found[row]) for row in rows]

    def _load(self, number: int) -> list[TopK]:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number][0]
        shard = self._shards[number]
        content = checked(_read(self._read, shard.name), shard.name, shard.sha256)
        try:
            examples = unpack_shard(content, self.vocabulary, self.temperature)
        except (KeyError, safetensors.SafetensorError) as error:
            raise StoreError(f"{shard.name} is damaged: {error}", DAMAGED) from error
        self._cache[number] = examples, len(content)
        self._cached_bytes += len(content)
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1][1]
        return examples


def _read(read: Callable[[str], bytes], name: str) -> bytes | None:
    try:
        return read(name)
    except FileNotFoundError:
        return None
