"""For users of Ray Tune: a run of raylora as what its searchers and schedulers try (``raylora.tune_trainable``).

Where a grid or a random sample is enough, ``raylora.sweep`` needs no Tune. Tune is for searchers that learn from
earlier trials. A trial is a run of its own in the trial's own process, or, with slots, a place in a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from raylora.errors import SpecError
from raylora.spec import RunSpec
from raylora.spec.base import said_by
from raylora.spec.vary import with_settings

_KEPT = ("name", "storage_path", "placement")
_RESTARTS = 3
"""How often the process of a pack may die: trials that Tune tries again go on from its last commits."""
Trainable = Callable[[Mapping[str, Any]], None]


def tune_trainable(spec: RunSpec, slots: int | None = None, gather_s: float = 30.0) -> Trainable:
    """Return a function that Ray Tune calls with a trial's settings, dotted keys of the spec and their values.

    It reports at every epoch's end what the validation rows say, the mean of the trial's members: ``validation_nll``
    and, for classes, ``validation_accuracy`` and so on, with ``step``; with the last report comes ``run``, where the
    run lies. A trial that is started again goes on from its last commit.

    Without slots each trial trains a run named after spec and trial in the spec's ``storage_path``, on the cores and
    GPUs that ``tune.with_resources`` gives the trial.

    With slots, so many trials are the members of one run and share every forward: what ``ensemble.vary`` may name can
    be searched over. One actor trains them, on a worker's cores and GPU as ``placement`` has them; trials take none,
    so ``TuneConfig(max_concurrent_trials=slots)`` is what limits them. A trial has the seeds of the spec, and comes out
    as it would alone; who is stopped by a scheduler leaves the pack, whose places are taken anew when it has ended. The
    last report also has ``members``, the trial's own in the run. Baselines, ``select`` and ``weights`` are left out.

    Args:
        slots: how many trials train together.
        gather_s: a pack that is not full begins when for so many seconds no trial has joined.

    Raises:
        SpecError: with slots, a spec that varies or prunes its members itself, or takes several workers for a pack;
            in the trial, settings that make no valid run, by name.
    """
    return _one_run_each(spec) if slots is None else _in_packs(spec, slots, gather_s)


def _one_run_each(spec: RunSpec) -> Trainable:
    def trial(config: Mapping[str, Any]) -> None:
        from ray import tune

        from raylora.client import run_local
        from raylora.trials.epochs import Epochs

        own, board = _run_of(spec, config), Epochs(tune.report)
        run_local(own, board)
        board.end(run=f"{own.storage_path.rstrip('/')}/{own.run_name()}")

    return trial


def _in_packs(spec: RunSpec, slots: int, gather_s: float) -> Trainable:
    import ray
    from ray import tune

    from raylora.connection import cluster_inventory, connect
    from raylora.trials.packs import PackHost, pack_spec

    if slots < 1:
        raise SpecError(f"slots: {slots} is no number of trials", "use at least 1")
    if spec.placement.data_parallel > 1 or spec.placement.strategy == "shard":
        raise SpecError("placement: shard and data_parallel take several processes, and one trains a pack of trials",
                        "leave slots out, or use placement.strategy replicate and data_parallel 1")
    pack_spec(spec, [])
    connect()
    node = max(cluster_inventory().nodes, key=lambda one: (len(one.gpus), one.cpus))
    placement = spec.placement
    gpus = min(1, len(node.gpus)) if placement.gpus_per_worker == "auto" else placement.gpus_per_worker
    cpus = max(1, node.cpus // max(1, len(node.gpus))) if placement.cpus_per_worker == "auto" else (
        placement.cpus_per_worker)
    spec = _validated({**spec.model_dump(mode="json"), "placement": {
        **placement.model_dump(mode="json"), "workers": 1, "cpus_per_worker": cpus, "gpus_per_worker": gpus,
    }}, {})
    host: Any = ray.remote(
        num_cpus=cpus, num_gpus=gpus, resources=placement.resources, max_restarts=_RESTARTS
    )(PackHost).remote(spec, slots, gather_s)

    def trial(config: Mapping[str, Any]) -> None:
        settings = _settings(config)
        _validated(pack_spec(spec, [settings]), {})  # who is refused here spoils nobody's pack
        number = ray.get(host.join.remote(settings, ray.get_runtime_context().current_actor))
        try:
            while (told := ray.get(host.next.remote(number))) is not None:
                tune.report(told)
        finally:
            host.leave.remote(number)  # also when Tune stops it: then its members need no further step

    return tune.with_resources(trial, {"CPU": 0, "memory": 1})  # a byte: Tune refuses trials that take nothing at all


def _run_of(spec: RunSpec, config: Mapping[str, Any]) -> RunSpec:
    """Return the run of a trial: the spec with the trial's settings, in the resources that the trial has."""
    import ray
    from ray import tune

    assigned = ray.get_runtime_context().get_assigned_resources()
    resources = {"workers": 1, "cpus_per_worker": max(1, int(assigned.get("CPU", 1))),
                 "gpus_per_worker": int(assigned.get("GPU", 0))}
    content = spec.model_dump(mode="json")
    content["name"] = f"{spec.run_name()[:28]}-{tune.get_context().get_trial_id()[-11:]}".replace("_", "-")
    content["placement"] |= resources
    return _validated(content, _settings(config))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial's settings as plain data: searchers draw numbers of numpy's."""
    fixed = [key for key in config if key.partition(".")[0] in _KEPT]
    if fixed:
        raise SpecError(f"{fixed[0]}: is the trial's own, not a setting to try", "search over other keys")
    return {key: value.item() if hasattr(value, "item") else value for key, value in config.items()}


def _validated(content: Mapping[str, Any], config: Mapping[str, Any]) -> RunSpec:
    try:
        return RunSpec.model_validate(with_settings(content, config))
    except ValidationError as error:
        raise SpecError(f"the trial is no valid run: {said_by(error)}") from None
    except ValueError as error:
        raise SpecError(f"the trial is no valid run: {error}") from None
