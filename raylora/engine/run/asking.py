"""What it takes to ask a finished run's members: its base, its rows, and those that only a teacher labels."""

from __future__ import annotations

from raylora.data.sets import DataSets
from raylora.engine.run.session import TrainingSession
from raylora.engine.training.inputs import sets_of
from raylora.progress import Span, unmarked
from raylora.spec import RunSpec, SetSpec
from raylora.store.run_store import RunStore


class AskingSession:
    """Asks a run's members about rows and commits what they say; it writes nothing else."""

    def __init__(self, spec: RunSpec, store: RunStore, cpus: int, gpus: int, run_uri: str) -> None:
        """Take the spec and the place of the members' run, and the store of what is committed."""
        self.spec, self.store = spec, store
        self.session = TrainingSession(spec, RunStore(run_uri), cpus, gpus)
        self.span: Span = unmarked

    @property
    def base_bytes(self) -> int:
        """How much of the base is held, once it is loaded."""
        return self.session.base_bytes

    def load_sets(self, transfer: SetSpec | None, asks: bool = False) -> DataSets:
        """Load the base and return the run's rows, with those of a transfer set, of which ``asks`` reads only prompts.

        Raises:
            RunDirectoryError: the data is not what the run was trained with.
        """
        session = self.session
        session.load()
        if transfer is None:
            return session.sets
        return sets_of(
            self.spec, session.task, session.base.tokenizer, session.store, transfer, asks=asks, as_begun=True
        )
