"""Numbers as a reader wants them: percent, seconds, bytes, and units read off a field's name."""

from __future__ import annotations

import math
from typing import Any

from raylora.ensemble.metric_table import METRICS


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
    return f"{minutes} min {seconds:02d} s" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def quantity(name: str, value: Any) -> str:
    """Return a value with the unit that its field's name ends in."""
    if isinstance(value, (list, tuple)):
        return ", ".join(quantity(name, one) for one in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if "bytes" in name:
        return size(value)
    if name.endswith("_per_s"):
        return f"{value:,.1f} / s"
    if name.endswith("_s"):
        return duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def label(name: str) -> str:
    """Return a field's name as words, without the unit that ``quantity`` shows."""
    for unit in ("_bytes", "_per_s", "_s"):
        name = name.removesuffix(unit)
    words = name.replace("_bytes_", " ").replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return a nested mapping as rows of label and formatted value, leaving out what is unknown."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{label(name)}: ")
        elif value is not None and value != []:
            rows.append((prefix + label(name), quantity(name, value)))
    return rows
