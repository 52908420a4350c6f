"""Sweeps over many alike cases: some in every run of the tests, the rest in ``make test-all``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Return the cases for ``parametrize``, all marked slow but those of ``always``; a tuple is several arguments."""
    listed = list(cases)
    assert all(case in listed for case in always), "what always runs has to be one of the cases"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in always else pytest.mark.slow)
        for case in listed
    ]
