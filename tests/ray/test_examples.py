"""The examples that are programs: the driver script and the notebook, run as they stand."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]
_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_cells(notebook: Path) -> list[Any]:
    """Run a notebook's cells of code one after another and return what each ends with, as a notebook shows it."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    names: dict[str, Any] = {}
    shown = []
    for number, cell in enumerate(cells):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{notebook.name}[{number}]", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), f"{notebook.name}[{number}]", "eval"), names))
    return shown


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started, ended, scores, answers = run_cells(_EXAMPLES / "notebook.ipynb")
    assert started is ended and "2 of 2 members finished" in ended._repr_html_()
    assert set(scores) == {"accuracy", "nll", "ece"} and scores["nll"][1] < 0.7
    assert [label for label, _, _ in answers[:2]] == ["positive", "negative"]


def test_the_driver_script_runs(tmp_path: Path) -> None:
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(
        [sys.executable, str(_EXAMPLES / "driver.py"), "--storage-path", str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("RunStarted") and "Aggregated" in done.stdout
    assert lines[-3].startswith("positive") and lines[-2].startswith("negative")
