"""Baselines that are made of member 0 when it is trained: its states on the way, and what is drawn around it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from raylora.adapters.base import Tensors
from raylora.engine.model import serialization
from raylora.engine.training.member_plan import MemberPlan
from raylora.engine.training.weight_moments import DEVIATION, MEAN, WeightMoments
from raylora.ensemble.predictions import Predictions
from raylora.records import BaselineCost, HistoryRow, LaplaceFit
from raylora.spec.baselines import BaselinesSpec, SwagSpec
from raylora.store.run_store import RunStore

logger = logging.getLogger(__name__)

Predict = Callable[[Sequence[Tensors]], Sequence[Predictions]]
"""From whole members, stacked in one forward, to their predictions of every set."""
ByLaplace = Callable[[], tuple[Sequence[Predictions], LaplaceFit, BaselineCost]]
COSTS = "baseline_costs.json"
_FORWARDS_OF_LAPLACE = 5
"""Of a row: a forward, and for two classes two backward passes, each of which takes twice as long."""
_MOMENTS = "swag-moments"
"""Beside the epoch ends in ``snapshots``: what only the training can give."""


@dataclass(frozen=True)
class Trained:
    """A member at the end of its training."""

    plan: MemberPlan
    tensors: Tensors
    frozen_tensors: Tensors
    """What it needs but did not train."""
    steps: int
    history: list[HistoryRow]
    stopped_at: int | None
    """The step after which early stopping took it out of the pack."""
    moments: WeightMoments = field(default_factory=WeightMoments)
    """Of its weights on the way, if a baseline draws from them."""
    committed_at: int | None = None
    """The step of its last commit, where that is not its own last step."""


class MadeOfMember0:
    """What is predicted with member 0 and is no member; what is committed already stays as it is."""

    def __init__(self, spec: BaselinesSpec, store: RunStore) -> None:
        self.spec, self.store = spec, store

    @property
    def forwards(self) -> int:
        """About how often each row is predicted for it."""
        draws = self.spec.swag.samples if self.spec.swag is not None else 0
        return self.spec.checkpoints + draws + (_FORWARDS_OF_LAPLACE if self.spec.laplace is not None else 0)

    def missing(self) -> list[str]:
        """Return the baselines whose predictions are to be made yet."""
        listed = self.store.storage.list("snapshots")
        snapshots = [name for name in listed if self.store.has_result(f"snapshots/{name}")]
        wanted = {"checkpoints": any(map(_is_epoch_end, snapshots)), "swag": _MOMENTS in snapshots,
                  "laplace": self.spec.laplace is not None}
        return [name for name, is_wanted in wanted.items()
                if is_wanted and not self.store.has_result(f"predictions/{name}")]

    def make(self, one: Trained, predict: Predict, by_laplace: ByLaplace) -> None:
        """Commit what was kept of member 0's training, and predict with it.

        Args:
            predict: what members say, given whole.
            by_laplace: what the Gaussian around member 0 says; asked if the run has one.

        Raises:
            Interrupted: by ``predict``; what is not committed is predicted again next time.
        """
        self._keep(one)
        for name in self.missing():
            if name == "laplace":
                found, facts, cost = by_laplace()
                self._commit(name, found, cost, {"laplace.json": json.dumps(facts).encode()})
                continue
            started = time.perf_counter()
            members = self._epoch_ends() if name == "checkpoints" else self._draws(one.plan)
            predictions = predict([{**tensors, **one.frozen_tensors} for tensors in members])
            numbers = 2 * _size(members[0]) if name == "swag" else sum(map(_size, members))
            took: BaselineCost = {"predict_s": time.perf_counter() - started, "stored_numbers": numbers}
            self._commit(name, predictions, took)

    def _keep(self, one: Trained) -> None:
        """Commit the moments of the weights before anything else: who is committed is not trained again."""
        folder, swag = f"snapshots/{_MOMENTS}", self.spec.swag
        if swag is None or self.store.has_result(folder) or self.store.has_result(one.plan.folder):
            return
        if not one.moments.tells:
            logger.warning("swag: %s was stopped before its weights were counted in twice; the baseline is left out",
                           one.plan.name)
            return
        flat = {f"{section}/{name}": t for section, part in one.moments.sections().items() for name, t in part.items()}
        self.store.commit_result(folder, {
            "moments.safetensors": serialization.to_bytes(flat),
            "moments.json": json.dumps({"count": one.moments.count}).encode(),
        })

    def _epoch_ends(self) -> list[Tensors]:
        return [
            serialization.from_bytes(self.store.load_result(f"snapshots/{name}")["member.safetensors"])
            for name in self.store.storage.list("snapshots")
            if _is_epoch_end(name) and self.store.has_result(f"snapshots/{name}")
        ]

    def _draws(self, plan: MemberPlan) -> list[Tensors]:
        swag = self.spec.swag or SwagSpec()
        moments = _moments(self.store.load_result(f"snapshots/{_MOMENTS}"))
        return [moments.sample(plan.stream("swag", number), swag.variance_scale) for number in range(swag.samples)]

    def _commit(
        self, name: str, predictions: Sequence[Predictions], cost: BaselineCost,
        further: Mapping[str, bytes] | None = None,
    ) -> None:
        files = {**serialization.pack_predictions(predictions), **(further or {})}
        self.store.commit_result(f"predictions/{name}", files)
        # Not in the folder: what is committed is the same whenever it is made again, and seconds are not.
        self.store.write_json(COSTS, {**(self.store.read_json(COSTS) or {}), name: cost})


def _is_epoch_end(name: str) -> bool:
    return name.startswith("epoch-")


def _size(tensors: Tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _moments(files: Mapping[str, bytes]) -> WeightMoments:
    sections: dict[str, Tensors] = {MEAN: {}, DEVIATION: {}}
    for key, tensor in serialization.from_bytes(files["moments.safetensors"]).items():
        section, _, name = key.partition("/")
        sections[section][name] = tensor
    return WeightMoments.restored(sections, json.loads(files["moments.json"])["count"])
