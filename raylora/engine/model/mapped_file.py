"""A safetensors file whose tensors are the pages of the file: mapped read-only, shared by all who map it.

The pages belong to the operating system's cache: any number of processes on a machine read one copy of them, and none
can write. An in-place operation on such a tensor ends the process (SIGSEGV) instead of changing what others compute
with; torch's own mapping would silently give the writer a private copy.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from raylora.errors import BaseError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, each with a storage of its own, as one safetensors file that is on the disk when this returns.

    Raises:
        OSError: it could not be written.
    """
    try:
        safetensors.torch.save_file(dict(tensors), path)
    except safetensors.SafetensorError as error:  # a full disk, mostly
        raise OSError(str(error)) from error
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


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
