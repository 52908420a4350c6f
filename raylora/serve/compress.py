"""A finished run's members in a fraction of their bytes, as a run directory that predicts and is evaluated as any."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from raylora.adapters.side_by_side import SideBySide
from raylora.data.texts import text_finder
from raylora.engine.model.base import load_base
from raylora.engine.model.machine import compute_device
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.model.quantized_layers import prepared_store
from raylora.engine.run.compressed_members import FILE, CompressedMember, compress_member
from raylora.engine.run.evaluation import Evaluator, read_trained
from raylora.engine.run.finished_members import member_tensors, weights_of
from raylora.engine.run.roster import read_roster
from raylora.engine.run.run_metrics import aggregate
from raylora.engine.training.distillation_loss import task_of
from raylora.engine.training.inputs import sets_of
from raylora.engine.training.member_plan import member_adapters, member_plans_of
from raylora.ensemble.metric_table import METRICS
from raylora.ensemble.outputs.base import Names
from raylora.errors import RunDirectoryError, UsageError
from raylora.records import RunMetrics
from raylora.spec import RunSpec
from raylora.spec.baselines import BaselinesSpec
from raylora.store.run_store import RunStore

_COPIED = ("data.json", "base.json")
_PLAIN = "adapter_model.safetensors"


@dataclass(frozen=True)
class CompressedSize:
    """What one member became."""

    member: str
    size_bytes: int
    compressed_bytes: int
    change_error: float
    """``|| change - compressed change ||_F / || change ||_F`` over all layers."""
    vectors: dict[int, int]
    """Bits -> how many pairs of singular vectors have them; 0 are left out."""


@dataclass(frozen=True)
class Difference:
    """A metric of the ensemble on a set, before and after."""

    set: str
    metric: str
    whole: float
    compressed: float


@dataclass(frozen=True)
class Compressed:
    """A run's compressed members, and what that costs."""

    folder: str
    members: list[CompressedSize]
    differences: list[Difference]


def compress_run(run: str, budget: float, out: str | None = None, allow_missing: bool = False) -> Compressed:
    """Write a run directory with a run's members in a share of their bytes, predict its sets anew and compare.

    Everything that takes a finished run takes that directory: to predict, to evaluate, to export, for its report.

    Args:
        budget: the share of ``adapter_model.safetensors`` that each member's file may take, above 0 and below 1.
        out: a folder or fsspec URI that holds nothing yet; by default the run's with ``-compressed`` behind it.
        allow_missing: go on without members that are damaged, missing or not finished.

    Raises:
        UsageError: the budget is no share, too small for a head, or members have no pair of matrices per layer.
        RunDirectoryError: there is no finished run, or ``out`` is not empty.
        StoreError: a member is damaged or missing.
    """
    if not 0 < budget < 1:
        raise UsageError(f"--budget: {budget:g} is no share of the members' bytes", "use a number such as 0.1")
    store = RunStore(run)
    spec = store.read_spec()
    before: RunMetrics | None = store.read_json("metrics.json")
    if before is None:
        raise RunDirectoryError(f"{run}: has no metrics yet to compare with", f"finish it: raylora resume {run}")
    target = RunStore(out or f"{store.uri}-compressed")
    if target.storage.list():
        raise RunDirectoryError(f"{target.uri}: is not empty", "choose another folder with --out, or delete it")
    names = read_roster(store).members(allow_missing)
    files = {name: store.load_result(f"members/{name}") for name in names}
    done: dict[str, CompressedMember] = {}
    sizes = []
    for name, found in files.items():
        size = len(weights_of(found))
        try:
            done[name] = compress_member(member_tensors(found), int(budget * size))
        except UsageError as error:
            raise UsageError(f"{name}: {error.message}", error.hint) from None
        one = done[name]
        sizes.append(CompressedSize(name, size, len(one.content), one.change_error, dict(one.vectors)))
    parent, _, own_name = target.uri.rpartition("/")
    spec = spec.model_copy(update={"storage_path": parent, "name": own_name, "baselines": BaselinesSpec(),
                                   "distill": None})
    target.write_spec(spec)
    for name in _COPIED:
        if store.storage.exists(name):
            target.storage.write(name, store.storage.read(name))
    for event in store.read_events():  # what happened to these members is their history still
        target.append_event(event)
    for name in store.storage.list("timing"):
        target.storage.write(f"timing/{name}", store.storage.read(f"timing/{name}"))
    for name, found in files.items():
        kept = {file: content for file, content in found.items() if file not in (_PLAIN, FILE)}
        target.commit_result(f"members/{name}", {**kept, FILE: done[name].content})
    after = _evaluate(spec, store, target, names)
    target.seal(names)
    compressed = Compressed(target.uri, sizes, differences(before, after))
    target.write_json("compression.json", {"budget": budget, "of": store.uri.rpartition("/")[2], **asdict(compressed)})
    return compressed


def _evaluate(spec: RunSpec, store: RunStore, target: RunStore, names: Sequence[str]) -> RunMetrics:
    """Predict a run's sets with its compressed members, commit that, and return the metrics."""
    started, task, plans = time.time(), task_of(spec), {plan.name: plan for plan in member_plans_of(spec)}
    base = load_base(
        spec.base, member_adapters(spec), task, compute_device(torch.cuda.device_count()), prepared_store(store)
    )
    sets = sets_of(spec, task, base.tokenizer, store)
    members = [read_trained(spec, target, base, plans[name]) for name in names]
    beside = SideBySide.of([one.plan.adapter for one in members])
    Evaluator(spec, target, task, base, sets).evaluate(
        PackedModel(base, beside.adapters, task), members, lambda progress: None, lambda: 0
    )
    return aggregate(spec, target, names, started, Names(task.label_names, text_finder(sets, base.tokenizer)))


def differences(before: RunMetrics, after: RunMetrics) -> list[Difference]:
    """Return the ensemble's metrics that both have, set by set."""
    found: list[Difference] = []
    sets: list[dict[str, dict[str, Any]]] = [dict(one["ensemble"]["eval"]) for one in (before, after)]  # type: ignore
    for name, whole in sets[0].items():
        own = sets[1].get(name, {})
        found += [
            Difference(name, key, float(value), float(own[key])) for key, value in whole.items()
            if key in METRICS and isinstance(value, int | float) and isinstance(own.get(key), int | float)
        ]
    return found
