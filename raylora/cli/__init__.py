"""The command line: ``commands`` has a function per verb, the others say what it looks like."""

from raylora.cli.commands import app, main

__all__ = ["app", "main"]
