"""Many small operations, on a machine that is busy with other work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread for a while."""
    # Thousands of small operations: on a machine whose cores are busy training, every one of them would wait for a
    # thread that is not being scheduled, and a summary of half a second was measured to take fifteen.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
