"""What a task predicts: one file per output, registered under the seam ``output``; see :mod:`.base`."""

from __future__ import annotations

from raylora import registry
from raylora.ensemble.outputs.base import Output


def output_of(name: str) -> Output:
    """Return an output by its registered name, as tasks and predictions declare it. Raises: SpecError if unknown."""
    output: Output = registry.load("output", name).build()
    return output
