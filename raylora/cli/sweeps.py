"""The command that tries settings side by side: sweep."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table

from raylora.cli.app import AsJson, InProcess, Overrides, SpecFile, app, command
from raylora.display.console import out
from raylora.errors import UsageError

if TYPE_CHECKING:
    from raylora.sweeping import Sweep

_RANGES = "use 1e-4..1e-2 or 1e-4..1e-2:log"


@app.command()
@command
def sweep(
    spec_file: SpecFile,
    vary: Annotated[list[str] | None, typer.Option("--vary", help=(
        "A key and what to try: optimization.lr=1e-4,3e-4,1e-3, or a range, 1e-4..1e-2 or 1e-4..1e-2:log. Once for "
        "each key; in place of the spec's ensemble.vary."
    ))] = None,
    metric: Annotated[str, typer.Option(help="What the validation rows are ranked by.")] = "nll",
    repeats: Annotated[int, typer.Option(min=1, help="Members, each of another seed, for every combination.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Members where only ranges are given.")] = 8,
    keep: Annotated[float | None, typer.Option(help=(
        "Successive halving: the share of settings that goes on at an epoch's end, such as 0.5; the others end there."
    ))] = None,
    keep_every: Annotated[int, typer.Option(min=1, help="Epochs between two such ends.")] = 1,
    places: Annotated[int | None, typer.Option(min=1, help=(
        "With --keep: how many settings train at once; the next begin where others have left."
    ))] = None,
    brackets: Annotated[int, typer.Option(min=1, help="Brackets that settings are dealt to, a worker for each.")] = 1,
    overrides: Overrides = None,
    local: InProcess = False,
    as_json: AsJson = False,
) -> None:
    """Train members that differ in settings, in one forward where they can, and rank them on the validation rows.

    Writes the table (sweep.json), a picture (sweep.png) and best.yaml into the run NAME-sweep; run again to continue.
    """
    from raylora.spec import read_spec
    from raylora.sweeping import sweep as carry_out

    tried = dict(_given(one) for one in vary or [])
    found = carry_out(
        read_spec(spec_file, overrides or []), tried, metric, repeats, samples, local, keep, keep_every, places,
        brackets,
    )
    if as_json:
        print(json.dumps({"run": found.run, "metric": metric, "tried": [one.record() for one in found.tried]}))
        return
    _show(found)


def _given(option: str) -> tuple[str, list[Any] | dict[str, Any]]:
    """Return the key of a ``--vary`` and its values, or its range. Raises: UsageError."""
    key, equals, text = option.partition("=")
    if not equals or not key.strip() or not text.strip():
        raise UsageError(f"--vary {option}: is no key with values", "use --vary optimization.lr=1e-4,3e-4,1e-3")
    low, dots, rest = text.partition("..")
    if not dots:
        return key.strip(), [_value(part) for part in text.split(",")]
    high, colon, scale = rest.partition(":")
    try:
        ends = {"low": float(low), "high": float(high)}
    except ValueError:
        raise UsageError(f"--vary {option}: {text} is no range of numbers", _RANGES) from None
    if colon and scale != "log":
        raise UsageError(f"--vary {option}: unknown scale {scale!r}", _RANGES)
    return key.strip(), {**ends, "log": bool(colon)}


def _value(text: str) -> Any:
    """Return a value as YAML reads it, and numbers such as 1e-4 as numbers, too."""
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)


def _show(found: Sweep) -> None:
    from raylora.ensemble.metric_table import METRICS
    from raylora.spec.vary import in_words
    from raylora.sweeping import BEST, FIGURE

    keys = list(dict.fromkeys(key for one in found.tried for key in one.settings))
    table = Table(*keys, f"validation {METRICS[found.metric].label}", "", box=None, padding=(0, 2, 0, 0))
    for one in found.tried:
        more = f"{one.interval[0]:.4g} to {one.interval[1]:.4g}" if one.interval else ""
        if one.standard_error is not None:
            more = f"± {one.standard_error:.2g} over {len(one.members)} members"
        if one.left_at is not None:
            more = f"left at step {one.left_at}"
        table.add_row(*(in_words(one.settings.get(key, "")) for key in keys), f"{one.value:.4g}", more)
    out.print(table)
    out.print(f"\nthe best settings are in {found.run}/{BEST}, the picture is {found.run}/{FIGURE}\n"
              f"next: raylora run {found.run}/{BEST}")
