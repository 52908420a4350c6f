"""The two-column tables: which run it was, what it cost and where it ran, in a reader's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raylora.records import RunMetrics
from raylora.report.formatting import flat, moment

LABELS = {
    "digest": "Spec digest",
    "phase": "State",
    "started_at": "Started",
    "finished_at": "Finished",
    "members_asked": "Members asked for",
    "members_done": "Members finished",
    "total_s": "Wall time",
    "train_s": "Training, all jobs together",
    "evaluate_s": "Evaluation, all jobs together",
    "train_s_per_job_mean": "Training of one job, on average",
    "tokens": "Tokens trained on",
    "tokens_per_s": "Tokens per second of training",
    "answer_s": "Writing answers, all shards together",
    "answer_tokens": "Tokens written",
    "answer_tokens_per_s": "Tokens per second of writing",
    "peak_rss_bytes_per_worker": "Peak memory per worker",
    "peak_device_bytes_per_worker": "Peak GPU memory per worker",
    "peak_rss_bytes": "Peak memory",
    "fit_s": "Fitting",
    "predict_s": "Prediction of all sets",
    "stored_numbers": "Numbers kept",
    "member_bytes": "One member",
    "dense_bytes": "Before quantization",
    "quantized_bytes": "Quantized",
    "pair_bytes": "Low-rank pairs",
    "per_member_trainable": "Trained per member",
    "compute_dtype": "Computed in",
    "threads": "Threads per worker",
    "cpus": "CPUs",
    "gpu": "GPU",
    "gpus": "GPUs",
    "bf16_native": "Multiplies bfloat16 natively",
}
"""Field -> what the page calls it; others by their words."""
_TITLES = {"timing": "Time", "memory": "Memory", "parameters": "Parameters", "compute": "Computation",
           "machine": "Machine", "baseline_costs": "Baselines made of member 0"}
_KINDS = ("task", "phase", "quantization")
_MOMENTS = ("started_at", "finished_at")


def run_facts(metrics: RunMetrics) -> list[tuple[str, str]]:
    """Return which run it was and how it ended."""
    run: Mapping[str, Any] = metrics.get("run") or {}
    shown = {key: _said(key, value) for key, value in run.items() if key not in ("name", "degraded")}
    return flat(shown, labels=LABELS)


def facts(metrics: RunMetrics) -> dict[str, list[tuple[str, str]]]:
    """Return what a run cost and where it ran, by title."""
    known: Mapping[str, Any] = metrics
    found = {title: flat(_measured(known.get(key) or {}), labels=LABELS) for key, title in _TITLES.items()}
    return {title: rows for title, rows in found.items() if rows}


def _measured(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out peaks of devices that there were not."""
    return {key: value for key, value in values.items() if not (isinstance(value, list) and not any(value))}


def _said(key: str, value: Any) -> Any:
    if key in _MOMENTS:
        return moment(value)
    return value.replace("_", " ") if key in _KINDS and isinstance(value, str) else value
