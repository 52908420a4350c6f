"""What passes through processes that have no use for it.

A spec and what a worker is to do are made of kinds, and to unpickle a kind is to import torch. A coordinator and a
keeper compute nothing: each would take a second and 200 MB for it, one after the other, before a worker is started.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from ray import cloudpickle

T = TypeVar("T")


@dataclass(frozen=True)
class Sealed(Generic[T]):
    """Something for another process: whoever carries it imports nothing that it is made of."""

    content: bytes

    @classmethod
    def of(cls, thing: T) -> Sealed[T]:
        """Return it, sealed."""
        return cls(cloudpickle.dumps(thing))

    def open(self) -> T:
        """Return what is in it, a new object each time; its modules are imported."""
        return cast(T, cloudpickle.loads(self.content))
