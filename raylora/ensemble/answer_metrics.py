"""Whether written answers are right, and whether the members' doubts tell the right ones from the wrong ones.

Shapes: N answers, S bootstrap samples.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raylora.ensemble.bootstrap import interval, row_draws
from raylora.ensemble.metrics import RowScores, draw_metrics, selective_risk
from raylora.ensemble.ood import auroc, bootstrap_auroc
from raylora.errors import DataError, UsageError, suggest

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_CHOICE = re.compile(r"\(?\b([A-Za-z])\b\)?")
RIGHT = 0.5
"""From what score on an answer counts as right, for metrics between 0 and 1."""


def normalized(text: str) -> str:
    """Return an answer as it is compared: without case, punctuation, articles and surplus space (arXiv 1606.05250)."""
    words = text.casefold().translate(_PUNCTUATION).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _as_written(text: str) -> str:
    return text


def _spaced_alike(text: str) -> str:
    return " ".join(text.split())


Normalize = Callable[[str], str]
NORMALIZATIONS: dict[str, Normalize] = {"squad": normalized, "space": _spaced_alike, "none": _as_written}
"""What is alike before answers are compared, by its name in a spec."""


def exact_match(answer: str, reference: str, normalize: Normalize = normalized) -> float:
    """Return 1 where both are the same once normalized."""
    return float(normalize(answer) == normalize(reference))


def f1(answer: str, reference: str, normalize: Normalize = normalized) -> float:
    """Return the harmonic mean of precision and recall of the words."""
    one, two = Counter(normalize(answer).split()), Counter(normalize(reference).split())
    shared = sum((one & two).values())
    if not one or not two:
        return float(one == two)
    return 2 * shared / (sum(one.values()) + sum(two.values()))


def contains(answer: str, reference: str, normalize: Normalize = normalized) -> float:
    """Return 1 where the reference's words stand in the answer, one behind the other."""
    return float(f" {normalize(reference)} " in f" {normalize(answer)} ")


def number(answer: str, reference: str, normalize: Normalize = normalized) -> float:
    """Return 1 where the last number of both is the same, read as it is written; a fraction is its value."""
    one, two = _last_number(answer), _last_number(reference)
    return float(one is not None and two is not None and abs(one - two) <= 1e-9 * max(1.0, abs(two)))


def choice(answer: str, reference: str, normalize: Normalize = normalized) -> float:
    """Return 1 where the first letter that stands alone is the same, read as it is written."""
    found = [match.group(1).upper() if (match := _CHOICE.search(text)) else None for text in (answer, reference)]
    return float(found[0] is not None and found[0] == found[1])


ANSWER_METRICS: dict[str, Callable[[str, str, Normalize], float]] = {
    "exact_match": exact_match, "f1": f1, "contains": contains, "number": number, "choice": choice,
}


@dataclass(frozen=True)
class Doubts:
    """Why an answer might be wrong, each a number per answer that is larger where there is more doubt, N."""

    scores: Mapping[str, Tensor]
    confidence_N: Tensor
    """The probability that the answer's mixture gives to all of it."""


def check_metrics(names: Sequence[str]) -> None:
    """Refuse a metric that answers are not scored by. Raises: UsageError."""
    for name in names:
        if name not in ANSWER_METRICS:
            raise UsageError(f"unknown metric {name!r} of answers", suggest(name, ANSWER_METRICS))


def score_answers(
    answers: Sequence[str], references: Sequence[str], names: Sequence[str], normalize: Normalize = normalized
) -> dict[str, Tensor]:
    """Return each metric of each answer, N float64. Raises: UsageError for an unknown metric."""
    check_metrics(names)
    pairs = list(zip(answers, references, strict=True))
    return {
        name: torch.tensor([ANSWER_METRICS[name](one, two, normalize) for one, two in pairs], dtype=torch.float64)
        for name in names
    }


