"""A safetensors file whose tensors are the pages of the file: mapped read-only, shared by all who map it.

The pages belong to the operating system's cache: any number of processes on a machine read one copy of them, and none
can write. An in-place operation on such a tensor ends the process (SIGSEGV) instead of changing what others compute
with; torch's own mapping would silently give the writer a private copy.

A product of one row and a matrix is summed in another order where the matrix does not begin at a multiple of 16 bytes
(MKL, on some processors). What a tensor is multiplied to must not depend on the length of the file's header, nor on
whether the tensor is mapped or was gathered from ranks. So tensors begin at multiples of 64 bytes, as torch's own do.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylora.errors import BaseError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""
_ALIGNED_BYTES = 64
"""Where torch has its tensors begin; a page begins there, too."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file that is on the disk when this returns.

    Each begins at a multiple of 64 bytes, but for those behind one whose size is none; such are the last.

    Raises:
        OSError: it could not be written.
    """
    ordered = sorted(tensors, key=lambda name: (-_divisor(tensors[name].nbytes), name))
    header, end = {}, 0
    for name in ordered:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": _CODES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-(_LENGTH_BYTES + len(content)) % _ALIGNED_BYTES)  # which the format allows
    with path.open("wb") as stream:
        stream.write(len(content).to_bytes(_LENGTH_BYTES, "little") + content)
        for name in ordered:
            stream.write(tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that begins where torch would have it begin: itself, or a copy of a part of something else."""
    return tensor if tensor.data_ptr() % _ALIGNED_BYTES == 0 else tensor.clone()


def _divisor(size_bytes: int) -> int:
    """Return the largest power of two, up to what tensors are aligned to, that divides a size."""
    return math.gcd(size_bytes, _ALIGNED_BYTES)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors without reading them: each lies where the file is mapped, and cannot be written.

    The mapping ends with the last of them, also when the file is replaced or deleted meanwhile.

    Raises:
        BaseError: the file was cut short.
    """
    header, start = _header(path)
    with path.open("rb") as stream:
        pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    places = {name: place for name, place in header.items() if name != "__metadata__"}
    end = start + max((place["data_offsets"][1] for place in places.values()), default=0)
    if len(pages) != end:
        raise BaseError(f"{path} has {len(pages):,} bytes and should have {end:,}", "delete it: it is made again")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # that is the point
        return {name: _tensor(pages, start, place) for name, place in places.items()}


def _tensor(pages: mmap.mmap, start: int, place: Mapping[str, Any]) -> Tensor:
    """Return one tensor with a storage of its own, so that nobody takes it for a view of all the others."""
    dtype, shape = _DTYPES[place["dtype"]], place["shape"]
    begin, end = place["data_offsets"]
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(pages, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin).view(shape)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a file's header and where its tensors begin."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        content = stream.read(length) if length < path.stat().st_size else b""
    try:
        return json.loads(content), _LENGTH_BYTES + length
    except ValueError as error:
        raise BaseError(f"{path} is not a safetensors file", "delete it: it is made again") from error
