"""What a coordinator tells beside its run directory: metrics, a log line per event, where the dashboard is."""

from __future__ import annotations

import json
import logging
from typing import Any

from raylora import control, logs
from raylora.actors.telemetry import RunTelemetry
from raylora.engine.run.life import RAY_DASHBOARD

logger = logging.getLogger(__name__)

_MOST_NAMES = 20


class Reporter:
    """Tells of everything that changes the state of one run."""

    def __init__(self, run: str) -> None:
        logs.configure()
        self.run, self.telemetry = run, RunTelemetry(run)

    def happened(self, event: control.Event, state: control.State) -> None:
        """Publish the state that an event led to, and log the event as one line of JSON (from level INFO)."""
        self.telemetry.record(state)
        if logger.isEnabledFor(logging.INFO):
            with logs.about(self.run, _units(event, state)):
                logger.info("event %s", json.dumps(event_record(self.run, event, state), sort_keys=True))


def event_record(run: str, event: control.Event, state: control.State) -> dict[str, Any]:
    """Return an event with the run, the phase that it led to, and the members it is about; long lists are counted."""
    record = {key: _short(value) for key, value in control.to_record(event).items()}
    units = _units(event, state)
    return {"run": run, "phase": state.phase.value, **({"members": _short(units)} if units else {}), **record}


def dashboard_fact() -> dict[str, str]:
    """Return where the dashboard of this cluster is, for the holder's record; nothing where there is none."""
    try:
        from ray._private.services import get_webui_url_from_internal_kv  # no public call says it to an actor

        url = get_webui_url_from_internal_kv()
    except Exception:  # only a link depends on it
        url = None
    return {RAY_DASHBOARD: url if "://" in url else f"http://{url}"} if url else {}


def _units(event: control.Event, state: control.State) -> list[str]:
    name = getattr(event, "job", "")
    return list(state.jobs[name].units) if name in state.jobs else []


def _short(value: Any) -> Any:
    return len(value) if isinstance(value, list | dict) and len(value) > _MOST_NAMES else value
