"""Clusters as people write them down: ``4x80GB``, ``2x4x80GB`` or a YAML file of nodes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raylora.errors import PlacementError, combine
from raylora.placement.inventory import Gpu, Inventory, Node

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(MB|GB|TB|MiB|GiB|TiB)")
_SHORT = re.compile(r"(?:(\d+)x)?(\d+)x([\d.]+\s*[A-Za-z]+)")
_CPUS_PER_GPU = 8
_EXAMPLE = '"4x80GB" is one node with four GPUs, "2x4x80GB" two such nodes; or give a YAML file'


class _Entry(BaseModel):
    """A misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GpuEntry(_Entry):
    """GPUs of a node that are alike."""

    memory: str
    """Of one, such as ``80GB``."""
    count: int = Field(default=1, ge=1)
    """How many."""
    share: float = Field(default=1.0, gt=0, le=1)
    """What part of each may be filled."""


class NodeEntry(_Entry):
    """Nodes that are alike."""

    cpus: int = Field(ge=1)
    """Cores of one."""
    memory: str
    """Main memory of one, such as ``256GB``."""
    name: str = "node"
    """What it is called."""
    count: int = Field(default=1, ge=1)
    """How many."""
    gpus: list[GpuEntry] = []
    """Its GPUs; none by default."""


class ClusterFile(_Entry):
    """A cluster, written down."""

    nodes: list[NodeEntry] = Field(min_length=1)
    """Its nodes."""
    network_gbit_s: float | None = Field(default=None, ge=0)
    """What joins the nodes; left out, it is not known."""


def read_cluster(text: str) -> Inventory:
    """Return the cluster that a short form or a YAML file describes.

    Raises:
        PlacementError: it is neither; with every problem of a file.
    """
    short = _SHORT.fullmatch(text.strip())
    if short is not None:
        return _short(int(short[1] or 1), int(short[2]), short[3], text)
    path = Path(text)
    if not path.is_file():
        raise PlacementError(f"--cluster: {text!r} is no file, and not of the short form", _EXAMPLE)
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        written = ClusterFile.model_validate(content)
    except yaml.YAMLError as error:
        raise PlacementError(f"{path}: is not YAML: {str(error).splitlines()[0]}", _EXAMPLE) from None
    except ValidationError as error:
        found = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
        raise PlacementError(f"{path}: " + combine(found, "not a valid cluster"), _EXAMPLE) from None
    nodes = tuple(
        Node(f"{entry.name}-{n}" if entry.count > 1 else entry.name, entry.cpus, read_size(entry.memory), _gpus(entry))
        for entry in written.nodes for n in range(entry.count)
    )
    return Inventory(nodes, str(path), network_gbit_s=written.network_gbit_s)


def _gpus(entry: NodeEntry) -> tuple[Gpu, ...]:
    return tuple(Gpu(read_size(gpu.memory), gpu.share) for gpu in entry.gpus for _ in range(gpu.count))


def _short(nodes: int, gpus: int, memory: str, text: str) -> Inventory:
    """Return a cluster of nodes that are all alike; cores and main memory are supposed."""
    device, cpus = read_size(memory), _CPUS_PER_GPU * gpus
    if not nodes or not gpus:
        raise PlacementError(f"--cluster: {text!r} has no GPU", _EXAMPLE)
    one = Node("node", cpus, 2 * gpus * device, (Gpu(device),) * gpus)
    assumed = (f"{cpus} CPUs and {one.memory_bytes / 1e9:.0f} GB of main memory in each node",)
    return Inventory((one,) * nodes, text.strip(), assumed=assumed)


def read_size(text: str, where: str = "--cluster") -> int:
    """Return the bytes of ``80GB``. Raises: PlacementError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise PlacementError(f"{where}: {text!r} is no size", f"give a number and a unit: {', '.join(_UNITS)}")
    return int(float(match[1]) * _UNITS[match[2]])