def describe_answers(
    scores: Mapping[str, Tensor], doubts: Doubts, bins: int = 15, samples: int = 200, confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the mean of every metric, and by the first one what the doubts are worth, each with an interval.

    ``error_auroc`` is the probability that a wrong answer is doubted more than a right one, by each doubt; it is None
    where all answers are right, or all wrong. ``risk_coverage`` is the share of wrong ones among those doubted least,
    by the first doubt. ``ece`` and ``reliability`` compare the answers' probabilities with how many are right.

    Raises:
        DataError: there are no answers.
    """
    first = next(iter(scores.values()))
    if not len(first):
        raise DataError("there are no answers to score", "give prompts with references")
    draws_SN = torch.cat(list(row_draws(len(first), max(1, samples), seed)))

    def described(values_N: Tensor) -> dict[str, Any]:
        return {"value": float(values_N.mean()), **_ends(values_N[draws_SN].mean(dim=1), samples, confidence)}

    right_N = (first >= RIGHT).to(torch.float64)
    found: dict[str, Any] = {"answers": len(first), "metrics": {name: described(v_N) for name, v_N in scores.items()}}
    found["error_auroc"] = {
        name: _auroc(right_N, doubt_N, samples, confidence, seed) for name, doubt_N in doubts.scores.items()
    }
    name, doubt_N = next(iter(doubts.scores.items()))
    everything = torch.arange(len(first))[None]
    by_doubt = RowScores(right_N, doubt_N, doubt_N, -doubt_N.double().round(decimals=12))
    risk_N = selective_risk(by_doubt, everything)[0]
    found["risk_coverage"] = {"by": name, "risk": risk_N.tolist(), "aurc": float(risk_N.mean())}
    sure = RowScores(right_N, doubt_N, doubt_N, doubts.confidence_N.double().round(decimals=12))
    ece = draw_metrics(sure, everything, bins, ("ece",))["ece"]
    drawn_S = draw_metrics(sure, draws_SN, bins, ("ece",))["ece"]
    found["ece"] = {"value": float(ece[0]), **_ends(drawn_S, samples, confidence)}
    return found


def describe_doubts(
    doubts: Mapping[str, Tensor], familiar: Mapping[str, Tensor] | None = None, samples: int = 200,
    confidence: float = 0.95, seed: int = 0,
) -> dict[str, Any]:
    """Return the mean of every doubt and, with those of a familiar set, how well each tells the two sets apart.

    ``ood_auroc`` is the probability that an answer to a foreign prompt is doubted more than one to a familiar prompt.
    """
    found: dict[str, Any] = {"uncertainty": {name: float(values_K.mean()) for name, values_K in doubts.items()}}
    if familiar is not None:
        both = [name for name in doubts if name in familiar]
        found["ood_auroc"] = {
            name: _between(familiar[name], doubts[name], samples, confidence, seed) for name in both
        }
    return found


def _ends(values_S: Tensor, samples: int, confidence: float) -> dict[str, list[float]]:
    return {"interval": interval(values_S, confidence)} if samples else {}


def _auroc(right_N: Tensor, doubt_N: Tensor, samples: int, confidence: float, seed: int) -> dict[str, Any] | None:
    trusted, wrong = doubt_N[right_N == 1], doubt_N[right_N == 0]
    if not len(trusted) or not len(wrong):
        return None
    return _between(trusted, wrong, samples, confidence, seed)


def _between(lower_N: Tensor, higher_K: Tensor, samples: int, confidence: float, seed: int) -> dict[str, Any]:
    # Twelve digits: the order in which numbers are summed must not break ties.
    lower_N, higher_K = (values.double().round(decimals=12) for values in (lower_N, higher_K))
    ends = _ends(bootstrap_auroc(lower_N, higher_K, samples, seed), samples, confidence) if samples else {}
    return {"value": auroc(lower_N, higher_K), **ends}


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    if not found:
        return None
    above, _, below = found[-1].replace(",", "").partition("/")
    if below and float(below) == 0:
        return None
    return float(above) / (float(below) if below else 1.0)
