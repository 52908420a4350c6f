"""Codes of 2, 3 or 4 bits, packed without waste into bytes.

Code j of a run of codes holds the bits from ``bits * j`` on, lowest first: four 2-bit or two 4-bit codes fill a byte,
eight 3-bit codes fill three. A run that does not end with a byte (or three) is padded with zeros.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from raylora.errors import BaseError

UNITS = {2: (4, 1), 3: (8, 3), 4: (2, 1)}
"""Bits per code -> the fewest codes that fill whole bytes, and those bytes."""


def check_bits(bits: int) -> None:
    """Raise BaseError for a width that is not packed."""
    if bits not in UNITS:
        raise BaseError(f"bits: {bits} is not supported", f"use one of {', '.join(map(str, UNITS))}")


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes ``count`` codes take."""
    check_bits(bits)
    codes, width = UNITS[bits]
    return -(-count // codes) * width


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the codes of the last dimension as uint8 bytes; raise BaseError for a code that needs more bits."""
    check_bits(bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise BaseError(f"a code of {int(codes.max())} does not fit into {bits} bits")
    per_unit, width = UNITS[bits]
    units = F.pad(codes, (0, -codes.shape[-1] % per_unit)).unflatten(-1, (-1, per_unit)).int()
    shifts = torch.arange(per_unit, device=codes.device, dtype=torch.int32) * bits
    words = (units << shifts).sum(-1, keepdim=True, dtype=torch.int32)  # the bits are disjoint: the sum is their union
    places = torch.arange(width, device=codes.device, dtype=torch.int32) * 8
    return ((words >> places) & 255).to(torch.uint8).flatten(-2)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` codes of the last dimension, as uint8.

    One look-up yields four codes (two at 4 bits) as one integer that is then read as bytes: several times faster than
    shifting and masking every code, and the same on any byte order since the table itself is written as bytes.
    """
    check_bits(bits)
    if bits == 3:  # 24-bit words, looked up by halves
        low, middle, high = packed.int().unflatten(-1, (-1, 3)).unbind(-1)
        index = torch.stack((low | (middle & 15) << 8, middle >> 4 | high << 4), -1).flatten(-2)
    else:
        index = packed.int()
    table = _table(bits, packed.device)
    codes = table.index_select(0, index.flatten()).view(torch.uint8)
    return codes.view(*packed.shape[:-1], -1)[..., :count]


@functools.cache
def _table(bits: int, device: torch.device) -> Tensor:
    """Return, for every byte (12 bits where codes are 3 wide), its codes side by side, read as one integer."""
    per_entry = 2 if bits == 4 else 4
    entries = torch.arange(1 << bits * per_entry, dtype=torch.int32)[:, None]
    codes = (entries >> torch.arange(per_entry, dtype=torch.int32) * bits) & ((1 << bits) - 1)
    integer = torch.int16 if bits == 4 else torch.int32
    return codes.to(torch.uint8).view(integer).flatten().to(device)
