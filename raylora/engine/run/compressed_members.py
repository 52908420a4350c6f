"""Finished members as compressed files: singular vectors of each layer's change in mixed precision, and back.

A file has ``codes`` (bytes, layer after layer, of each pair of vectors u before v), ``scales`` (float16, in that
order), ``bits`` (of every pair of vectors, by decreasing singular value), the head in float16, and ``sites``, the names
and sizes of the layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.adapters.base import HEAD, Tensors
from raylora.engine.model.serialization import from_bytes, to_bytes
from raylora.errors import UsageError
from raylora.quant.pair import (
    WIDTHS,
    change_error,
    choose,
    pack_vectors,
    pair_bytes,
    restored,
    round_vectors,
    singular_factors,
    unpack_vector,
    vector_bytes,
    whole_error,
)

FILE = "compressed.safetensors"
_A, _B = ".lora_A", ".lora_B"
_CHOICES = (0, *WIDTHS)
_HEADER_SLACK = 64
"""Bytes for digits of lengths that only the finished file's header has."""

Rounded = tuple[Tensor, Tensor]
"""Codes N x S and scales N of vectors."""


@dataclass(frozen=True)
class CompressedMember:
    """A compressed file, and what it lost."""

    content: bytes
    change_error: float
    """``|| change - compressed change ||_F / || change ||_F`` over all layers."""
    vectors: Mapping[int, int]
    """Bits -> how many pairs of singular vectors have them."""


@dataclass(frozen=True)
class _Layer:
    """One layer's change, decomposed, and rounded to every width."""

    name: str
    u_RO: Tensor
    v_RI: Tensor
    rounded: Mapping[int, tuple[Rounded, Rounded]]

    @classmethod
    def of(cls, name: str, a_RI: Tensor, b_OR: Tensor) -> _Layer:
        """Return the layer of a pair of matrices."""
        u_RO, v_RI = singular_factors(a_RI, b_OR)
        rounded = {bits: (round_vectors(u_RO, bits), round_vectors(v_RI, bits)) for bits in WIDTHS}
        return cls(name, u_RO, v_RI, rounded)

    def near(self, bits: int) -> tuple[Tensor, Tensor]:
        """Return all of its vectors as they come back from some bits."""
        if not bits:
            return torch.zeros_like(self.u_RO).float(), torch.zeros_like(self.v_RI).float()
        u, v = self.rounded[bits]
        return restored(*u, bits), restored(*v, bits)

    def errors(self) -> list[list[float]]:
        """Return of each pair of vectors what each choice of bits loses."""
        lost = [change_error(self.u_RO, self.v_RI, *self.near(bits)) for bits in _CHOICES]
        found: list[list[float]] = torch.stack(lost, dim=1).tolist()
        return found

    def loss_of(self, bits_R: Sequence[int]) -> tuple[float, float]:
        """Return the squared norms of what a choice loses, and of the whole."""
        u_RO, v_RI = (
            torch.stack([self.near(bits)[side][row] for row, bits in enumerate(bits_R)]) for side in (0, 1)
        )
        return whole_error(self.u_RO, self.v_RI, u_RO, v_RI)


def compress_member(tensors: Mapping[str, Tensor], size_bytes: int) -> CompressedMember:
    """Return a member in a file of at most so many bytes.

    Raises:
        UsageError: its change is not a pair of matrices per layer, or not even its head fits.
    """
    heads = {name: _half(name, tensor) for name, tensor in tensors.items() if name.startswith(HEAD)}
    layers = [_Layer.of(site, tensors[site + _A], tensors[site + _B]) for site in _sites(tensors)]
    shapes = [[layer.name, *layer.v_RI.shape, layer.u_RO.shape[1]] for layer in layers]
    written = {
        "codes": torch.zeros(0, dtype=torch.uint8), "scales": torch.zeros(0, dtype=torch.float16),
        "bits": torch.zeros(sum(len(layer.u_RO) for layer in layers), dtype=torch.uint8),
        "sites": torch.frombuffer(bytearray(json.dumps(shapes, separators=(",", ":")).encode()), dtype=torch.uint8),
        **heads,
    }
    fixed = len(to_bytes(written)) + _HEADER_SLACK
    if fixed > size_bytes:
        raise UsageError(f"its head and the list of its layers alone take {fixed:,} of {size_bytes:,} bytes",
                         "raise --budget")
    costs = [[pair_bytes(layer.v_RI.shape[1], layer.u_RO.shape[1], bits) for bits in _CHOICES] for layer in layers]
    chosen = choose(
        [own for layer in layers for own in layer.errors()],
        [own for layer, own in zip(layers, costs, strict=True) for _ in layer.u_RO], size_bytes - fixed,
    )
    bits_N = [_CHOICES[choice] for choice in chosen]
    codes, scales, lost, whole, at = [], [], 0.0, 0.0, 0
    for layer in layers:
        own = bits_N[at : at + len(layer.u_RO)]
        for row, bits in enumerate(own):
            for codes_RS, scales_R in layer.rounded[bits] if bits else ():
                codes.append(pack_vectors(codes_RS[row], bits))
                scales.append(scales_R[row])
        square, of = layer.loss_of(own)
        lost, whole, at = lost + square, whole + of, at + len(own)
    written["bits"] = torch.tensor(bits_N, dtype=torch.uint8)
    if codes:
        written |= {"codes": torch.cat(codes), "scales": torch.stack(scales)}
    return CompressedMember(
        to_bytes(written), (lost / whole) ** 0.5 if whole else 0.0, {b: bits_N.count(b) for b in (8, 3, 2, 0)}
    )


def decompress_member(content: bytes) -> Tensors:
    """Return a member from its compressed file: pairs of the ranks that it had, and its head, in float32."""
    found = from_bytes(content)
    shapes = json.loads(found["sites"].numpy().tobytes())
    bits, scales = iter(found["bits"].tolist()), iter(found["scales"])
    codes, at = found["codes"], 0
    tensors: Tensors = {}

    def vector(width: int, count: int) -> Tensor:
        nonlocal at
        if not width:
            return torch.zeros(count)
        size = vector_bytes(count, width)
        codes_S = unpack_vector(codes[at : at + size], width, count)
        at += size
        return restored(codes_S[None], next(scales)[None], width)[0]

    for site, rank, inputs, outputs in shapes:
        pairs = [(vector(width, outputs), vector(width, inputs)) for width in (next(bits) for _ in range(rank))]
        tensors[site + _A] = torch.stack([v_I for _, v_I in pairs])
        tensors[site + _B] = torch.stack([u_O for u_O, _ in pairs], dim=1).contiguous()
    return tensors | {name: tensor.float() for name, tensor in found.items() if name.startswith(HEAD)}


def _sites(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the layers of a member, each of which has a pair. Raises: UsageError."""
    sites = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
    others = {name for name in tensors if not name.startswith(HEAD)} - {s + end for s in sites for end in (_A, _B)}
    if others or not sites:
        raise UsageError(
            "only members that have a pair of matrices for each layer can be compressed"
            + (f", and there is {min(others)}" if others else ""), "use adapter.kind lora or boosted_lora",
        )
    return sites


def _half(name: str, tensor: Tensor) -> Tensor:
    half = tensor.half()
    if not bool(torch.isfinite(half).all()):
        raise UsageError(f"{name} has numbers that float16 does not hold", "leave the member as it is")
    return half
