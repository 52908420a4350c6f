"""What a report shows of answers: how right they are, what the members' doubts tell, and the surest and least sure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from raylora.ensemble.metric_table import METRICS
from raylora.records import RunMetrics
from raylora.report.figures import COLORS, Drawn
from raylora.report.tables import MISSING, Table, Text

_STRONG_NATS = 0.5
"""The disagreement from which on a token has the strongest shade."""
_DOUBTS = {
    "mean_nll": "NLL per token", "mean_entropy": "entropy per token",
    "mean_mutual_information": "disagreement per token", "disagreement": "members with another answer",
}
_PROMPT_END = 300
"""Characters of a prompt that are shown: its last ones, where the question stands."""


@dataclass(frozen=True)
class Shown:
    """One answer as the page prints it."""

    prompt: str
    reference: str
    tokens: list[tuple[str, float]]
    """Text, and how strong its shade is, 0 to 1."""
    right: bool | None
    """None where nobody says what is right."""
    nll: str


@dataclass(frozen=True)
class AnswerSection:
    """All that the page says of answers."""

    right: Table
    errors: Table
    foreign: Table | None
    """How well doubts tell prompts of another kind; None where there are none."""
    lists: list[tuple[str, list[Shown]]]
    first: str
    """What a sentence calls the metric by which an answer is right."""


def section(metrics: RunMetrics) -> AnswerSection | None:
    """Return what is shown of a run's answers, or None where it has given none."""
    answers = metrics.get("answers")
    if not answers or not answers["sets"]:
        return None
    sets, asked = answers["sets"], answers["settings"]["metrics"]
    lists = []
    for name, one in sets.items():
        half = len(one["shown"]) // 2
        lists += [(f"{name}: the surest", _shown(one["shown"][:half])),
                  (f"{name}: the least sure", _shown(one["shown"][half:]))]
    scored = {name: one for name, one in sets.items() if "metrics" in one["ensemble"]}
    foreign = {name: one for name, one in sets.items() if "ood_auroc" in one["ensemble"]}
    return AnswerSection(_right(scored, asked), _told(scored, "error_auroc"),
                         _told(foreign, "ood_auroc") if foreign else None, [(t, rows) for t, rows in lists if rows],
                         METRICS[asked[0]].in_words)


def risk(metrics: RunMetrics) -> list[Drawn]:
    """Per set: the share of wrong answers among those that are doubted least, of the ensemble and of one member."""
    drawn = []
    for name, one in ((metrics.get("answers") or {}).get("sets") or {}).items():
        if "risk_coverage" not in one["ensemble"]:
            continue
        figure = Figure(figsize=(5.4, 4.2), layout="constrained")
        axes = figure.subplots()
        contenders = (("ensemble", "ensemble", one["ensemble"]), ("single", "one member", one["members"][0]))
        for key, label, described in contenders:
            curve = described["risk_coverage"]["risk"]
            share = [100 * (n + 1) / len(curve) for n in range(len(curve))]
            axes.plot(share, [100 * value for value in curve], color=COLORS[key], linewidth=2, label=label)
        axes.set(title=name, xlabel="answered: the surest share of prompts (%)", ylabel="wrong among them (%)",
                 xlim=(0, 100), ylim=(0, None))
        figure.legend(loc="outside lower center", ncols=2)
        drawn.append(Drawn(f"answers-risk-{name}", figure, f"Share of wrong answers among the surest on {name}"))
    return drawn


def _right(sets: Mapping[str, Any], asked: Sequence[str]) -> Table:
    def cells(pick: Any) -> list[Text]:
        return [pick(one, metric) for one in sets.values() for metric in (*asked, "ece")]

    def of(described: Mapping[str, Any], metric: str) -> Text:
        one = described["ece"] if metric == "ece" else described["metrics"][metric]
        return Text(_number(one["value"], metric), _ends(one, metric))

    def mean(one: Mapping[str, Any], metric: str) -> Text:
        values = [(m["ece"] if metric == "ece" else m["metrics"][metric])["value"] for m in one["members"]]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return Text(_number(statistics.fmean(values), metric), "" if error is None else f"± {_number(error, metric)}")

    rows = [
        ("Ensemble", cells(lambda one, metric: of(one["ensemble"], metric))),
        ("Mean member", cells(mean)),
        ("One member", cells(lambda one, metric: of(one["members"][0], metric))),
    ]
    groups = [(f"{name}, {one['ensemble']['answers']:,} prompts", len(asked) + 1) for name, one in sets.items()]
    return Table(groups, [_label(metric) for _ in sets for metric in (*asked, "ece")], rows)


def _told(sets: Mapping[str, Any], key: str) -> Table:
    """Return the AUROC of every doubt, of the ensemble and of one member: for wrong answers, or for foreign prompts."""
    rows = []
    for who, label in (("ensemble", "Ensemble"), ("single", "One member")):
        described = [one["ensemble"] if who == "ensemble" else one["members"][0] for one in sets.values()]
        for name, words in _DOUBTS.items():
            if any(name in one[key] for one in described):
                rows.append((f"{label}: {words}", [
                    Text(MISSING) if (one := of[key].get(name)) is None else Text(f"{one['value']:.3f}", _ends(one, ""))
                    for of in described
                ]))
    return Table([], list(sets), rows)


def _shown(records: Sequence[Mapping[str, Any]]) -> list[Shown]:
    return [
        Shown(
            prompt=("…" if len(one["prompt"]) > _PROMPT_END else "") + one["prompt"][-_PROMPT_END:].strip(),
            reference=one["reference"] or "",
            tokens=[(token["text"], min(1.0, (token["mutual_information"] or 0.0) / _STRONG_NATS))
                    for token in _read(one["answer"])],
            right=None if one["right"] is None else one["right"] >= 0.5,
            nll=f"{one['answer']['mean_nll']:.3f}",
        )
        for one in records
    ]


def _read(answer: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the tokens that are text: the one that ended the answer is none."""
    tokens: Sequence[Mapping[str, Any]] = answer["tokens"]
    return tokens[:-1] if answer["finish"] == "end" else tokens


def _label(metric: str) -> str:
    return METRICS[metric].label


def _number(value: float, metric: str) -> str:
    return f"{value:.3f}" if metric == "ece" else f"{100 * value:.1f} %"


def _ends(one: Mapping[str, Any], metric: str) -> str:
    if "interval" not in one:
        return ""
    low, high = one["interval"]
    return f"{low:.3f} to {high:.3f}" if metric in ("", "ece") else f"{100 * low:.1f} to {100 * high:.1f}"
