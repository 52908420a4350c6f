"""What a run showed, in plain words, and honest where it showed nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raylora.ensemble.metric_table import METRICS
from raylora.records import Gain, Gains, RunMetrics
from raylora.report.entries import adapter_of, scored_sets, set_names, value_of
from raylora.report.formatting import difference, number
from raylora.report.outputs.base import section_of


def headline(metrics: RunMetrics) -> list[str]:
    """Return sentences, the most important first; empty where nothing was evaluated."""
    sets = scored_sets(metrics)
    if not sets:
        return []
    members = metrics["ensemble"].get("members", 0)
    if members < 2:
        return ["One member was trained, so there is no ensemble to compare with it.", *_degraded(metrics)]
    first, *more = section_of(metrics).headline
    sentences = [_comparison(metrics, sets[0], metric) for metric in (first, *more)]
    sentences += [_comparison(metrics, name, first) for name in sets[1:]]
    sentences += [_fitted(metrics, sets[0], name) for name in metrics.get("weighted", {})]
    sentences += [_detection(metrics, name) for name in set_names(metrics, "out_of_distribution")]
    return [*[sentence for sentence in sentences if sentence], *_degraded(metrics)]


def _comparison(metrics: RunMetrics, name: str, metric: str) -> str:
    value = value_of(metrics["ensemble"]["eval"][name], metric)
    gains: Gains | None = metrics.get("gains", {}).get(name)
    if value is None or not gains:
        return ""
    against = (
        (gains.get("over_mean_member", {}), "its average member"), (gains.get("over_single", {}), _single(metrics))
    )
    parts = [_verdict(gain[metric], metric, other) for gain, other in against if metric in gain]
    members = metrics["ensemble"].get("members", 0)
    return (
        f"On {name}, the ensemble of {members} has {_article(metric)} {METRICS[metric].in_words} "
        f"of {number(value, metric)}: {'; '.join(parts)}."
    )


def _fitted(metrics: RunMetrics, set_name: str, fitted: str) -> str:
    """Say what weights that the validation rows asked for gain over the plain mean on the test rows."""
    content = metrics["weighted"][fitted]
    gains = content["gains"][set_name]["over_ensemble"]
    if "nll" not in gains:
        return ""
    weights = ", ".join(f"{name} {weight:.3g}" for name, weight in content["weights"].items())
    chosen = "Chosen on the validation rows" if fitted == "selected" else "Weighted by the validation rows"
    verdict = _verdict(gains["nll"], "nll", "the plain mean of all members")
    return f"{chosen} ({weights}), the NLL on {set_name} is {verdict}."


def _single(metrics: RunMetrics) -> str:
    return f"a single {adapter_of(metrics).one}"


def _article(metric: str) -> str:
    return "an" if METRICS[metric].in_words[0] in "aeiou" else "a"


def _verdict(gain: Gain, metric: str, other: str) -> str:
    """Say better or worse only where the interval leaves zero out."""
    amount = difference(abs(gain["gain"]), metric).lstrip("+")
    if amount == difference(0.0, metric).lstrip("+"):
        return f"the same as {other} to the digits shown"
    if "interval" not in gain:
        direction = "better" if gain["gain"] > 0 else "worse"
        return f"{amount} {direction} than {other} (no interval was computed)"
    low, high = gain["interval"]
    within = f"{difference(low, metric)} to {difference(high, metric)}"
    if low > 0:
        return f"{amount} better than {other} ({within})"
    if high < 0:
        return f"{amount} worse than {other} ({within})"
    return f"not measurably different from {other} ({within} includes zero)"


def _detection(metrics: RunMetrics, name: str) -> str:
    """Compare by one score alone: picking the best of several afterwards would flatter."""
    score = section_of(metrics).detected_by
    value = value_of(metrics["ensemble"].get("ood", {}).get(name, {}), score)
    if value is None:
        return ""
    single = value_of(metrics.get("baselines", {}).get("single", {}).get("ood", {}).get(name, {}), score)
    against = f", that of {_single(metrics)} with {number(single)}" if single is not None else ""
    return (
        f"The ensemble's {METRICS[score].label.lower()} separates inputs of {name} from test inputs with an AUROC of "
        f"{number(value)}{against} (1 is perfect, 0.5 is guessing)."
    )


def _degraded(metrics: RunMetrics) -> list[str]:
    run: Mapping[str, Any] = metrics.get("run", {})
    if not run.get("degraded"):
        return []
    return [
        f"Degraded: {run.get('members_done', '?')} of {run.get('members_asked', '?')} members finished; "
        "every number here is from those."
    ]
