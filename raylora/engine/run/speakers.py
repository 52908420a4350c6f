"""Who speaks for a run, and with what weight: all members alike, or those that its validation rows ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raylora.engine.model.serialization import join_members, unpack_predictions
from raylora.ensemble.predictions import Predictions
from raylora.ensemble.summary import fit_group
from raylora.ensemble.weights import SELECTED, STACKED, MemberWeights, equal_weights
from raylora.errors import RunDirectoryError
from raylora.records import GroupMetrics, RunMetrics
from raylora.spec import EnsembleSpec, RunSpec
from raylora.store.run_store import RunStore


@dataclass(frozen=True)
class Speakers:
    """Members that speak together."""

    weights: MemberWeights
    described: GroupMetrics
    """What the run's summary says of them together; empty where it says nothing of just these."""
    is_fitted: bool = False
    """Whether their weights were fitted on the validation rows."""

    @property
    def names(self) -> list[str]:
        """Those who need to be asked."""
        return list(self.weights.names)


def read_speakers(store: RunStore, spec: RunSpec, members: Sequence[str], plain: bool = False) -> Speakers:
    """Return who of some usable members speaks for a finished run.

    Where one is missing whom the fitted weights need, those that are left speak alike.

    Args:
        plain: the plain mean, whatever the spec asks for.

    Raises:
        RunDirectoryError: the run's weights are not fitted yet.
    """
    metrics: RunMetrics = store.read_json("metrics.json") or RunMetrics()
    asked = voice_of(spec.ensemble)
    if not asked or plain:
        return Speakers(equal_weights(members), metrics.get("ensemble", {}))
    found = metrics.get("weighted", {}).get(asked)
    if found is None:
        raise RunDirectoryError(
            f"{store.uri}: its members' weights are fitted when it ends, and it has not ended",
            f"finish it: raylora resume {store.uri}; or predict with --plain (in Python: plain=True)",
        )
    if not set(found["weights"]) <= set(members):
        return Speakers(equal_weights(members), {})
    return Speakers(MemberWeights(tuple(found["weights"]), tuple(found["weights"].values())), found, is_fitted=True)


def fit_speakers(store: RunStore, spec: RunSpec, members: Sequence[str]) -> MemberWeights:
    """Return who of a run's finished members will speak for it, before its summary is made.

    Raises:
        StoreError: a prediction is missing or damaged.
    """
    if not spec.ensemble.is_fitted:
        return equal_weights(members)
    return fit_group(predictions_of(store, members), members, spec.ensemble)[-1].weights


def predictions_of(store: RunStore, units: Sequence[str]) -> list[Predictions]:
    """Return what units predicted, together. Raises: StoreError where it is missing or damaged."""
    return join_members([unpack_predictions(store.load_result(f"predictions/{name}")) for name in units])


def voice_of(ensemble: EnsembleSpec) -> str:
    """Return what the ensemble with fitted weights is called that a spec asks for; nothing for the plain mean."""
    return STACKED if ensemble.weights == "stacked" else SELECTED if ensemble.select is not None else ""
