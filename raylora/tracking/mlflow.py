"""MLflow: a run per member in one experiment, on a tracking server or in a database file."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator

from raylora.errors import SpecError
from raylora.spec import TrackerSpec
from raylora.tracking.base import TrackedRun, Tracker, leaves, require

_VARIABLE = "MLFLOW_TRACKING_URI"
_BATCH = 100
"""How many parameters MLflow takes in one call; of metrics it takes more."""
_LONGEST = 500
"""Characters of a parameter."""
_FLUSH_S = 5.0


class Spec(TrackerSpec):
    """Runs of an MLflow experiment."""

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = None
    """``http://host:5000``, ``sqlite:////a/path/mlflow.db``; by default ``MLFLOW_TRACKING_URI`` of each node."""
    experiment: str = "raylora"
    """The experiment that the runs belong to."""

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        if value and re.match(r"^[a-z0-9+]+://[^/@]+:[^/@]+@", value):
            raise ValueError("a URI with a password does not belong in a spec: set MLFLOW_TRACKING_PASSWORD")
        return value


def check(spec: Spec) -> None:
    """Refuse what cannot work on this machine. Raises: SpecError."""
    require("mlflow", "mlflow")
    if not spec.uri and not os.environ.get(_VARIABLE):
        raise SpecError(
            "tracking: mlflow is not told where to write",
            f"give its uri (http://host:5000, or sqlite:////a/path/mlflow.db), or set {_VARIABLE}",
        )


class MLflow:
    """Values are gathered for a few seconds, because a call is a request to a server."""

    def __init__(self, spec: Spec, run: TrackedRun) -> None:
        """Find the experiment, or make it."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self.run, self.client = run, MlflowClient(tracking_uri=spec.uri or os.environ.get(_VARIABLE))
        found = self.client.get_experiment_by_name(spec.experiment)
        if found is None:
            try:
                self.experiment = self.client.create_experiment(spec.experiment)
            except MlflowException:  # another worker was faster
                found = self.client.get_experiment_by_name(spec.experiment)
        if found is not None:
            self.experiment = found.experiment_id
        self.runs: dict[str, str] = {}
        self.last: dict[str, dict[str, int]] = {}
        """By member and metric, the step up to which the server has it."""
        self.waiting: dict[str, list[Any]] = {}
        self.flushed_at = time.monotonic()

    def begin(self, subject: str, after_step: int) -> None:
        """Go on with the member's MLflow run, or make one; what it has already is not sent again."""
        tags = {"raylora.run": self.run.name, "raylora.member": subject, "raylora.key": self.run.key}
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        found = self.client.search_runs([self.experiment], filter_string=wanted, max_results=1)
        if not found:
            made = self.client.create_run(self.experiment, run_name=f"{self.run.name}/{subject}", tags=tags)
            self.runs[subject], self.last[subject] = made.info.run_id, {}
            self._describe(made.info.run_id)
            return
        run_id = found[0].info.run_id
        self.client.update_run(run_id, status="RUNNING")
        self.runs[subject] = run_id
        self.last[subject] = {
            name: max(value.step for value in self.client.get_metric_history(run_id, name))
            for name in found[0].data.metrics
        }

    def log(self, subject: str, step: int, values: Mapping[str, float]) -> None:
        """Keep the values for the next call; send what has waited long enough."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self.waiting.setdefault(subject, []).extend(
            Metric(name, value, now_ms, step) for name, value in values.items()
            if step > self.last[subject].get(name, -1)
        )
        if time.monotonic() - self.flushed_at > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Send what is waiting."""
        for subject, metrics in self.waiting.items():
            for first in range(0, len(metrics), 10 * _BATCH):
                self.client.log_batch(self.runs[subject], metrics=metrics[first : first + 10 * _BATCH])
        self.waiting, self.flushed_at = {}, time.monotonic()

    def close(self, complete: bool) -> None:
        """Send the rest and end the members' MLflow runs."""
        self.flush()
        for run_id in self.runs.values():
            self.client.set_terminated(run_id, "FINISHED" if complete else "KILLED")

    def _describe(self, run_id: str) -> None:
        from mlflow.entities import Param

        settings = leaves(self.run.settings)
        params = [Param(name, str(value)[:_LONGEST]) for name, value in settings.items()]
        for first in range(0, len(params), _BATCH):
            self.client.log_batch(run_id, params=params[first : first + _BATCH])


def build(spec: Spec, run: TrackedRun) -> Tracker:
    """Return the tracker of a run."""
    return MLflow(spec, run)
