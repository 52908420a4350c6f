"""Try settings side by side: ``raylora.sweep``."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylora.client import launch, run_local
from raylora.engine.run.sweep import Ranked, best_spec, check_metric, rank, sweep_spec
from raylora.errors import SpecError
from raylora.report.figures_sweep import draw_sweep
from raylora.spec import RunSpec, dump_spec
from raylora.spec.base import said_by
from raylora.spec.members import PruningSpec
from raylora.spec.vary import RangeSpec
from raylora.store.run_store import RunStore

BEST, FIGURE = "best.yaml", "sweep.png"


@dataclass(frozen=True)
class Sweep:
    """A sweep that is finished."""

    run: str
    """Its run directory, with the table (``sweep.json``), the picture and ``best.yaml``."""
    metric: str
    tried: list[Ranked]
    """The best first."""
    best: RunSpec
    """What was swept, with the best settings."""


def sweep(
    spec: RunSpec, vary: Mapping[str, Sequence[Any] | Mapping[str, Any]] | None = None, metric: str = "nll",
    repeats: int = 1, samples: int = 8, local: bool = False, keep: float | None = None, keep_every: int = 1,
    places: int | None = None, brackets: int = 1,
) -> Sweep:
    """Train members that differ in settings in one run, rank them on the validation rows, and return what came out.

    The run has the spec's name and ``-sweep`` behind it. It is resumed, and not done again, when this is called again.

    Args:
        vary: keys with lists of values or ranges, as ``ensemble.vary`` has them, in place of the spec's own.
        metric: of the validation rows; the one that ``ensemble.regularizers.early_stopping.metric`` could name.
        repeats: members of different seeds for every combination.
        samples: members where only ranges are given.
        local: in this process, without Ray.
        keep: successive halving: the share of settings that goes on at an epoch's end, by ``metric``; the rest leave
            their pack. By default all train to the end.
        keep_every: epochs between two such ends.
        places: with ``keep``, how many settings train at once; the next begin where others have left. By default all
            begin at once.
        brackets: how many brackets the settings are dealt to, each with so many places and a worker of its own.

    Raises:
        UsageError: bad input; nothing was written.
        Interrupted: a signal came; call again to continue.
        TrainingError: the run failed.
    """
    checked = {key: _range(own) if isinstance(own, Mapping) else list(own) for key, own in (vary or {}).items()}
    swept = sweep_spec(spec, checked or None, repeats, samples, _pruning(metric, keep, keep_every, places, brackets))
    check_metric(swept, metric)
    if local:
        run_local(swept)
    else:
        launch(swept).wait()
    return conclude(spec, RunStore.for_spec(swept), metric)


def conclude(spec: RunSpec, store: RunStore, metric: str) -> Sweep:
    """Rank what a finished sweep tried, write table, picture and ``best.yaml`` into its directory, and return them.

    Raises:
        SpecError: the task has no such metric.
        StoreError: a member is missing or damaged.
    """
    tried = rank(store, metric)
    best = best_spec(spec, tried[0])
    store.storage.write(BEST, dump_spec(best).encode())
    picture = io.BytesIO()
    draw_sweep([one.record() for one in tried], metric).savefig(picture, dpi=130, format="png")
    store.storage.write(FIGURE, picture.getvalue())
    return Sweep(store.uri, metric, tried, best)


def _pruning(
    metric: str, keep: float | None, every: int, places: int | None, brackets: int
) -> PruningSpec | None:
    if keep is None:
        if places is not None or brackets > 1:
            raise SpecError("--places: nobody leaves a place where nothing is pruned", "add --keep 0.5")
        return None
    if brackets > 1 and places is None:
        raise SpecError("--brackets: are of settings that wait for places", "add --places, such as --places 8")
    if not 0 < keep < 1 or every < 1:
        raise SpecError(f"--keep: {keep:g} of the settings, every {every} epochs, leaves nothing to compare",
                        "use a share between 0 and 1, such as 0.5, and at least one epoch")
    return PruningSpec(metric=metric, keep=keep, every_epochs=every, places=places, brackets=brackets)


def _range(given: Mapping[str, Any]) -> RangeSpec:
    from pydantic import ValidationError

    try:
        return RangeSpec.model_validate(dict(given))
    except ValidationError as error:
        raise SpecError(
            f"vary: {dict(given)} is no range: {said_by(error)}", "use {low: 1e-4, high: 1e-2, log: true}"
        ) from None
