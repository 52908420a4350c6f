"""What a module does not import by itself; a spec that is read brings in its kinds, and torch with them."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["raylora", "raylora.cli", "raylora.control", "raylora.actors.coordinator"])
def test_what_computes_nothing_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in ('torch', 'transformers', 'scipy') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not done.stdout.strip()
