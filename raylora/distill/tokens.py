"""Targets of language models: the top-k of the members' mixture at every target position, written as a stream.

A teacher's full logits would be gigabytes; with k = 32 and 16-bit token numbers a position takes 130 bytes.
Files: shards ``<prefix>-00000.safetensors`` of whole examples and, last of all, the facts ``<prefix>.json``.
Shapes: P target positions of one or several examples, K kept tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylora.distill.files import pack_facts, sha256
from raylora.distill.loss_functions import mixture
from raylora.distill.topk import FLOOR, TopK, top_k
from raylora.errors import DataError

KIND = "tokens"
Sink = Callable[[str, bytes], None]


class TokenTargetsWriter:
    """Cuts each example's predictions to the top k and passes them on in shards; use it as a context manager.

    Memory holds the ids and, of the numbers, less than ``shard_positions`` and one example more. The facts are
    written on leaving without an error, so that a broken-off stream is not taken for a complete one.
    """

    def __init__(
        self, sink: Sink, *, teacher_digest: str, members: Sequence[int], vocabulary: int, k: int,
        temperature: float = 1.0, prefix: str = KIND, shard_positions: int = 65_536,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Take where files go (``sink(name, content)``) and what all examples share.

        Args:
            weights: of the members, in the order of their logits; by default all weigh alike.
        """
        self.weights = weights
        self.sink, self.prefix, self.shard_positions = sink, prefix, shard_positions
        self.vocabulary, self.k, self.temperature = vocabulary, min(k, vocabulary), temperature
        self.facts = {"teacher_digest": teacher_digest, "members": sorted(members)}
        self.positions = self.size_bytes = self.most_buffered = 0
        self._buffer: list[TopK] = []
        self._ids: list[str] = []
        self._content_hashes: list[str] = []
        self._known: set[str] = set()
        self._shards: list[dict[str, Any]] = []

    def add(self, example_id: str, content_hash: str, member_logits: Iterable[Tensor]) -> None:
        """Add an example from its members' logits P x V, one by one: a tensor M x P x V, or a generator.

        Raises:
            DataError: as for :meth:`cut` and :meth:`add_topk`.
        """
        self.add_topk(example_id, content_hash, self.cut(example_id, member_logits))

    @torch.no_grad()
    def cut(self, example_id: str, member_logits: Iterable[Tensor]) -> TopK:
        """Return the top k of the mixture at an example's positions, or at some of them, from its members' logits.

        Raises:
            DataError: they are over another vocabulary, or not numbers.
        """
        logp_PV = mixture(member_logits, self.temperature, self.weights)
        if logp_PV.shape[-1] != self.vocabulary or logp_PV.isnan().any():
            raise DataError(
                f"example {example_id!r}: logits over {logp_PV.shape[-1]} tokens, or not a number",
                f"expected finite logits over {self.vocabulary} tokens",
            )
        return top_k(logp_PV, self.k, self.temperature)

    def add_topk(self, example_id: str, content_hash: str, targets: TopK) -> None:
        """Add an example whose top k is known.

        Raises:
            DataError: the id was added before, there are no positions, or k, vocabulary or temperature differ.
        """
        if example_id in self._known:
            raise DataError(f"example {example_id!r} was added before", "every example needs an id of its own")
        asked, got = (self.k, self.vocabulary, self.temperature), (targets.k, targets.vocabulary, targets.temperature)
        if asked != got or not len(targets):
            raise DataError(
                f"example {example_id!r}: {len(targets)} positions, (k, vocabulary, temperature) = {got}",
                f"expected at least one position and {asked}",
            )
        self._known.add(example_id)
        self._ids.append(example_id)
        self._content_hashes.append(content_hash)
        self._buffer.append(targets.to("cpu"))
        buffered = sum(map(len, self._buffer))
        self.most_buffered = max(self.most_buffered, buffered)
        if buffered >= self.shard_positions:
            self._flush()

    def close(self) -> None:
        """Write what is left and the facts. Raises: DataError if nothing was added."""
        if not self._known:
            raise DataError("no example has targets", "check the data set and its filters")
        self._flush()
        facts = {
            **self.facts, "vocabulary": self.vocabulary, "k": self.k, "temperature": self.temperature,
            "positions": self.positions, "size_bytes": self.size_bytes, "shards": self._shards,
        }
        self.sink(f"{self.prefix}.json", pack_facts(KIND, facts))

    def __enter__(self) -> TokenTargetsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _flush(self) -> None:
        if not self._buffer:
            return
        name = f"{self.prefix}-{len(self._shards):05d}.safetensors"
        content = pack_shard(self._buffer)
        self.sink(name, content)
        self._shards.append({
            "name": name, "sha256": sha256(content), "ids": self._ids, "content_hashes": self._content_hashes,
        })
        self.positions += sum(map(len, self._buffer))
        self.size_bytes += len(content)
        self._buffer, self._ids, self._content_hashes = [], [], []


def pack_shard(examples: Sequence[TopK]) -> bytes:
    """Return several examples below each other, ``offsets`` telling where each starts and the last one ends."""
    # numpy, because torch cannot concatenate or index unsigned 16-bit integers on every device
    small: Any = np.uint16 if examples[0].vocabulary <= 65_536 else np.int32
    return safetensors.numpy.save({
        "offsets": np.cumsum([0, *map(len, examples)], dtype=np.int64),
        "index": np.concatenate([example.index_PK.numpy() for example in examples]).astype(small),
        "logp": _half([example.logp_PK for example in examples]),
        "tail": _half([example.tail_P for example in examples]),
    })


def unpack_shard(content: bytes, vocabulary: int, temperature: float) -> list[TopK]:
    """Return the examples of :func:`pack_shard`, views of one buffer with float16 numbers and int32 tokens."""
    arrays = safetensors.numpy.load(content)
    offsets, index = arrays["offsets"].tolist(), torch.from_numpy(arrays["index"].astype(np.int32))
    logp, tail = torch.from_numpy(arrays["logp"]), torch.from_numpy(arrays["tail"])
    return [
        TopK(index[start:end], logp[start:end], tail[start:end], vocabulary, temperature)
        for start, end in zip(offsets[:-1], offsets[1:], strict=True)
    ]


def concatenate(examples: Sequence[TopK]) -> TopK:
    """Return the positions of several examples below each other, in int64 and float32 for computing."""
    return TopK(
        torch.cat([example.index_PK for example in examples]).long(),
        torch.cat([example.logp_PK for example in examples]).float(),
        torch.cat([example.tail_P for example in examples]).float(),
        examples[0].vocabulary,
        examples[0].temperature,
    )


def _half(parts: Sequence[Tensor]) -> NDArray[np.float16]:
    return torch.cat(list(parts)).detach().clamp(min=FLOOR).half().numpy()
