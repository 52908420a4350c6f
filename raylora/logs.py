"""Logging: one logger per module, silent until somebody asks for it.

A program that uses raylora sets up handlers of its own; the command line and the workers use :func:`configure`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from raylora.errors import UsageError

VARIABLE = "RAYLORA_LOG"
"""The level that is logged from: DEBUG, INFO, WARNING or ERROR. Workers inherit it."""
_FORMAT = "%(asctime)s %(levelname)s %(name)s%(subject)s: %(message)s"
_HANDLER = "raylora"
_subject: ContextVar[str] = ContextVar("raylora_subject", default="")


def configure(verbose: bool = False) -> None:
    """Log to stderr from the level that ``RAYLORA_LOG`` names, or from INFO if ``verbose``; else leave all as it is.

    Raises:
        UsageError: there is no such level.
    """
    if verbose:
        os.environ.setdefault(VARIABLE, "INFO")  # for the workers too
    name = os.environ.get(VARIABLE, "").upper()
    if not name:
        return
    if name not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise UsageError(f"{VARIABLE}: there is no level {name!r}", "use DEBUG, INFO, WARNING or ERROR")
    root = logging.getLogger("raylora")
    root.setLevel(name)
    if not any(handler.get_name() == _HANDLER for handler in root.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.set_name(_HANDLER)
        handler.setFormatter(logging.Formatter(_FORMAT))
        handler.addFilter(_add_subject)
        root.addHandler(handler)


def environment() -> dict[str, str]:
    """Return what a process on another machine must inherit to log as this one does."""
    return {VARIABLE: os.environ[VARIABLE]} if os.environ.get(VARIABLE) else {}


@contextmanager
def about(run: str, members: Sequence[str] = ()) -> Iterator[None]:
    """Have every line that is logged meanwhile name the run and, where given, the members it is about."""
    token = _subject.set(f" [{' '.join([run, *members])}]")
    try:
        yield
    finally:
        _subject.reset(token)


def _add_subject(record: logging.LogRecord) -> bool:
    record.subject = _subject.get()
    return True
