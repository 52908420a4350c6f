"""What the members of one ensemble differ in beside their seeds: ``ensemble.vary``.

A grid gives member m the combination m modulo their number, so that a run that grows goes on with it; of the keys in
alphabetical order the last one changes fastest. A range is drawn
from for each member by its own seed. A list says of each member what it has that is not the run's.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from raylora import registry
from raylora.spec.base import Frozen

SHARED_FORWARD = (
    "optimization.lr", "optimization.lora_plus_ratio", "optimization.warmup", "optimization.schedule",
    "optimization.optimizer", "optimization.betas", "optimization.eps", "optimization.clip_norm",
    "ensemble.regularizers.decay_a", "ensemble.regularizers.decay_b",
    "ensemble.regularizers.decay_head", "ensemble.regularizers.early_stopping",
    "ensemble.bootstrap", "ensemble.data_fraction", "adapter",
)
"""What is a member's own, or multiplies beside the others': members that differ in it share a forward."""
OWN_FORWARD = ("ensemble.regularizers.kl",)
"""What the forward as a whole depends on: members that differ in it are in packs of their own."""
LAYERS = ("target_modules", "layers")
"""What says which layers an adapter is in: a whole adapter that leaves it out has the run's."""


class RangeSpec(Frozen):
    """A number that is drawn for each member between two ends."""

    low: float
    """The lower end."""
    high: float
    """The upper end."""
    log: bool = Field(default=False)
    """Draw its logarithm evenly, as suits a learning rate."""

    @model_validator(mode="after")
    def _ends_in_order(self) -> RangeSpec:
        if not (math.isfinite(self.low) and math.isfinite(self.high)) or self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log: true needs low above 0, and it is {self.low:g}")
        return self

    def at(self, share: float) -> float:
        """Return the number that lies a share of the way from the lower end to the upper one."""
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)


Varied = dict[str, list[Any] | RangeSpec] | list[dict[str, Any]]


def check_keys(vary: Varied, members: int) -> None:
    """Refuse keys that members of one run have in common, and too few or too many members.

    Raises:
        ValueError: with the key, and what can be varied.
    """
    if not vary:
        raise ValueError("vary: says nothing that members differ in: leave it out")
    if isinstance(vary, list):
        keys = [key for own in vary for key in own]
        if len(vary) != members:
            raise ValueError(f"vary: says what {len(vary)} members have, and there are {members}: one entry each")
    else:
        keys = list(vary)
        empty = [key for key, values in vary.items() if isinstance(values, list) and not values]
        if empty:
            raise ValueError(f"vary: {empty[0]} has no values")
        size = combinations(vary)
        if size > members:
            raise ValueError(f"vary: its values make {size} combinations, and there are {members} members: "
                             f"set ensemble.members to {size} or a multiple of it")
    for key in keys:
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in (*SHARED_FORWARD, *OWN_FORWARD)):
            raise ValueError(f"vary: members of one run do not differ in {key!r}; they can in "
                             + ", ".join((*SHARED_FORWARD, *OWN_FORWARD)))


def varied_settings(vary: Varied | None, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return of each member, by its seed, the dotted keys that are its own and their values."""
    if vary is None:
        return [{} for _ in seeds]
    if isinstance(vary, list):
        return [dict(own) for own in vary]
    grid = _grid(vary)
    ranges = {key: values for key, values in vary.items() if isinstance(values, RangeSpec)}
    return [
        {**grid[m % len(grid)], **{key: _drawn(key, values, seed) for key, values in sorted(ranges.items())}}
        for m, seed in enumerate(seeds)
    ]


def combinations(vary: Varied) -> int:
    """Return how many members it takes to try everything that stands in lists."""
    return len(vary) if isinstance(vary, list) else len(_grid(vary))


def with_settings(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec's plain data with values at dotted keys, nothing of the old data touched."""
    found = dict(content)
    for key, value in settings.items():
        if key == "adapter" and isinstance(value, Mapping):  # of another kind it may be, with other keys
            value = {own: found["adapter"][own] for own in LAYERS if _has_layers(value)} | dict(value)
        *sections, last = key.split(".")
        at = found
        for part in sections:
            at[part] = dict(at.get(part) or {})
            at = at[part]
        at[last] = value
    return found


def _has_layers(adapter: Mapping[str, Any]) -> bool:
    kind = adapter.get("kind")  # an unknown one is refused by name when it is read
    return kind not in registry.REGISTRY["adapter"] or getattr(registry.load("adapter", kind), "HAS_TARGETS", True)


def in_words(value: Any) -> str:
    """Return a value of a setting as tables show it: of an adapter its kind, and its keys in brackets."""
    if not isinstance(value, Mapping):
        return str(value)
    others = ", ".join(f"{key} {own}" for key, own in sorted(value.items()) if key != "kind")
    return " ".join(filter(None, (str(value.get("kind", "")), f"({others})" if others else "")))


def _grid(vary: Mapping[str, list[Any] | RangeSpec]) -> list[dict[str, Any]]:
    # In an order that no file changes: two specs with one digest have one grid.
    lists = {key: values for key, values in sorted(vary.items()) if isinstance(values, list)}
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _drawn(key: str, values: RangeSpec, seed: int) -> float:
    # Of a text, so that neighbouring seeds are far apart; to six digits, so that it reads well and is what is written.
    return float(f"{values.at(random.Random(f'vary|{key}|{seed}').random()):.6g}")
