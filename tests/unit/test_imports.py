"""What a process does not import: torch is two seconds and 200 MB of each that does."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["raylora", "raylora.cli", "raylora.control", "raylora.actors.coordinator"])
def test_what_computes_nothing_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in ('torch', 'transformers', 'scipy') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not done.stdout.strip()
