"""A first spec for a task and its text with comments: what `raylora init --task` and the reference write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass(frozen=True)
class Starter:
    """A base and a data set that anybody can fetch and that fit a task; a task's module has one as ``STARTER``."""

    row: Mapping[str, Any]
    """A row of the data set, with every column that the task reads."""
    base: str
    train: str
    """The source of the training rows."""
    task: Mapping[str, Any]
    """The task's settings beside its kind."""
    optimization: Mapping[str, Any]
    train_rows: int = 1000
    validation_rows: int = 200
    test_rows: int = 400
    batch: int = 64
    """Rows per forward pass of an evaluation."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Comments, by the key that they stand behind."""


def starter_text(
    kind: str, starter: Starter, adapter: Mapping[str, Any], base: str = "", quantization: str = "nf4",
    notes: Mapping[str, str] | None = None,
) -> str:
    """Return a spec of a task as YAML.

    Args:
        adapter: the adapter's section.
        base: another base than the starter's.
        notes: further comments, by the key that they stand behind.
    """
    said = {**_NOTES, **starter.notes, **(notes or {})}
    content = {
        "name": kind.replace("_", "-"),
        "storage_path": "runs",
        "base": {"source": base or starter.base, "quantization": quantization},
        "adapter": dict(adapter),
        "task": {"kind": kind, **starter.task},
        "data": {
            "train": {"source": starter.train}, "train_rows": starter.train_rows,
            "validation_rows": starter.validation_rows, "test_rows": starter.test_rows,
        },
        "ensemble": {"members": 3},
        "optimization": dict(starter.optimization),
        "evaluation": {"batch": starter.batch},
    }
    blocks = []
    for section, value in content.items():
        rows = value.items() if isinstance(value, dict) else [(None, value)]
        lines = [f"{section}:"] if isinstance(value, dict) else []
        for key, inner in rows:
            written = f"  {key}: {_inline(inner)}" if key else f"{section}: {_inline(inner)}"
            note = said.get(f"{section}.{key}" if key else section)
            lines.append(f"{written:<40}  # {note}" if note else written)
        blocks.append("\n".join(lines) + "\n")
    return _HEAD + "".join(block if block.startswith("storage_path") else "\n" + block for block in blocks)


def _inline(value: Any) -> str:
    """Return a value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False).removesuffix("...\n").strip()


_HEAD = """\
# Check it with `raylora validate FILE`, train it with `raylora run FILE`. `raylora explain KEY` says what a key does
# and what else it may be; what is not given stands at its default.
"""
_NOTES = {
    "base.source": "a hub id, a local folder, or pypi:NAME",
    "data.train": "or files: [a.jsonl], with columns: {OURS: THEIRS}",
    "data.train_rows": "leave it out for all",
    "ensemble.members": "as many as you can afford; 5 is usual",
}
