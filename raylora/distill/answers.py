"""A teacher's answers as what a student learns: tokens by row, and which rows are left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raylora.distill.files import pack_facts, read_facts
from raylora.distill.keys import Keys, check_same

FILE = "answers.json"
_KIND = "answers"


@dataclass(frozen=True)
class AnsweredRows:
    """What one teacher answered to some rows, as far as a student is to learn it."""

    keys: Keys
    """Of every row that was asked, with a hash of what the teacher read."""
    teacher_digest: str
    answers: Mapping[str, Sequence[int]]
    """Row -> the tokens of its answer, with the one that ends it."""
    left_out: Mapping[str, str]
    """Row -> why its answer is not learned."""

    @property
    def counts(self) -> dict[str, int]:
        """How many rows are left out, by reason."""
        return dict(Counter(self.left_out.values()))

    def check(self, teacher_digest: str, content_hash_of: Mapping[str, str]) -> None:
        """Check that these are the answers to a student's rows.

        Raises:
            DataError: another teacher gave them, or they are answers to other rows.
        """
        hint = "distill again under another distill.name, or delete the student"
        check_same("teacher of the answers", self.teacher_digest, teacher_digest, hint)
        self.keys.check(content_hash_of)

    def to_files(self) -> dict[str, bytes]:
        """Return the files that :meth:`read` reads."""
        return {FILE: pack_facts(_KIND, {
            "teacher": self.teacher_digest, "ids": self.keys.ids, "content_hashes": self.keys.content_hashes,
            "answers": {row: list(tokens) for row, tokens in self.answers.items()}, "left_out": dict(self.left_out),
        })}

    @classmethod
    def read(cls, files: Mapping[str, bytes]) -> AnsweredRows:
        """Return what was written. Raises: StoreError if it is missing or damaged."""
        facts = read_facts(files.get(FILE), FILE, _KIND)
        return cls(
            Keys(facts["ids"], facts["content_hashes"]), facts["teacher"],
            {row: tuple(tokens) for row, tokens in facts["answers"].items()}, facts["left_out"],
        )
