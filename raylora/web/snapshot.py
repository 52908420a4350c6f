"""What the page shows of a run, read from its directory: a plain record, for living and lost runs too."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raylora import control
from raylora.engine.run.life import RAY_DASHBOARD, lifelessness
from raylora.engine.run.run_status import JobStatus, RunStatus, StatusBoard
from raylora.ensemble.metric_table import METRICS
from raylora.errors import RayloraError
from raylora.progress import Activity
from raylora.store.run_store import RunStore
from raylora.web.curves import LOSS, Curves
from raylora.web.words import event_line

_OVER_TIMES = 5
"""A run that is over is looked at so much more seldom: it may be resumed."""
_MOST_ROWS = 200
_MOST_CURVES = 24
_MOST_POINTS = 200
_MOST_EVENTS = 200
_SCORES = (
    "accuracy", "nll", "brier", "ece", "perplexity", "rmse", "mae", "crps",
    "exact_match", "f1", "contains", "number", "choice",
)
_STEP = re.compile(r"step-(\d+)")


class RunReader:
    """Reads one run again and again, and remembers what the directory does not hold: losses between two commits."""

    def __init__(self, store: RunStore, every_s: float) -> None:
        """Read a run at most every so many seconds, however many people look on."""
        self.store, self.every_s = store, every_s
        self.curves = Curves()
        self._nodes: dict[str, str] = {}
        self._histories: dict[str, str] = {}
        """Unit -> the file that its history was last read from."""
        self._record: dict[str, Any] = {}
        self._read_at = 0.0
        self._lock = threading.Lock()

    def read(self) -> dict[str, Any]:
        """Return the run's record; one that cannot be read has a ``problem`` instead of news."""
        with self._lock:
            every_s = self.every_s * (_OVER_TIMES if self._record.get("is_over") else 1)
            if not self._record or time.monotonic() - self._read_at >= every_s:
                try:
                    self._record = {**self._now(), "problem": ""}
                except (RayloraError, OSError) as error:
                    empty = {"run": self.store.uri.rpartition("/")[2], "uri": self.store.uri}
                    self._record = {**(self._record or empty), "problem": str(error)}
                self._read_at = time.monotonic()
            return self._record

    def _now(self) -> dict[str, Any]:
        events = self.store.read_events()
        state = control.replay(control.from_record(record) for record in events)
        last_at = events[-1].get("at", 0.0) if events else 0.0
        status = status_of(self.store, state, last_at)
        jobs = self._jobs(state, status)
        trained = {name: job for name, job in jobs.items() if not job.later}  # what comes later is nobody's training
        members = [row for name, job in trained.items() for row in _members(name, job, state)]
        finished = set(state.finished_units())
        members.sort(key=lambda row: row["name"])
        shown = members if len(members) <= _MOST_ROWS else _busiest(members)[:_MOST_ROWS]
        curves = [row["name"] for row in (shown if len(shown) <= _MOST_CURVES else _busiest(shown)[:_MOST_CURVES])]
        self._follow(state, jobs, curves)
        for row in shown:
            self._fill(row)
        holder = None if state.phase.terminal else self.store.holder()
        return {
            "run": status.run,
            "uri": self.store.uri,
            "phase": state.phase.value,
            "is_over": state.phase.terminal,
            "reason": state.reason,
            "lifeless": lifelessness(self.store, state),
            "started_at": events[0].get("at", 0.0) if events else 0.0,
            "updated_at": max(status.updated_at, last_at),
            "eta_s": None if state.phase.terminal else status.eta_s,
            "share_done": _share_done(state, jobs),
            "preparation": vars(status.preparation) if status.preparation is not None else None,
            "member_count": len(members),
            "members_done": sum(unit in finished for job in trained.values() for unit in job.units),
            "members": shown,
            "workers": self._workers(state),
            "queue": [{"job": name, "units": jobs[name].units} for name in state.order.jobs
                      if jobs[name].status is control.JobState.PENDING][:_MOST_ROWS],
            "queue_length": len(state.pending),
            "events": [event_line(record) for record in events[-_MOST_EVENTS:]],
            "news": status.news,
            "curves": self.curves.shown(curves, _MOST_POINTS),
            "labels": {name: metric.label for name, metric in METRICS.items()},
            "scores": self._scores(),
            "has_report": self.store.storage.exists("report.html"),
            "dashboard": _web_address(holder.facts.get(RAY_DASHBOARD)) if holder is not None else "",
        }

    def _jobs(self, state: control.State, status: RunStatus) -> dict[str, JobStatus]:
        """Return the jobs as the log has them, with the progress that the latest status tells of the same attempt."""
        self._nodes |= status.nodes
        jobs = {}
        for name, job in state.jobs.items():
            told = status.jobs.get(name)
            progress = told.progress if told is not None and told.attempt == job.attempt else None
            jobs[name] = JobStatus(
                list(job.units), job.status, job.attempt, job.failures, progress, job.later
            )
            if progress is not None and progress.activity is Activity.TRAINING:
                for unit, loss in progress.losses.items():
                    self.curves.see(unit, progress.done, {LOSS: loss})
                for unit, values in progress.validations.items():
                    self.curves.see(unit, progress.done, values)
        return jobs

    def _fill(self, row: dict[str, Any]) -> None:
        """Say what was committed of a member that no status tells of: it has ended, or its run is in one process."""
        latest = self.curves.latest(row["name"])
        if not row["total"] and latest is not None:
            row["done"], row["loss"] = latest

    def _workers(self, state: control.State) -> list[dict[str, Any]]:
        return [
            {
                "name": name, "state": "ended" if state.phase.terminal and worker is not control.WorkerState.LOST
                else worker.value,
                "node": self._nodes.get(name, ""), "job": state.at_work.get(name, ""),
            }
            for name, worker in list(state.workers.items())[:_MOST_ROWS]
        ]

    # --- histories ----------------------------------------------------------------------------------
    def _follow(self, state: control.State, jobs: Mapping[str, JobStatus], units: list[str]) -> None:
        """Read what members have committed of their histories since the last look."""
        statuses = {unit: job.status for job in jobs.values() for unit in job.units}
        for unit in units:
            path = self._history_of(unit, statuses[unit])
            if path and self._histories.get(unit) != path:
                try:
                    rows = json.loads(self.store.storage.read(path)).get("history", [])
                except (OSError, ValueError):
                    continue  # pruned between two looks, or damaged: `raylora verify` tells of that
                self.curves.take_history(unit, rows)
                self._histories[unit] = path

    def _history_of(self, unit: str, status: control.JobState) -> str:
        """Return the newest file that holds a unit's history, or nothing."""
        storage = self.store.storage
        if status is control.JobState.FINISHED:
            if self._histories.get(unit, "").endswith("member.json"):
                return self._histories[unit]
            for parent in ("members", "baselines"):
                if storage.exists(f"{parent}/{unit}/member.json"):
                    return f"{parent}/{unit}/member.json"
        # Not RunStore.checkpoint_steps, which sweeps: this page writes and deletes nothing.
        steps = [name for name in storage.list(f"checkpoints/{unit}") if _STEP.fullmatch(name)]
        return f"checkpoints/{unit}/{steps[-1]}/state.json" if steps else ""

    def _scores(self) -> list[dict[str, Any]]:
        """Return what the finished ensemble scores on each set, as the metric table writes it."""
        try:
            metrics = self.store.read_json("metrics.json") or {}
        except RayloraError:
            return []
        sets = (metrics.get("ensemble") or {}).get("eval") or {}
        for name, answers in (metrics.get("answers") or {"sets": {}})["sets"].items():
            written = {key: one["value"] for key, one in answers["ensemble"].get("metrics", {}).items()}
            sets[name] = {**sets.get(name, {}), **written}
        return [
            {"set": name, "values": {
                METRICS[key].label: f"{100 * values[key]:.1f} %" if METRICS[key].percent
                else f"{values[key]:.{METRICS[key].digits}f}"
                for key in _SCORES if key in METRICS and isinstance(values.get(key), int | float)
            }}
            for name, values in sets.items()
        ]


