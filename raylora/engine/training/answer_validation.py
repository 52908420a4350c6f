"""What members answer to the validation rows while they train: what early stopping may watch beside their loss.

Shapes: K members of a pack.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raylora.adapters.base import Tensors
from raylora.data.task import Example
from raylora.engine.generation.decoder import Sampling
from raylora.engine.generation.generator import Generator, text_of
from raylora.engine.generation.questions import question_of
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.training.member_plan import MemberPlan
from raylora.ensemble.answer_metrics import ANSWER_METRICS, NORMALIZATIONS, score_answers
from raylora.placement.answering import rows_at_once
from raylora.spec import EvaluationSpec


def watched_by_answers(plans: Iterable[MemberPlan]) -> list[str]:
    """Return the metrics of written answers that early stopping watches in any of these."""
    rules = (plan.regularizers.early_stopping for plan in plans)
    return sorted({rule.metric for rule in rules if rule is not None and rule.metric in ANSWER_METRICS})


def answer_metrics(
    model: PackedModel, stacked: Tensors, examples: Sequence[Example], evaluation: EvaluationSpec,
    metrics: Sequence[str],
) -> list[dict[str, float]]:
    """Return the mean of each metric over every member's own greedy answers to some rows, K mappings.

    The members of the pack write together; the rows are the first ``generation.rows``, and each has a reference.

    Raises:
        DataError: a prompt with its answer is longer than the model reads.
    """
    settings = evaluation.generation
    assert settings is not None
    questions = [question_of(example) for example in examples[: settings.rows]]
    writer = Generator(model, stacked, "mean_probabilities")  # nothing is mixed: each member writes its own
    said: list[list[str]] = [[] for _ in range(writer.members)]
    rows = rows_at_once(evaluation.batch, writer.members)
    for start in range(0, len(questions), rows):
        chosen = questions[start : start + rows]
        asked, names = [list(one.prompt) for one in chosen], [one.id for one in chosen]
        for answers in writer.written(asked, names, Sampling(settings.max_new_tokens, each_member=True)):
            for texts, answer in zip(said, answers, strict=True):
                texts.append(answer.text)
    references = [text_of(writer.tokenizer, one.reference or ()) for one in questions]
    normalize = NORMALIZATIONS[settings.normalize]
    scores = [score_answers(texts, references, metrics, normalize) for texts in said]
    return [{name: float(values.mean()) for name, values in one.items()} for one in scores]
