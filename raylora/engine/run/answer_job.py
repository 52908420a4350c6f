"""What is asked of a run's finished members, as far as a worker must know it; it imports no torch.

To have rows answered, make an :class:`AnswerJob` and plan it with
:func:`raylora.engine.run.answer_plan.plan_answers`; both the local driver and a cluster carry the plan out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from raylora.engine.run.work import Session
from raylora.spec import RunSpec, SetSpec
from raylora.store.run_store import RunStore

if TYPE_CHECKING:
    from raylora.engine.model.gang import GangPlace

SHARD_ROWS = 32
SHARDS = "shards"
ANSWERS = "answers"
"""The folder of a run directory in which a folder per :meth:`AnswerJob.key` holds the shards."""


@dataclass(frozen=True)
class AnswerJob:
    """Rows of a run's sets, and how its members answer them: the mixture of all, and if asked each on its own."""

    run_uri: str
    members: tuple[str, ...]
    """Who is asked, by name."""
    digest: str
    """Of these members: see :func:`raylora.engine.run.finished_members.members_digest`."""
    sets: tuple[str, ...]
    """``train``, ``validation``, ``test``, and the names of the run's other sets."""
    rows: int | None = None
    """Of each set, at most: its first ones. None is all."""
    transfer: SetSpec | None = None
    """Further rows behind those of ``train``, as a distillation has them; they need only ask."""
    max_new_tokens: int = 64
    temperature: float = 0.0
    """Of the mixture; 0 takes the most probable token each time."""
    top_p: float = 1.0
    seed: int = 0
    weights: tuple[float, ...] | None = None
    """What each member weighs; None where all weigh alike."""
    each_member: bool = False
    """Every member's own greedy answer too, without its single tokens."""
    shard_rows: int = SHARD_ROWS

    def key(self) -> str:
        """Return what tells answers of other members, or written in another way, apart; rows have names of their own.

        So that a job of more rows, or of further sets, finds what one of fewer has committed.
        """
        left_out = ("run_uri", "members", "sets", "rows", "transfer", "weights")
        facts = {name: value for name, value in asdict(self).items() if name not in left_out}
        if self.weights is not None:  # two kinds of machines may differ in their last bits
            facts["weights"] = [round(weight, 6) for weight in self.weights]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def make_session(
        self, spec: RunSpec, store: RunStore, cpus: int, gpus: int, place: GangPlace | None = None
    ) -> Session:
        """Return what a worker answers on; each has a whole base."""
        from raylora.engine.run.answer_plan import AnswerSession

        return AnswerSession(spec, store, cpus, gpus, self)
