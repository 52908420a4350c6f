"""Targets of classifiers and regressions: every member's output for every example, keyed by the example's id.

Shapes: N examples, B examples of a batch, M members, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from raylora.distill.files import DAMAGED, checked, pack_facts, read_facts, sha256
from raylora.distill.keys import Keys, check_same
from raylora.errors import DataError, StoreError

FACTS, TENSORS = "targets.json", "targets.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class MemberTargets:
    """What both kinds share: N rows of M members' outputs, and what they belong to."""

    output: ClassVar[str]
    """The output that its teacher has; files say it."""
    dtype: ClassVar[torch.dtype]
    dimensions: ClassVar[int]

    keys: Keys
    teacher_digest: str
    members: tuple[int, ...]
    """The members' numbers within the teacher, rising, one per column."""
    values: Tensor
    """N x M x C or N x M, on the CPU."""
    label_names: tuple[str, ...] = ()
    rounding_error: float = 0.0
    """The most by which storing changed a value, clipping included; measured, not estimated."""
    weights: tuple[float, ...] | None = None
    """What each member weighs, one per column; None where all weigh alike."""

    def __post_init__(self) -> None:
        expected = (len(self.keys), len(self.members), len(self.label_names))[: self.dimensions]
        if self.values.dtype != self.dtype or tuple(self.values.shape) != expected:
            raise DataError(
                f"targets of {self.output} have shape {tuple(self.values.shape)} and type {self.values.dtype}",
                f"expected {expected} (examples, members, classes) of {self.dtype}",
            )
        if self.weights is not None and len(self.weights) != len(self.members):
            raise DataError(f"{len(self.weights)} weights for {len(self.members)} members", "give one per member")
        if not expected[0] or not expected[1] or list(self.members) != sorted(set(self.members)):
            raise DataError(
                f"{expected[0]} examples, members {list(self.members)}",
                "give at least one of each, members in rising order",
            )

    def check(self, *, teacher_digest: str, label_names: Sequence[str], content_hash_of: Mapping[str, str]) -> None:
        """Refuse a student these targets were not made for, before it is trained.

        Args:
            content_hash_of: the transfer set, from id to content hash.

        Raises:
            DataError: another teacher, other labels (or another order of them), an unknown id or changed content.
        """
        check_same("teacher", self.teacher_digest, teacher_digest, "make targets with this teacher")
        hint = "teacher and student need the same labels in the same order"
        check_same("labels", self.label_names, tuple(label_names), hint)
        self.keys.check(content_hash_of)

    def gather(self, ids: Sequence[str], content_hashes: Sequence[str] | None = None) -> Tensor:
        """Return the members' outputs for these examples, float32 B x M x C or B x M.

        Raises:
            DataError: the teacher has not seen an id or, if hashes are given, has seen other content under it.
        """
        return self.values[self.keys.rows(ids, content_hashes)].float()

    def to_files(self) -> dict[str, bytes]:
        """Return the files that hold these targets: numbers in safetensors, facts in JSON."""
        content = safetensors.torch.save({"values": self.values.contiguous()})
        facts = {
            "sha256": sha256(content), "teacher_digest": self.teacher_digest, "members": self.members,
            "label_names": self.label_names, "rounding_error": self.rounding_error, "ids": self.keys.ids,
            "content_hashes": self.keys.content_hashes,
            **({} if self.weights is None else {"weights": self.weights}),
        }
        return {TENSORS: content, FACTS: pack_facts(self.output, facts)}

    @classmethod
    def from_outputs(
        cls: type[T], keys: Keys, outputs: Tensor, *, teacher_digest: str, members: Sequence[int],
        label_names: Sequence[str] = (),
    ) -> T:
        """Return targets as they are stored, from N x M x C or N x M outputs. Raises: DataError for NaN."""
        raise NotImplementedError

    @classmethod
    def from_files(cls: type[T], files: Mapping[str, bytes]) -> T:
        """Return what :meth:`to_files` wrote.

        Raises:
            StoreError: a file is missing or damaged, of another format or another kind.
        """
        facts = read_facts(files.get(FACTS), FACTS, cls.output)
        try:
            keys = Keys(facts["ids"], facts["content_hashes"])
            return cls(
                keys=keys, teacher_digest=facts["teacher_digest"], members=tuple(facts["members"]),
                values=safetensors.torch.load(checked(files.get(TENSORS), TENSORS, facts["sha256"]))["values"],
                label_names=tuple(facts["label_names"]), rounding_error=facts["rounding_error"],
                weights=tuple(facts["weights"]) if "weights" in facts else None,
            )
        except (KeyError, TypeError, DataError, safetensors.SafetensorError) as error:
            raise StoreError(f"{FACTS} and {TENSORS} do not fit together: {error}", DAMAGED) from error


