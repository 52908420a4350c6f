"""For users of Ray Tune: a run of raylora as what its searchers and schedulers try (``raylora.tune_trainable``).

Where a grid or a random sample is enough, ``raylora.sweep`` is cheaper: its settings share one forward. Tune is for
searchers that learn from earlier trials; each trial is a run of its own, in the trial's own process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from raylora.client import run_local
from raylora.engine.run.run_status import RunStatus
from raylora.errors import SpecError
from raylora.spec import RunSpec
from raylora.spec.vary import with_settings

_KEPT = ("name", "storage_path", "placement")


def tune_trainable(spec: RunSpec) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that Ray Tune calls with a trial's settings, dotted keys of the spec and their values.

    It trains a run named after spec and trial in the spec's ``storage_path``, and reports at every epoch's end what the
    validation rows say, the mean of the members: ``validation_nll`` and, for classes, ``validation_accuracy`` and so
    on, with ``step``; with the last report comes ``run``, where the run lies. A trial that is started again goes on
    from its last commit. How many cores and GPUs it takes is what ``tune.with_resources`` gives the trial.

    Raises:
        SpecError: in the trial, settings that make no valid run, by name.
    """

    def trial(config: Mapping[str, Any]) -> None:
        from ray import tune

        own, board = _run_of(spec, config), _Epochs(tune.report)
        run_local(own, board)
        board.end(f"{own.storage_path.rstrip('/')}/{own.run_name()}")

    return trial


def _run_of(spec: RunSpec, config: Mapping[str, Any]) -> RunSpec:
    """Return the run of a trial: the spec with the trial's settings, in the resources that the trial has."""
    import ray
    from ray import tune

    fixed = [key for key in config if key.partition(".")[0] in _KEPT]
    if fixed:
        raise SpecError(f"{fixed[0]}: is the trial's own, not a setting to try", "search over other keys")
    assigned = ray.get_runtime_context().get_assigned_resources()
    resources = {"workers": 1, "cpus_per_worker": max(1, int(assigned.get("CPU", 1))),
                 "gpus_per_worker": int(assigned.get("GPU", 0))}
    content = spec.model_dump(mode="json")
    content["name"] = f"{spec.run_name()[:28]}-{tune.get_context().get_trial_id()[-11:]}".replace("_", "-")
    content["placement"] |= resources
    try:
        return RunSpec.model_validate(with_settings(content, config))
    except ValueError as error:
        said = "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}"
            for one in getattr(error, "errors", list)()
        )
        raise SpecError(f"the trial is no valid run: {said or error}") from None


class _Epochs:
    """Reports each epoch's end once all members that are known have reached it."""

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self.report = report
        self.reported = 0
        self.latest: dict[str, Any] = {}
        self._seen: dict[str, Any] = {}
        self._values: dict[str, list[tuple[int, Mapping[str, float]]]] = {}

    def __call__(self, status: RunStatus) -> None:
        """Take what the run says of itself."""
        for name, job in status.jobs.items():
            progress = job.progress
            if progress is None or progress is self._seen.get(name):
                continue
            self._seen[name] = progress
            for member, values in progress.validations.items():
                if _is_member(member):
                    self._values.setdefault(member, []).append((progress.done, values))
        members = [unit for job in status.jobs.values() for unit in job.units if _is_member(unit)]
        while members and all(len(self._values.get(member, ())) > self.reported for member in members):
            ended = [self._values[member][self.reported] for member in members]
            self.reported += 1
            self.latest = {
                "step": max(step for step, _ in ended),
                **{f"validation_{key}": statistics.fmean(values[key] for _, values in ended if key in values)
                   for key in ended[0][1]},
            }
            self.report(self.latest)

    def end(self, run: str) -> None:
        """Report the last numbers again, with where the run lies; of members that stopped early, their last."""
        ended = [values[-1] for values in self._values.values()]
        keys = ended[0][1] if ended else {}
        means = {f"validation_{key}": statistics.fmean(values[key] for _, values in ended if key in values)
                 for key in keys}
        self.report({**self.latest, **means, "run": run})


def _is_member(unit: str) -> bool:
    return unit.startswith("member-")
