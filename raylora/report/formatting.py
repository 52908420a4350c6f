"""Numbers as a reader wants them: percent, seconds, bytes, and units read off a field's name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from raylora.ensemble.metric_table import METRICS

_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
           "November", "December")
"""The calendar module's names are in the language of whoever writes the report."""


def number(value: float, metric: str = "") -> str:
    """Return a metric with as many digits as it deserves; accuracy as percent."""
    if not math.isfinite(value):
        return str(value)
    known = METRICS.get(metric)
    if known is not None and known.percent:
        return f"{100 * value:.1f} %"
    digits = 2 if abs(value) >= 100 else known.digits if known is not None else 3
    return f"{value:,.{digits}f}"


def difference(value: float, metric: str) -> str:
    """Return a signed difference of two metrics; of accuracies in percentage points."""
    if metric in METRICS and METRICS[metric].percent:
        return f"{round(100 * value, 1) + 0.0:+.1f} pts"  # adding zero turns -0.0 into 0.0
    return f"{round(value, 3) + 0.0:+.3f}"


def size(value_bytes: float) -> str:
    """Return bytes in the largest binary unit that keeps the number above one."""
    for unit in ("B", "KiB", "MiB"):
        if abs(value_bytes) < 1024:
            return f"{value_bytes:.0f} B" if unit == "B" else f"{value_bytes:.1f} {unit}"
        value_bytes /= 1024
    return f"{value_bytes:.2f} GiB"


def duration(value_s: float) -> str:
    """Return seconds as seconds, minutes or hours."""
    if value_s < 90:
        return f"{value_s:.1f} s"
    minutes, seconds = divmod(round(value_s), 60)
    return f"{minutes} min {seconds} s" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def moment(value: float | str) -> str:
    """Return a time, given in seconds since 1970 or as ISO 8601, as a date that a person reads, in UTC."""
    try:
        # Python 3.10 does not read the Z.
        iso = value.replace("Z", "+00:00") if isinstance(value, str) else ""
        found = datetime.fromisoformat(iso) if isinstance(value, str) else datetime.fromtimestamp(value, timezone.utc)
    except (ValueError, OverflowError, OSError):
        return str(value)
    found = found.astimezone(timezone.utc) if found.tzinfo is not None else found
    return f"{found.day} {_MONTHS[found.month - 1]} {found.year}, {found:%H:%M} UTC"


def quantity(name: str, value: Any) -> str:
    """Return a value with the unit that its field's name ends in."""
    if isinstance(value, (list, tuple)):
        return ", ".join(quantity(name, one) for one in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    if "bytes" in name:
        return size(value)
    if name.endswith("_per_s"):
        return f"{value:,.1f} / s"
    if name.endswith("_s") or "_s_" in name:
        return duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def label(name: str) -> str:
    """Return a field's name as words, without the unit that ``quantity`` shows."""
    for unit in ("_bytes", "_per_s", "_s"):
        name = name.removesuffix(unit)
    words = name.replace("_bytes_", " ").replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def flat(
    values: Mapping[str, Any], prefix: str = "", labels: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """Return a nested mapping as rows of label and formatted value, leaving out what is unknown.

    ``labels`` are what fields are called that their own words do not say well.
    """
    called = {name: (labels or {}).get(name) or label(name) for name in values}
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{called[name]}: ", labels)
        elif value is not None and value != []:
            rows.append((prefix + called[name], quantity(name, value)))
    return rows
