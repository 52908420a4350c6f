"""The command line: ``app`` is what all commands share, the other modules have a function per verb."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from raylora.cli import answering, cluster, commands, jobs, learning, planning, results, sweeps
from raylora.cli.app import app

__all__ = ["answering", "app", "cluster", "commands", "jobs", "learning", "main", "planning", "results", "sweeps"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the console script and ``python -m raylora`` start here."""
    app(args=list(arguments) if arguments is not None else sys.argv[1:], prog_name="raylora")
