"""Values that are never changed: what changes one returns another, which shares nearly all of its memory.

States of a run are kept, compared and replayed, so none may change; with thousands of jobs none may be copied either.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any, TypeVar

from rpds import HashTrieMap

V = TypeVar("V")


class PersistentMap(Mapping[str, V]):
    """A mapping whose ``set`` and ``remove`` cost O(log n) and leave the old one as it was.

    Like a dict it is read in the order in which keys were first set (which sorts, O(n log n)), and equals a dict with
    the same items.
    """

    __slots__ = ("_entries", "_next_place")

    _entries: HashTrieMap[str, tuple[int, str, V]]
    """Key -> its place in the order, the key, the value."""

    def __init__(self, items: Mapping[str, V] | None = None) -> None:
        items = items or {}
        self._entries = HashTrieMap({key: (place, key, value) for place, (key, value) in enumerate(items.items())})
        self._next_place = len(items)

    def set(self, key: str, value: V) -> PersistentMap[V]:
        """Return the mapping with a value under a key; a key that was there keeps its place."""
        found = self._entries.get(key)
        place = self._next_place if found is None else found[0]
        return self._with(self._entries.insert(key, (place, key, value)), self._next_place + (found is None))

    def remove(self, key: str) -> PersistentMap[V]:
        """Return the mapping without a key. Raises: KeyError."""
        return self._with(self._entries.remove(key), self._next_place)

    def _with(self, entries: HashTrieMap[str, tuple[int, str, V]], next_place: int) -> PersistentMap[V]:
        other: PersistentMap[V] = PersistentMap.__new__(PersistentMap)
        other._entries, other._next_place = entries, next_place
        return other

    def __getitem__(self, key: str) -> V:
        return self._entries[key][2]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._in_order())

    def items(self) -> ItemsView[str, V]:
        """Return keys and values in order."""
        return self._in_order().items()

    def values(self) -> ValuesView[V]:
        """Return the values in the order of their keys."""
        return self._in_order().values()

    def _in_order(self) -> dict[str, V]:
        return {key: value for _, key, value in sorted(self._entries.values(), key=_place)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict(self.items()) == dict(other.items())

    __hash__ = None  # type: ignore[assignment]  # like a dict's: what it holds may not be hashable

    def __repr__(self) -> str:
        return f"PersistentMap({self._in_order()!r})"

    def __reduce__(self) -> Any:
        return PersistentMap, (self._in_order(),)


def _place(entry: tuple[int, str, Any]) -> int:
    return entry[0]


@dataclass(frozen=True)
class IntSet:
    """A set of small whole numbers, as the bits of one: a change copies n / 8 bytes, of 10,000 numbers 1,250."""

    bits: int = 0

    @classmethod
    def where(cls, chosen: Sequence[bool]) -> IntSet:
        """Return the set of the places that are true."""
        return cls(int("".join("01"[bool(one)] for one in reversed(chosen)) or "0", 2))

    def add(self, number: int) -> IntSet:
        """Return the set with a number."""
        return IntSet(self.bits | (1 << number))

    def discard(self, number: int) -> IntSet:
        """Return the set without a number, which need not be in it."""
        return IntSet(self.bits & ~(1 << number))

    def smallest(self) -> int:
        """Return the smallest number. Raises: ValueError if there is none."""
        if not self.bits:
            raise ValueError("the set is empty")
        return (self.bits & -self.bits).bit_length() - 1

    def __len__(self) -> int:
        return self.bits.bit_count()

    def __iter__(self) -> Iterator[int]:
        return (number for number, bit in enumerate(reversed(f"{self.bits:b}")) if bit == "1")
