"""What the trunk makes of every training row, kept on disk: from the second epoch on nothing below the adapters is run.

Rows of like length are computed together and kept in one file, a shard. Which rows those are follows from the rows
alone, so a shard that is missing, torn or lost comes out the same whenever and by whomever it is made again. What
training reads is always what was rounded for the file, the first time too.

A shard's file has the bfloat16 activations of its rows' real tokens, row after row, and ends with their checksum.

Shapes: U rows that are asked for, B rows of a shard, N real tokens of a shard, T tokens, D the width between blocks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylora.data.task import Batch, Example, collate
from raylora.engine.model.base import Base
from raylora.engine.model.blocks import find_blocks
from raylora.engine.model.trunk import Trunk

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Raised when what is in the files, or which rows are together, changes."""
_SHARD_TOKENS = 4096
"""Padded tokens that are computed at a time: enough for efficient products, few enough to hold beside training."""
_MAPPED = 4096
"""Files mapped at a time; the kernel allows some ten thousand."""
_CHECKSUM = 16

_Row = tuple[tuple[int, ...], tuple[int, ...]]
"""A row's tokens, and their types where the model has such."""


@dataclass(frozen=True)
class _Place:
    """Where a row's activations are."""

    shard: int
    start: int
    end: int


class TrunkCache:
    """The trunk's activations of a run's training rows, by content."""

    def __init__(
        self, base: Base, trunk: Trunk, examples: Sequence[Example], folder: Path, limit_bytes: int, identity: str
    ) -> None:
        """Lay out the shards; what is in them is computed when it is first read.

        Args:
            examples: the training set.
            folder: holds a folder of this base and these rows; several processes may use it at a time.
            limit_bytes: shards are kept up to so many bytes, those of the longest rows first; rows beyond are computed
                whenever they are read, as without a cache.
            identity: what of the base is not seen in its weights.
        """
        self.base, self.trunk = base, trunk
        config: Any = base.model.config
        self._width = int(config.get_text_config().hidden_size)
        shards = _shards(examples)
        ends = accumulate(2 * self._width * sum(len(tokens) for tokens, _ in shard) for shard in shards)
        self._shards = [shard for shard, end in zip(shards, ends, strict=True) if end <= limit_bytes]
        self._places = dict(pair for number, shard in enumerate(self._shards) for pair in _places(number, shard))
        self.rows, self.all_rows = len(self._places), sum(map(len, shards))
        self.folder = folder / _key(base, trunk, shards, identity)
        self._mapped: OrderedDict[int, Tensor] = OrderedDict()

    @torch.no_grad()
    def read(self, batch: Batch, first_U: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return hidden_UTD, on the base's device and in its type, of some rows of a batch; padding is zero.

        Args:
            first_U: which rows of the batch.
            inputs: what the model's forward is given for them, for those that are not kept.
        """
        mask_UT = batch.attention_mask_BT.cpu()[first_U].bool()
        tokens_U, types_U = (_rows(x_BT, first_U, mask_UT) for x_BT in (batch.input_ids_BT, batch.token_type_ids_BT))
        places = [self._places.get(row) for row in zip(tokens_U, types_U, strict=True)]
        hidden_UTD = torch.zeros(*mask_UT.shape, self._width, dtype=torch.bfloat16)
        for u, place in enumerate(places):
            if place is not None:
                hidden_UTD[u, mask_UT[u]] = self._shard(place.shard)[place.start : place.end]
        hidden_UTD = hidden_UTD.to(self.base.device).to(self.base.dtype)
        beyond = [u for u, place in enumerate(places) if place is None]
        if beyond:
            picked = {name: value[beyond] if isinstance(value, Tensor) else value for name, value in inputs.items()}
            hidden_UTD[beyond] = self.trunk.run(picked)
        return hidden_UTD

    # --- one shard ----------------------------------------------------------------------------------
    def _shard(self, number: int) -> Tensor:
        """Return a shard's activations, N x D, mapped from its file, which is made if it is not there or not whole."""
        found = self._mapped.get(number)
        if found is not None:
            return found
        found = self._map(number)
        if found is None:
            computed = self._compute(number)
            self._write(number, computed)
            found = self._map(number)
            if found is None:  # there is no room on the disk: it is computed again when it is next read
                return computed
        self._mapped[number] = found
        if len(self._mapped) > _MAPPED:
            self._mapped.popitem(last=False)
        return found

    def _compute(self, number: int) -> Tensor:
        """Return the trunk's activations of a shard's rows, rounded; they are a batch of their own."""
        examples = [
            Example("", (tokens,), None, token_types=(types,) if types else None)
            for tokens, types in self._shards[number]
        ]
        batch = collate(examples, self.base.tokenizer).to(self.base.device)
        options = {"use_cache": False} if self.base.is_decoder else {}
        hidden_BTD = self.trunk.run({**batch.model_inputs(), **options})
        return hidden_BTD[batch.attention_mask_BT.bool()].to(torch.bfloat16).cpu()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def _map(self, number: int) -> Tensor | None:
        path = self._path(number)
        size = self._width * sum(len(tokens) for tokens, _ in self._shards[number])
        if not path.is_file() or path.stat().st_size != 2 * size + _CHECKSUM:
            return None
        found = torch.from_file(str(path), shared=False, size=size, dtype=torch.bfloat16).view(-1, self._width)
        with path.open("rb") as file:
            file.seek(2 * size)
            checksum = file.read()
        return found if checksum == _checksum(found) else None

    def _write(self, number: int, hidden_ND: Tensor) -> None:
        """Publish a shard whole; who writes the same one at the same time writes the same bytes."""
        temporary = self.folder / f"{number:06d}.tmp-{uuid.uuid4().hex[:8]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(_bytes(hidden_ND))
                file.write(_checksum(hidden_ND))
            os.replace(temporary, self._path(number))
        except OSError as error:
            temporary.unlink(missing_ok=True)
            logger.warning("%s cannot be written and is computed whenever it is read: %s", self._path(number), error)


def _shards(examples: Sequence[Example]) -> list[list[_Row]]:
    """Return the distinct rows, the longest first, in groups of at most ``_SHARD_TOKENS`` padded tokens."""
    rows: dict[_Row, None] = {}
    for example in examples:
        types = example.token_types or ((),) * len(example.sequences)
        rows.update(dict.fromkeys(zip(example.sequences, types, strict=True)))
    shards: list[list[_Row]] = []
    for row in sorted(rows, key=lambda row: -len(row[0])):
        if not shards or (len(shards[-1]) + 1) * len(shards[-1][0][0]) > _SHARD_TOKENS:
            shards.append([])
        shards[-1].append(row)
    return shards


def _places(number: int, shard: Sequence[_Row]) -> list[tuple[_Row, _Place]]:
    ends = list(accumulate(len(tokens) for tokens, _ in shard))
    return [(row, _Place(number, end - len(row[0]), end)) for row, end in zip(shard, ends, strict=True)]


def _rows(x_BT: Tensor | None, first_U: Tensor, mask_UT: Tensor) -> list[tuple[int, ...]]:
    if x_BT is None:
        return [()] * len(first_U)
    return [tuple(x_T[mask_T].tolist()) for x_T, mask_T in zip(x_BT.cpu()[first_U], mask_UT, strict=True)]


def _key(base: Base, trunk: Trunk, shards: Sequence[Sequence[_Row]], identity: str) -> str:
    """Return a hash of all that decides the activations' bits: rows, frozen weights, and what multiplies them."""
    digest = hashlib.blake2b(digest_size=10)
    device = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else "cpu"
    facts = [_FORMAT, identity, str(base.dtype), trunk.depth, torch.__version__, device, torch.get_num_threads()]
    digest.update(json.dumps([*facts, shards]).encode())
    above = tuple(f"{name}." for name in (*(b.name for b in find_blocks(base.model)[trunk.depth :]), *base.heads))
    for name, tensor in (*base.model.named_parameters(), *base.model.named_buffers()):
        if not name.startswith(above):
            digest.update(name.encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _checksum(tensor: Tensor) -> bytes:
    return hashlib.blake2b(_bytes(tensor), digest_size=_CHECKSUM).digest()
