"""What the scripts of ``jobs/`` share: a spec from a file or as text, and errors as one message and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from raylora.errors import RayloraError
from raylora.spec import RunSpec, read_given


def arguments(says: str) -> argparse.ArgumentParser:
    """Return a parser of what every job takes."""
    parser = argparse.ArgumentParser(description=says, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--spec", metavar="FILE", help="a run spec in YAML, in the working directory")
    given.add_argument("--spec-yaml", metavar="TEXT", help="the spec itself")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key")
    return parser


def spec_of(given: argparse.Namespace) -> RunSpec:
    """Return the spec that a job was given. Raises: SpecError."""
    return read_given(given.spec, given.spec_yaml, given.set)


def exit_with(work: Callable[[], int]) -> None:
    """Do a job's work and exit as the command line would: with its code, or an error's message and code."""
    try:
        code = work()
    except RayloraError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
