"""The two streams of a command: results on ``out``, everything said on the way on ``err``."""

from __future__ import annotations

import sys

from rich.console import Console

_PIPE_WIDTH = 160
"""A log has no width of its own; eighty columns would break every table."""

out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True)
