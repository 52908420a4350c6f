"""From the members' committed predictions to ``metrics.json``."""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any, Literal

from raylora.adapters.names import adapter_name
from raylora.engine.model.machine import machine
from raylora.engine.model.quantized_layers import prepared_store, summary_of
from raylora.engine.run.derived import COSTS
from raylora.engine.run.finished_members import member_facts
from raylora.engine.run.run_answers import Answered
from raylora.engine.run.speakers import predictions_of
from raylora.engine.training.member_plan import MADE_OF_MEMBER_0, PlanRole, member_adapters, member_plans_of
from raylora.ensemble.calibration import tempered
from raylora.ensemble.groups import Group, one_member
from raylora.ensemble.outputs.base import Names
from raylora.ensemble.summary import find_errors, fit_group, summarize
from raylora.records import AnswerTiming, Compute, HistoryRow, JobTiming, RunMetrics, ShardTiming, Timing
from raylora.spec import RunSpec, dump_spec
from raylora.store.run_store import RunStore

_PACKAGES = (
    "raylora", "ray", "torch", "transformers", "deepspeed", "bitsandbytes", "peft", "datasets",
    "pydantic", "numpy",
)


def aggregate(
    spec: RunSpec, store: RunStore, finished: Sequence[str], started_at: float, names: Names,
    answered: Answered | None = None,
) -> RunMetrics:
    """Combine the finished units' predictions, write ``metrics.json`` and return it.

    Args:
        names: what the classes are called, and what stands in single rows.
        answered: what came of the answers that were written, if any were.

    Raises:
        StoreError: a prediction is missing or damaged.
    """
    roles = {plan.name: plan.role for plan in member_plans_of(spec)}
    members = [name for name in finished if roles[name] is PlanRole.MEMBER]
    groups: dict[str, Group] = {"ensemble": predictions_of(store, members)}
    dropped = [name for name in finished if roles[name] is PlanRole.MC_DROPOUT]
    heads = [name for name in finished if roles[name] is PlanRole.LAST_LAYER]
    if dropped:
        groups["mc_dropout"] = predictions_of(store, dropped)
    if heads:
        groups["last_layer"] = predictions_of(store, heads)
    for name in MADE_OF_MEMBER_0:
        if store.has_result(f"predictions/{name}"):
            groups[name] = predictions_of(store, [name])
    if spec.baselines.temperature:
        groups["temperature"], fitted = tempered(one_member(groups["ensemble"], 0))
    fits = fit_group(groups["ensemble"], members, spec.ensemble) if spec.ensemble.is_fitted else []
    for fit in fits:
        chosen = [members.index(name) for name in fit.weights.names]
        groups[fit.name] = [part.weighted(chosen, fit.weights.weights_M) for part in groups["ensemble"]]
    summary = summarize(groups, spec.evaluation, spec.ensemble.aggregate, seed=spec.data.seed)
    for fit in fits:
        summary["weighted"][fit.name].update(fit.record())
    if not spec.baselines.single:
        summary["baselines"].pop("single", None)
    if spec.baselines.temperature:
        summary["baselines"]["temperature"]["scaled_by"] = fitted.value
    if "laplace" in groups:
        found = json.loads(store.load_result("predictions/laplace")["laplace.json"])
        summary["baselines"]["laplace"]["laplace_fit"] = found
    for entry, name in zip(summary["members"], members, strict=True):
        facts = _member(store, name)
        entry["name"], entry["stopped_at"] = name, facts["stopped_at"]
        if "settings" in facts:
            entry["settings"] = facts["settings"]
    errors = find_errors(groups["ensemble"], spec.evaluation, names, spec.ensemble.aggregate)
    metrics: RunMetrics = {
        **summary, "label_names": list(names.labels), "errors": errors,
        **_facts(spec, store, members, started_at, answered.timings if answered is not None else ()),
    }
    if answered is not None:
        metrics["answers"] = answered.numbers
    store.write_json("metrics.json", metrics)
    return metrics


