"""Questions of arithmetic from DeepMind's generator (Saxton et al., arXiv 1904.01557), the same ones every time.

The generator is code from a package registry: it runs in a process of its own, from the archive whose hash was checked,
and only what it prints is read.
"""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

from raylora.errors import DataError

SEED = 0
_EASY = 1 / 3
"""Of the range of difficulty that questions to train on have in the original, from the lower end: ``train-easy``."""


def questions(module: str, rows: int) -> Callable[[Path, Path], None]:
    """Return a conversion of the generator's archive to rows of ``prompt`` and ``completion``, each prompt once."""

    def convert(archive: Path, target: Path) -> None:
        command = [sys.executable, "-W", "ignore", "-m", __name__, str(archive), module, str(rows)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            said = finished.stderr.strip().splitlines()
            raise DataError(f"the generator of {archive.name} failed: {said[-1] if said else 'no message'}",
                            "its sympy may be another than raylora was tried with")
        target.write_text(finished.stdout, encoding="utf-8")

    return convert


def _generated(archive: str, module: str, rows: int) -> Iterator[dict[str, str]]:
    """Yield distinct questions and their answers; what the generator no longer finds is put in place."""
    import numpy
    from sympy.solvers.diophantine.diophantine import base_solution_linear  # type: ignore[import-untyped]

    sys.modules["sympy.solvers.diophantine"].base_solution_linear = base_solution_linear  # type: ignore[attr-defined]
    sys.modules["absl"] = types.SimpleNamespace(logging=logging)  # type: ignore[assignment]  # all it takes of absl
    sys.path.insert(0, archive)
    from mathematics_dataset.modules import arithmetic  # type: ignore[import-not-found]

    random.seed(SEED)
    numpy.random.seed(SEED)  # what the generator draws from
    make = arithmetic.train(lambda ends: (ends[0], ends[0] + _EASY * (ends[1] - ends[0])))[module]
    seen: set[str] = set()
    while len(seen) < rows:
        problem = make()
        prompt = str(problem.question)
        if prompt not in seen:
            yield {"id": f"{module}-{len(seen)}", "prompt": prompt, "completion": str(problem.answer)}
            seen.add(prompt)


if __name__ == "__main__":
    for row in _generated(sys.argv[1], sys.argv[2], int(sys.argv[3])):
        print(json.dumps(row))