def status_of(store: RunStore, state: control.State, last_at: float) -> RunStatus:
    """Return the status that was written last; where there is none that can be read, what the log says until then."""
    try:
        written = store.read_json("status.json")
        if written:
            return RunStatus.from_record(written)
    except (RayloraError, KeyError, TypeError, ValueError):
        pass  # of another version, or damaged: the log is the truth, the status a convenience
    told = StatusBoard(store.uri.rpartition("/")[2]).status(state)
    return replace(told, started_at=last_at, updated_at=last_at)


def _members(name: str, job: JobStatus, state: control.State) -> list[dict[str, Any]]:
    progress = job.progress if job.status.open else None
    trains = progress is not None and progress.activity is Activity.TRAINING
    rows = []
    for unit in job.units:
        failure = state.failed_units.get(unit, "")
        rows.append({
            "name": unit,
            "job": name,
            "state": "failed" if failure else job.status.value,
            "failure": failure,
            "attempt": job.attempt,
            "failures": job.failures,
            "activity": progress.activity.value if progress is not None else "",
            "done": progress.done if progress is not None else 0,
            "total": progress.total if progress is not None else 0,
            "loss": _finite(progress.losses.get(unit)) if progress is not None else None,
            "tokens_per_s": progress.tokens / max(progress.seconds, 1e-9) if progress is not None and trains else None,
        })
    return rows


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _busiest(members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rank = {"running": 0, "failed": 1, "finished": 2, "pending": 3}
    return sorted(members, key=lambda row: (rank[row["state"]], row["name"]))


def _share_done(state: control.State, jobs: Mapping[str, JobStatus]) -> float:
    if state.phase in (control.Phase.SUCCEEDED, control.Phase.DEGRADED):
        return 1.0
    return sum(job.share_done for job in jobs.values()) / len(jobs) if jobs else 0.0


def _web_address(address: Any) -> str:
    """Return an address if a browser may be sent there: what else a file may hold becomes no link."""
    return address if isinstance(address, str) and address.startswith(("http://", "https://")) else ""
