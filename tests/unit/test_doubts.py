"""What is allowed and most likely a mistake is said before anything starts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import raylora
from raylora.cli import app
from raylora.engine.run.plan_run import prepare
from raylora.errors import RunDirectoryError
from raylora.spec import dump_spec

Make = Callable[..., Any]


def validated(spec: Any, tmp_path: Path) -> Any:
    file = tmp_path / "spec.yaml"
    file.write_text(dump_spec(spec))
    return CliRunner().invoke(app, ["validate", str(file), "--json"])


def test_a_learning_rate_that_cannot_train_draws_a_note(make_spec: Make, tmp_path: Path) -> None:
    assert not [note for note in prepare(make_spec()).notes if "optimization.lr" in note]
    done = validated(make_spec(optimization__lr=100.0), tmp_path)
    assert done.exit_code == 0
    assert [note for note in json.loads(done.stdout)["notes"] if note.startswith("optimization.lr: 100 is far beyond")]


def test_labels_that_no_row_has_draw_a_note(make_spec: Make, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = ({"text": f"film {n}", "label": ("bad", "good")[n % 2]} for n in range(20))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = make_spec(task__labels=["bad", "fair", "good", "great"], data={
        "train": {"files": str(file)}, "validation_rows": 4, "test_rows": 4,
    })
    assert "task.labels: no training row has the label 'fair', 'great'" in prepare(spec).notes


def test_a_storage_path_that_cannot_be_written_is_refused(
    make_spec: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="file is a file, not a folder"):
        prepare(make_spec(storage_path=str(tmp_path / "file" / "runs")))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RunDirectoryError, match="cannot be written by this user"):
        prepare(make_spec(storage_path=str(tmp_path / "new" / "runs")))
    assert not (tmp_path / "new").exists()


def test_the_public_names_are_listed() -> None:
    assert {"launch", "attach", "load_ensemble", "repair_run", "verify_run", "RunSpec"} <= set(dir(raylora))
    assert all(hasattr(raylora, name) for name in dir(raylora))
