"""What members answer to the validation rows while they train: what early stopping may watch beside their loss.

Shapes: K members of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence

from raylora.adapters.base import Tensors
from raylora.data.task import Example
from raylora.engine.generation.decoder import Sampling
from raylora.engine.generation.generator import Generator, text_of
from raylora.engine.generation.questions import BATCH_ROWS, question_of
from raylora.engine.model.packed_model import PackedModel
from raylora.ensemble.answer_metrics import ANSWER_METRICS, NORMALIZATIONS, score_answers
from raylora.spec import EnsembleSpec, EvaluationSpec, GenerationSpec


def watched_by_answers(ensemble: EnsembleSpec) -> str | None:
    """Return the metric of written answers that early stopping watches, if it watches one."""
    rule = ensemble.regularizers.early_stopping
    return rule.metric if rule is not None and rule.metric in ANSWER_METRICS else None


def answer_metrics(
    model: PackedModel, stacked: Tensors, examples: Sequence[Example], evaluation: EvaluationSpec, metric: str
) -> list[dict[str, float]]:
    """Return the mean of a metric over each member's own greedy answers to some rows, K mappings of one entry.

    The members of the pack write together; the rows are the first ``generation.rows``, and each has a reference.

    Raises:
        DataError: a prompt with its answer is longer than the model reads.
    """
    settings = evaluation.generation
    assert settings is not None
    questions = [question_of(example) for example in examples[: settings.rows]]
    writer = Generator(model, stacked, "mean_probabilities")  # nothing is mixed: each member writes its own
    said: list[list[str]] = [[] for _ in range(writer.members)]
    for start in range(0, len(questions), BATCH_ROWS):
        chosen = questions[start : start + BATCH_ROWS]
        asked, names = [list(one.prompt) for one in chosen], [one.id for one in chosen]
        for answers in writer.written(asked, names, Sampling(settings.max_new_tokens, each_member=True)):
            for texts, answer in zip(said, answers, strict=True):
                texts.append(answer.text)
    references = [text_of(writer.tokenizer, one.reference or ()) for one in questions]
    return [{metric: _mean(texts, references, metric, settings)} for texts in said]


def _mean(texts: Sequence[str], references: Sequence[str], metric: str, settings: GenerationSpec) -> float:
    return float(score_answers(texts, references, [metric], NORMALIZATIONS[settings.normalize])[metric].mean())
