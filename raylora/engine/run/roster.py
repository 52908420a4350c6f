"""Which members a run has, which it lost, and which it never had: nobody predicts with fewer without being told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raylora import control
from raylora.engine.training.member_plan import MADE_OF_MEMBER_0, MemberPlan, PlanRole, member_plans_of
from raylora.errors import RunDirectoryError, StoreError
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore
from raylora.store.seal import Seal, read_seal

_ENDED_WELL = (control.Phase.SUCCEEDED, control.Phase.DEGRADED)


@dataclass(frozen=True)
class Roster:
    """The members of a run, by what can be done with them."""

    uri: str
    usable: tuple[str, ...]
    lost: Mapping[str, str] = field(default_factory=dict)
    """Committed once and not whole any more -> what is the matter."""
    unfinished: Mapping[str, str] = field(default_factory=dict)
    """Not trained yet, or not with success -> why."""
    given_up: Mapping[str, str] = field(default_factory=dict)
    """Failed in a run that was content with fewer members -> why."""

    @property
    def asked(self) -> int:
        """How many members the run's spec asks for."""
        return sum(map(len, (self.usable, self.lost, self.unfinished, self.given_up)))

    def members(self, allow_missing: bool = False) -> list[str]:
        """Return the members to go on with.

        Args:
            allow_missing: whether those that are left will do.

        Raises:
            StoreError: a member is damaged or missing.
            RunDirectoryError: one is not finished, or none is there.
        """
        if not self.usable and not self.lost:
            raise RunDirectoryError(f"{self.uri}: no member is finished", f"raylora resume {self.uri}")
        some = f"go on with {len(self.usable)} of {self.asked}: --allow-missing (in Python: allow_missing=True)"
        if self.lost and (not allow_missing or not self.usable):
            one = len(self.lost) == 1
            raise StoreError(
                "; ".join(f"{self.uri}: {name} {why}" for name, why in self.lost.items()),
                f"`raylora repair {self.uri}` trains {'it' if one else 'them'} again"
                + (f"; or {some}" if self.usable else ""),
            )
        if self.unfinished and not allow_missing:
            raise RunDirectoryError(
                "; ".join(f"{self.uri}: {name} {why}" for name, why in self.unfinished.items()),
                f"finish it: raylora resume {self.uri}; or {some}",
            )
        return list(self.usable)


def read_state(store: RunStore) -> control.State:
    """Return where a run stands, from its log."""
    return control.replay(control.from_record(record) for record in store.read_events())


def read_roster(store: RunStore) -> Roster:
    """Return which members of a run are whole; every one's files are read and compared with their checksums.

    Raises:
        RunDirectoryError: there is no run.
    """
    state, seal = read_state(store), sound_seal(store)
    no_log = state.phase is control.Phase.PENDING
    known = set(seal.members) if no_log and seal is not None else set(state.finished_units())
    at_rest = no_log or state.phase in _ENDED_WELL
    usable: list[str] = []
    lost: dict[str, str] = {}
    never: dict[str, str] = {}
    for plan in member_plans_of(store.read_spec()):
        if plan.role is not PlanRole.MEMBER:
            continue
        damage = _damage_of(store, plan.folder, seal if at_rest else None)
        if not damage:
            usable.append(plan.name)
        elif plan.name in known:
            lost[plan.name] = damage
        else:
            reason = state.failed_units.get(plan.name)
            never[plan.name] = f"failed: {reason}" if reason else "is not trained yet"
    content = state.phase is control.Phase.DEGRADED or (no_log and seal is not None)
    return Roster(store.uri, tuple(usable), lost, {} if content else never, never if content else {})


def check_whole(store: RunStore, allow_missing: bool = False) -> None:
    """Refuse a finished run of which something that its report speaks of is damaged or missing.

    Raises:
        StoreError: with what is the matter.
    """
    seal = sound_seal(store)
    if seal is not None and read_state(store).phase in _ENDED_WELL:
        damage = seal.damage_of(store.storage, "metrics.json")
        if damage:
            raise StoreError(f"{store.uri}: metrics.json {damage}", f"`raylora repair {store.uri}` writes it again")
        read_roster(store).members(allow_missing)


@dataclass(frozen=True)
class Damage:
    """A committed folder that is not whole, and the unit that has to be done again for it."""

    unit: str
    folder: str
    why: str

    def __str__(self) -> str:
        return f"{self.folder} {self.why}"


def damages_of(store: RunStore, spec: RunSpec) -> list[Damage]:
    """Return what is not whole of the units that are finished, baselines and their predictions too."""
    state, seal = read_state(store), sound_seal(store)
    sealed = seal if state.phase in _ENDED_WELL else None
    finished = set(state.finished_units())
    folders = [(plan.name, folder) for plan in member_plans_of(spec) if plan.name in finished
               for folder in folders_of(plan)]
    # What was made of member 0, or kept of its training, is made again with member 0.
    made_of_it = {f"predictions/{name}" for name in MADE_OF_MEMBER_0}
    folders += [("member-000", folder) for folder in (sealed.folders() if sealed is not None else ())
                if folder in made_of_it or folder.startswith("snapshots/")]
    found = ((unit, folder, _damage_of(store, folder, sealed)) for unit, folder in folders)
    return [Damage(unit, folder, why) for unit, folder, why in found if why]


def clear(store: RunStore, damages: Sequence[Damage]) -> None:
    """Delete what is damaged, so that it is made again."""
    for damage in damages:
        store.storage.delete(damage.folder)
        if damage.folder.startswith("snapshots/"):  # only a training from its start passes those steps again
            of_member_0 = (f"predictions/{name}" for name in MADE_OF_MEMBER_0)
            for folder in (f"members/{damage.unit}", f"checkpoints/{damage.unit}", *of_member_0):
                store.storage.delete(folder)


def folders_of(plan: MemberPlan) -> tuple[str, str]:
    """Return where the weights and the predictions of a unit lie in the run directory."""
    return plan.folder, f"predictions/{plan.name}"


def sound_seal(store: RunStore) -> Seal | None:
    """Return the run's seal, or None where there is none that can be read: the log then says what was finished."""
    try:
        return read_seal(store.storage)
    except ValueError:
        return None


def _damage_of(store: RunStore, folder: str, seal: Seal | None) -> str:
    return store.damage_of(folder) or (seal.damage_of(store.storage, folder) if seal is not None else "")
