"""What a run's numbers suggest to change: was it trained too short or too long, and what says its temperature?"""

from __future__ import annotations

from statistics import fmean

from raylora.ensemble.metric_table import METRICS
from raylora.records import RunMetrics
from raylora.report.formatting import number
from raylora.report.outputs.base import section_of

_NOTICEABLE = 0.02
"""The share by which a validation metric must have moved for a sentence to be worth reading."""
_SURE_ENOUGH = 1.1
"""Temperatures from its inverse to it change no decision."""


def advice(metrics: RunMetrics) -> list[str]:
    """Return sentences that each name what was seen and the setting to change; none where all looks well."""
    return [sentence for sentence in (training_advice(metrics), temperature_advice(metrics)) if sentence]


def temperature_advice(metrics: RunMetrics) -> str:
    """Return what the ensemble's temperature says of its training, or nothing."""
    ensemble = metrics.get("ensemble", {})
    value, fit = ensemble.get("temperature"), ensemble.get("temperature_fit")
    if value is None or fit is None or fit["degenerate"]:
        return ""
    moved = f"T = {value:.2f} brings the validation NLL from {fit['nll_before']:.3f} to {fit['nll_after']:.3f}"
    if value < 1 / _SURE_ENOUGH:
        return (
            f"The ensemble is underconfident: it is right more often than it says ({moved}). Most often that is an "
            "undertrained model: raise optimization.epochs or optimization.lr. Until then use calibrated predictions, "
            "which `raylora predict` gives by default."
        )
    if value > _SURE_ENOUGH:
        return (
            f"The ensemble is overconfident: it is right less often than it says ({moved}). Most often it was trained "
            "for too long: lower optimization.epochs, set ensemble.regularizers.early_stopping, or add members. "
            "`raylora predict` gives calibrated predictions by default."
        )
    return ""


def training_advice(metrics: RunMetrics) -> str:
    """Return whether the validation metric was still improving at the end, or had long become worse; or nothing."""
    watched = section_of(metrics).watched
    curve = mean_curve(metrics, watched[0]) if watched else []
    if len(curve) < 2:
        return ""
    (_, before), (last_step, last) = curve[-2:]
    best_step, best = min(curve, key=lambda point: point[1])
    name, small = METRICS[watched[0]].label, _NOTICEABLE * abs(best)
    shown = [number(value, watched[0]) for value in (before, last, best)]
    if best_step == last_step and before - last > small:
        return (
            f"Validation {name} was still falling when training ended ({shown[0]} to {shown[1]} over the last epoch): "
            "raise optimization.epochs (or steps), or optimization.lr."
        )
    if any(member.get("stopped_at") is not None for member in metrics.get("members", ())):
        return ""  # early stopping has kept their best states
    if last - best > small and best_step <= (curve[0][0] + last_step) / 2:
        return (
            f"Validation {name} was best at step {best_step:.0f} of {last_step:.0f} ({shown[2]}) and rose to "
            f"{shown[1]} by the end: lower optimization.epochs, or set ensemble.regularizers.early_stopping."
        )
    return ""


def mean_curve(metrics: RunMetrics, metric: str) -> list[tuple[float, float]]:
    """Return (step, mean over the members that were validated at it) of a validation metric whose least is best.

    Only steps that all members reached: one that was stopped early would bend the mean.
    """
    key = f"validation_{metric}"
    histories = [{row["step"]: row[key] for row in rows if row.get(key) is not None}
                 for rows in metrics.get("training", {}).values()]
    common = sorted(set.intersection(*map(set, histories))) if histories else []
    return [(step, fmean(history[step] for history in histories)) for step in common]