def _facts(
    spec: RunSpec, store: RunStore, members: Sequence[str], started_at: float, shards: Sequence[ShardTiming]
) -> RunMetrics:
    jobs: list[JobTiming] = [store.read_json(f"timing/{name}") for name in store.storage.list("timing")]
    asked = spec.ensemble.members
    histories: dict[str, list[HistoryRow]] = {name: _member(store, name)["history"] for name in members}
    facts: RunMetrics = {
        "run": {
            "name": spec.run_name(),
            "digest": spec.digest(),
            "phase": "succeeded" if len(members) == asked else "degraded",
            "started_at": started_at,
            "finished_at": time.time(),
            "task": spec.task.kind,
            "base": spec.base.source,
            "adapter": " and ".join(dict.fromkeys(adapter_name(one).name for one in member_adapters(spec))),
            "quantization": spec.base.quantization.kind,
            "members_asked": asked,
            "members_done": len(members),
            "degraded": len(members) < asked,
        },
        "spec_yaml": dump_spec(spec),
        "versions": _versions(),
        "machine": machine(),
        "timing": {**_timing(jobs, started_at), **_answer_timing(shards)},
        "memory": {
            "peak_rss_bytes_per_worker": _peaks([*jobs, *shards], "peak_rss_bytes"),
            "peak_device_bytes_per_worker": _peaks([*jobs, *shards], "peak_device_bytes"),
            "base_bytes": max((job["base_bytes"] for job in jobs), default=0),
            "member_bytes": 4 * max((job["member_parameters"] for job in jobs), default=0),
        },
        "parameters": {
            "base": max((job["base_parameters"] for job in jobs), default=0),
            "head": max((job.get("head_parameters", 0) for job in jobs), default=0),
            "per_member_trainable": max((job.get("trained_parameters", job["member_parameters"]) for job in jobs),
                                        default=0),
        },
        "compute": _compute(jobs),
        "data": (store.read_json("data.json") or {}).get("sets", []),
        "training": histories,
    }
    costs = store.read_json(COSTS)
    if costs:
        facts["baseline_costs"] = costs
    prepared = prepared_store(store)
    if prepared is not None:
        facts["preparation"] = summary_of(prepared)
    return facts


def _compute(jobs: Sequence[JobTiming]) -> Compute:
    if not jobs:
        return {}
    first = jobs[0]
    return {"compute_dtype": first["compute_dtype"], "device": first["device"], "threads": first["threads"]}


def _member(store: RunStore, name: str) -> dict[str, Any]:
    return member_facts(store.load_result(f"members/{name}"))


def _timing(jobs: Sequence[JobTiming], started_at: float) -> Timing:
    train_s = sum(job["train_s"] for job in jobs)
    return {
        "total_s": time.time() - started_at,
        "train_s": train_s,
        "evaluate_s": sum(job["evaluate_s"] for job in jobs),
        "train_s_per_job_mean": statistics.fmean(job["train_s"] for job in jobs) if jobs else 0.0,
        "tokens": sum(job["tokens"] for job in jobs),
        "tokens_per_s": sum(job["tokens"] for job in jobs) / train_s if train_s else 0.0,
    }


def _answer_timing(shards: Sequence[ShardTiming]) -> AnswerTiming:
    if not shards:
        return {}
    answer_s, tokens = sum(shard["answer_s"] for shard in shards), sum(shard["answer_tokens"] for shard in shards)
    return {"answer_s": answer_s, "answer_tokens": tokens, "answer_tokens_per_s": tokens / answer_s}


def _peaks(jobs: Sequence[JobTiming | ShardTiming], key: Literal["peak_rss_bytes", "peak_device_bytes"]) -> list[int]:
    """Return one peak per worker process: its jobs ran one after another and a peak only grows."""
    peaks: dict[int, int] = {}
    for job in jobs:
        peaks[job["pid"]] = max(peaks.get(job["pid"], 0), job[key])
    return list(peaks.values())


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
