"""Trials of Ray Tune that share a forward: an actor puts them together, each a place in the pack of one run.

Tune's trials are processes of their own. Here they only carry numbers: a trial joins this actor with its settings, the
actor trains as many of them as there are places as the members of one run, and every trial reports its own members'
epochs. Whom Tune's scheduler stops leaves the pack at that epoch's end.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError

from raylora.errors import SpecError, TrainingError
from raylora.spec import RunSpec
from raylora.trials.epochs import Epochs

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_LEFT_OUT = {"select": None, "weights": "equal", "min_members": 1}
"""What one trial's ensemble would be chosen by means nothing to members of several; and if one fails, others go on."""


def pack_spec(spec: RunSpec, settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the run that trains so many trials together, as plain data: each has the spec's members and seeds.

    What is done beside members is left out, and so is what chooses among them.

    Raises:
        SpecError: the spec varies or prunes its members itself.
    """
    ensemble = spec.ensemble
    if ensemble.vary is not None or ensemble.pruning is not None:
        key = "vary" if ensemble.vary is not None else "pruning"
        raise SpecError(f"ensemble.{key}: in a pack of trials it is Tune that says it",
                        "leave it out, or let every trial be a run of its own (without slots)")
    content = spec.members_alone()
    of_one = ensemble.member_seeds()
    content["name"] = _name_of(spec, settings)
    content["ensemble"] |= _LEFT_OUT | {
        "members": len(of_one) * len(settings), "seeds": of_one * len(settings),
        "vary": [dict(own) for own in settings for _ in of_one],
    }
    return content


def _name_of(spec: RunSpec, settings: Sequence[Mapping[str, Any]]) -> str:
    """Return a name that the same trials together have again: then their run goes on from its last commits."""
    digest = hashlib.sha256(json.dumps([dict(own) for own in settings], sort_keys=True).encode()).hexdigest()[:8]
    return f"{spec.run_name()[:24]}-pack-{digest}"


@dataclass
class _Trial:
    """A trial that waits for its numbers."""

    settings: dict[str, Any]
    process: Any
    """Its actor."""
    probe: Any = None
    """A call of the process that has not been answered yet."""
    told: deque[dict[str, Any]] = field(default_factory=deque)
    """Reports that it has not fetched yet."""
    deciding: bool = False
    """Whether it has fetched a report, and Tune has not let it go on yet."""
    left: bool = False
    ended: bool = False
    """Whether its run has."""
    error: Exception | None = None

    @property
    def settled(self) -> bool:
        return self.left or not (self.told or self.deciding)


class PackHost:
    """Gathers trials, trains them in packs of at most so many, and hands each its reports; an actor of Ray's.

    A pack begins when its places are taken, or when nobody has joined for a while. Who joins while one trains is in the
    next.
    """

    def __init__(self, spec: RunSpec, slots: int, gather_s: float) -> None:
        """Begin to gather trials of a spec whose placement is this actor's."""
        self.spec, self.slots, self.gather_s = spec, slots, gather_s
        self._trials: dict[int, _Trial] = {}
        self._waiting: list[_Trial] = []
        self._joined_at = 0.0
        threading.Thread(target=self._serve, daemon=True).start()

    # --- what trials call ----------------------------------------------------------------------------
    @ray.method(max_task_retries=-1)  # it may be called while this actor is being started anew
    async def join(self, settings: dict[str, Any], process: Any) -> int:
        """Take a trial, and return its number here."""
        for earlier in self._trials.values():
            earlier.left |= earlier.process == process  # a process has one trial at a time
        number, trial = len(self._trials), _Trial(settings, process)
        self._trials[number] = trial
        self._joined_at = time.monotonic()
        self._waiting.append(trial)
        return number

    async def next(self, number: int) -> dict[str, Any] | None:
        """Wait for a trial's next report and return it; None at its end. Raises: what its run ended with."""
        trial = self._known(number)
        trial.deciding = False
        while not (trial.told or trial.ended):
            await asyncio.sleep(_POLL_S)
        if trial.told:
            trial.deciding = True  # before it is taken: who looks in between must not think that all is settled
            return trial.told.popleft()
        if trial.error is not None:
            raise trial.error
        return None

    async def leave(self, number: int) -> None:
        """Let a trial go, whose members then train no further."""
        self._known(number).left = True

    def _known(self, number: int) -> _Trial:
        if number not in self._trials:
            raise TrainingError(
                "the process that trained this trial's pack died, and was started anew",
                "let Tune try trials again, tune.RunConfig(failure_config=tune.FailureConfig(max_failures=3)): they go "
                "on from the pack's last commits",
            )
        return self._trials[number]

    # --- the packs -----------------------------------------------------------------------------------
    def _serve(self) -> None:
        while True:
            pack = self._gathered()
            try:
                self._train(pack)
            except Exception as error:  # whatever ends a pack ends its trials, and the next ones may do better
                logger.exception("a pack of %d trials failed", len(pack))
                for trial in pack:
                    trial.error = trial.error or error
            for trial in pack:
                trial.ended = True

    def _gathered(self) -> list[_Trial]:
        while True:
            self._waiting = [trial for trial in self._waiting if not self._is_gone(trial)]
            late = time.monotonic() - self._joined_at > self.gather_s
            if len(self._waiting) >= self.slots or (self._waiting and late):
                pack, self._waiting = self._waiting[: self.slots], self._waiting[self.slots :]
                return pack
            time.sleep(_POLL_S)

    def _train(self, pack: Sequence[_Trial]) -> None:
        from raylora.engine.run.local_driver import run_in_process
        from raylora.engine.run.plan_run import local_inventory, prepare
        from raylora.report.publish import publish_report

        # In an order of their own: whoever was first, the same trials are the same run. Equal ones share a place.
        places = sorted({json.dumps(trial.settings, sort_keys=True) for trial in pack})
        run = RunSpec.model_validate(pack_spec(self.spec, [json.loads(place) for place in places]))
        size = self.spec.ensemble.members
        members, boards = list[tuple[str, ...]](), list[Epochs]()
        for trial in pack:
            first = size * places.index(json.dumps(trial.settings, sort_keys=True))
            members.append(tuple(f"member-{m:03d}" for m in range(first, first + size)))
            boards.append(Epochs(trial.told.append, members[-1]))

        failed: dict[str, str] = {}

        def tell(status: Any) -> None:
            failed.update(status.failed)
            for board in boards:
                board(status)

        def leaving() -> Collection[str]:
            while not all(trial.settled or self._is_gone(trial) for trial in pack):
                time.sleep(_POLL_S)
            staying = {name for trial, own in zip(pack, members, strict=True) if not trial.left for name in own}
            return {name for own in members for name in own} - staying

        prepared = prepare(run, local_inventory(in_process=True))
        run_in_process(prepared, tell, leaving)
        publish_report(prepared.store)
        for trial, own, board in zip(pack, members, boards, strict=True):
            reasons = [f"{name}: {failed[name]}" for name in own if name in failed]
            if reasons:
                trial.error = TrainingError("; ".join(reasons))
            else:
                board.end(run=prepared.store.uri, members=list(own))

    def _is_gone(self, trial: _Trial) -> bool:
        """Return whether a trial has left, or its process has ended without a word."""
        if not trial.left:
            trial.probe = trial.probe or trial.process.__ray_ready__.remote()
            answered, _ = ray.wait([trial.probe], timeout=0)  # none from a process that is busy: it is alive
            if answered:
                try:
                    ray.get(trial.probe)
                except ActorDiedError:
                    trial.left = True
                trial.probe = None
        return trial.left
