"""What the members say together: aggregation, uncertainty, calibration and the summary of a run.

Every number is computed in float64 from plain tensors; nothing here knows Ray, a model or a tokenizer.
"""

from raylora.ensemble.aggregate import aggregate_logits, mean_logits, mean_probabilities
from raylora.ensemble.calibration import Temperature, fit_temperature
from raylora.ensemble.metric_table import METRICS, Metric
from raylora.ensemble.metrics import evaluate
from raylora.ensemble.predictions import Predictions
from raylora.ensemble.summary import summarize
from raylora.ensemble.uncertainty import Uncertainty, decompose, pairwise_kl

__all__ = [
    "METRICS",
    "Metric",
    "Predictions",
    "Temperature",
    "Uncertainty",
    "aggregate_logits",
    "decompose",
    "evaluate",
    "fit_temperature",
    "mean_logits",
    "mean_probabilities",
    "pairwise_kl",
    "summarize",
]
