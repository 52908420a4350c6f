"""From an example's id to its row: the only way into targets, because positions change with every shuffle."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from raylora.errors import DataError

SHOWN = 3


def content_hash(content: str) -> str:
    """Return what an example's content is known by again: its text or, if tokenizers may differ, its token ids."""
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


class Keys:
    """The ids of N examples, all different, and a hash of what the teacher read under each of them."""

    def __init__(self, ids: Sequence[str], content_hashes: Sequence[str]) -> None:
        """Take N of both. Raises: DataError for an id given twice or another number of hashes."""
        if len(ids) != len(content_hashes):
            raise DataError(f"{len(content_hashes)} content hashes for {len(ids)} ids", "give one per example")
        self.ids, self.content_hashes = tuple(ids), tuple(content_hashes)
        self.row_of = {example_id: row for row, example_id in enumerate(self.ids)}
        if len(self.row_of) != len(self.ids):
            twice = [example_id for example_id, count in Counter(self.ids).items() if count > 1]
            raise DataError(f"ids given more than once: {listed(twice)}", "every example needs an id of its own")

    def __len__(self) -> int:
        """Return N."""
        return len(self.ids)

    def rows(self, ids: Sequence[str], content_hashes: Sequence[str] | None = None) -> list[int]:
        """Return the rows of these examples, in their order.

        Raises:
            DataError: the teacher has not seen an id, or has seen other content under it.
        """
        missing = [example_id for example_id in ids if example_id not in self.row_of]
        if missing:
            raise DataError(
                f"the teacher has no targets for {len(missing)} of {len(ids)} examples: {listed(missing)}",
                "make targets for this data set, or train on the set that the teacher has seen",
            )
        rows = [self.row_of[example_id] for example_id in ids]
        if content_hashes is not None:
            self._check_contents(rows, content_hashes)
        return rows

    def check(self, content_hash_of: Mapping[str, str]) -> None:
        """Check a whole data set, id by id, before training starts. Raises: DataError, as for :meth:`rows`."""
        self.rows(list(content_hash_of), list(content_hash_of.values()))

    def _check_contents(self, rows: Sequence[int], content_hashes: Sequence[str]) -> None:
        changed = [
            self.ids[row] for row, found in zip(rows, content_hashes, strict=True) if found != self.content_hashes[row]
        ]
        if changed:
            raise DataError(
                f"{len(changed)} of {len(rows)} examples are not what the teacher read under their ids: "
                f"{listed(changed)}",
                "the data, its order or the tokenizer has changed: make the targets again",
            )


def check_same(what: str, teacher: object, student: object, hint: str) -> None:
    """Raise DataError, showing both, unless two facts are equal."""
    if teacher != student:
        raise DataError(f"{what}: the targets have {_shown(teacher)}, the student asks for {_shown(student)}", hint)


def listed(ids: Sequence[str]) -> str:
    """Return the first few ids for a message."""
    return ", ".join(map(repr, ids[:SHOWN])) + (", ..." if len(ids) > SHOWN else "")


def _shown(value: object) -> str:
    return ", ".join(map(repr, value)) or "none" if isinstance(value, tuple | list) else repr(value)