T = TypeVar("T", bound=MemberTargets)


def targets_class(output: str) -> type[MemberTargets]:
    """Return the targets of a teacher that has this output, by row."""
    return next(one for one in _CLASSES if one.output == output)


class ClassificationTargets(MemberTargets):
    """Logits N x M x C in float16: off by at most ``|z| / 2048``, 0.004 for the logits below 8 that are usual."""

    dtype = torch.float16
    dimensions = 3
    output = "classes"

    @classmethod
    def from_outputs(
        cls, keys: Keys, outputs: Tensor, *, teacher_digest: str, members: Sequence[int],
        label_names: Sequence[str] = (),
    ) -> ClassificationTargets:
        """Round logits to float16, clipped to its range. Raises: DataError for NaN and for shapes that do not fit."""
        logits_NMC = outputs
        _refuse_nan(logits_NMC, members)
        stored_NMC = logits_NMC.detach().cpu().clamp(-65504.0, 65504.0).half()
        error_NMC = (logits_NMC.detach().cpu().double() - stored_NMC.double()).abs()
        error_NMC.masked_fill_(error_NMC.isinf(), 0.0)  # an infinite logit is meant: "never this class"
        return cls(
            keys=keys, teacher_digest=teacher_digest, members=tuple(members), values=stored_NMC,
            label_names=tuple(label_names), rounding_error=float(error_NMC.max()) if error_NMC.numel() else 0.0,
        )


class RegressionTargets(MemberTargets):
    """Values N x M in float32: so few that rounding them would save nothing, and float16 would cost 0.002 of a 5."""

    dtype = torch.float32
    dimensions = 2
    output = "value"

    @classmethod
    def from_outputs(
        cls, keys: Keys, outputs: Tensor, *, teacher_digest: str, members: Sequence[int],
        label_names: Sequence[str] = (),
    ) -> RegressionTargets:
        """Keep values as they are. Raises: DataError for NaN, infinity and shapes that do not fit."""
        values_NM = outputs
        _refuse_nan(torch.where(values_NM.isinf(), torch.nan, values_NM), members)
        return cls(
            keys=keys, teacher_digest=teacher_digest, members=tuple(members), values=values_NM.detach().cpu().float()
        )


def read_targets(files: Mapping[str, bytes]) -> MemberTargets:
    """Return targets of whichever output was written. Raises: StoreError as :meth:`MemberTargets.from_files`."""
    facts = read_facts(files.get(FACTS), FACTS, *(one.output for one in _CLASSES))
    return targets_class(facts["kind"]).from_files(files)


_CLASSES: tuple[type[MemberTargets], ...] = (ClassificationTargets, RegressionTargets)


def merge(shards: Sequence[T]) -> T:
    """Return the targets of all rows from workers that taught some rows each.

    Raises:
        DataError: the shards have different teachers, members or labels, or one example is in two of them.
    """
    first = _agreed(shards, "members", "weights")
    ids = [example_id for shard in shards for example_id in shard.keys.ids]
    return replace(
        first,
        keys=Keys(ids, [content for shard in shards for content in shard.keys.content_hashes]),
        values=torch.cat([shard.values for shard in shards]),
        rounding_error=max(shard.rounding_error for shard in shards),
    )


def _agreed(shards: Sequence[T], *more: str) -> T:
    if not shards:
        raise DataError("no targets to put together", "give at least one shard")
    for name in ("teacher_digest", "label_names", *more):
        values = [getattr(shard, name) for shard in shards]
        different = [value for value in values if value != values[0]]
        if different:
            raise DataError(
                f"targets differ in {name}: {values[0]!r} and {different[0]!r}",
                "make them with one teacher and the same settings",
            )
    return shards[0]


def _refuse_nan(values: Tensor, members: Sequence[int]) -> None:
    bad = [member for m, member in enumerate(members) if values[:, m : m + 1].isnan().any()]
    if bad:
        raise DataError(f"members {bad} predict NaN or, for a regression, infinity", "look at their training curves")
