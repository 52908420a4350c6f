"""The rows that every table and figure compares: the ensemble, its mean member, a single member and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raylora.adapters.names import AdapterName, named
from raylora.ensemble.metric_table import METRICS
from raylora.records import MemberMetrics, RunMetrics
from raylora.spec.vary import in_words

BASELINE_LABELS = {
    "selected": "Selected: {n} of {all}",
    "stacked": "Stacked: {n} of {all}, weighted",
    "single": "Single {one} (member 0)",
    "swag": "SWAG-diagonal ({n} draws)",
    "laplace": "Laplace, {structure} ({n} draws)",
    "temperature": "Single {one} with T = {t}",
    "mc_dropout": "MC dropout ({n} passes)",
    "last_layer": "Last-layer ensemble ({n} heads)",
    "checkpoints": "Checkpoints of one run ({n})",
}


@dataclass(frozen=True)
class Cell:
    """One number of a table, with its bootstrap interval or its standard error over members."""

    value: float
    low: float | None = None
    high: float | None = None
    error: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Entry:
    """One row: what it is called and what summarize() said of it."""

    key: str
    label: str
    content: Mapping[str, Any]

    def cell(self, part: str, name: str, metric: str, scaled: bool = False) -> Cell | None:
        """Return the number of a metric on set ``name`` in ``part`` (``eval`` or ``ood``), if there is one."""
        found = self.content.get(part, {}).get(name, {})
        if scaled:
            found = found.get("temperature_scaled", {})
        value = found.get(metric)
        if isinstance(value, dict):
            return Cell(value["mean"], error=value.get("standard_error"))
        if value is None:
            return None
        low, high = (None, None) if scaled else found.get("intervals", {}).get(metric, (None, None))
        return Cell(value, low, high)


def value_of(found: Mapping[str, Any], metric: str) -> float | None:
    """Return a metric by its name, or None where there is no such number."""
    return found.get(metric)


def adapter_of(metrics: RunMetrics) -> AdapterName:
    """Return what the run's adapters are called; those of a run that does not say are LoRA."""
    return named(metrics.get("run", {}).get("adapter", "LoRA"))


def entries(metrics: RunMetrics) -> list[Entry]:
    """Return the rows of the comparison in reading order; absent parts are left out."""
    found = []
    if metrics.get("ensemble"):
        members = metrics["ensemble"].get("members", len(metrics.get("members", [])))
        found.append(Entry("ensemble", f"Ensemble of {members}", metrics["ensemble"]))
    for name, content in metrics.get("weighted", {}).items():
        label = BASELINE_LABELS[name].format(n=content.get("members", "?"), all=len(metrics.get("members", [])))
        found.append(Entry(name, label, content))
    if metrics.get("mean_member"):
        found.append(Entry("mean_member", "Mean member", metrics["mean_member"]))
    return found + [
        Entry(name, BASELINE_LABELS.get(name, name).format(
            n=content.get("members", "?"), one=adapter_of(metrics).one, t=f"{content.get('scaled_by', 1.0):.2f}",
            structure=content.get("laplace_fit", {}).get("structure", "diagonal"),
        ), content)
        for name, content in metrics.get("baselines", {}).items()
    ]


def member_entries(metrics: RunMetrics) -> list[Entry]:
    """Return one row per member."""
    members = metrics.get("members", [])
    return [Entry(f"member-{one['index']:03d}", _member_label(one), one) for one in members]


def _member_label(one: MemberMetrics) -> str:
    """Return a member's number, and what it has that others have not."""
    own = [f"{key.rpartition('.')[2]} {in_words(value)}" for key, value in one.get("settings", {}).items()]
    return f"Member {one['index']}" + (f": {', '.join(own)}" if own else "")


def set_names(metrics: RunMetrics, role: str) -> list[str]:
    """Return the names of the sets with a role."""
    return [name for name, one in metrics.get("sets", {}).items() if one.get("role") == role]


def scored_sets(metrics: RunMetrics) -> list[str]:
    """Return the labeled sets, the test set first."""
    known = metrics.get("ensemble", {}).get("eval", {})
    ordered = [name for role in ("test", "in_distribution", "out_of_distribution") for name in set_names(metrics, role)]
    return [name for name in ordered if name in known]


def columns(
    rows: Sequence[Entry], keys: Sequence[tuple[str, str]], cell: Callable[[Entry, str, str], Cell | None]
) -> list[list[Cell | None]]:
    """Return cells by row and column, the best of each column marked; ``keys`` are pairs of set and metric."""
    table = [[cell(row, name, metric) for name, metric in keys] for row in rows]
    for index, (_, metric) in enumerate(keys):
        found = [(line, one, METRICS[metric].cost(one.value)) for line in table if (one := line[index]) is not None]
        costs = [value for _, _, value in found if value is not None]
        if not costs or max(costs) - min(costs) <= 1e-9 * max(map(abs, costs)):  # nobody is best where all tie
            continue
        best = min(costs)
        for line, one, value in found:
            if value is not None and abs(value - best) <= 1e-9 * max(1.0, abs(best)):
                line[index] = replace(one, best=True)
    return table
