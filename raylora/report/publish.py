"""A run's report, written wherever its run directory is."""

from __future__ import annotations

import tempfile
from pathlib import Path

from raylora.engine.distillation.compare import distillations
from raylora.errors import RunDirectoryError
from raylora.records import RunMetrics
from raylora.report.page import write_report
from raylora.store.run_store import RunStore


def publish_report(store: RunStore) -> None:
    """Write ``report.html`` and its pictures from the run's metrics, wherever the run directory is.

    Raises:
        RunDirectoryError: the run has no metrics yet.
    """
    metrics: RunMetrics | None = store.read_json("metrics.json")
    if metrics is None:
        raise RunDirectoryError(f"{store.uri}: has no metrics yet", "let the run finish: raylora resume")
    metrics["distillation"] = distillations(store)
    metrics["answers"] = store.read_json("answers.json")
    if store.storage.is_local:
        write_report(metrics, Path(store.storage.root))
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in write_report(metrics, Path(folder)):
            store.storage.write(path.relative_to(folder).as_posix(), path.read_bytes())
