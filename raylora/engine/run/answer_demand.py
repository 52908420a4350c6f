"""How much is remembered while members answer: beside their training, and when they are finished."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache

from raylora.data.answered import prompt_length
from raylora.data.sets import DataSets
from raylora.data.task import Example
from raylora.distill import AsksTeacher
from raylora.engine.run.answer_summary import asked_sets
from raylora.engine.training.answer_validation import watched_by_answers
from raylora.engine.training.distillation_loss import loss_of
from raylora.engine.training.member_plan import member_plans_of
from raylora.placement.answering import MOST_ROWS, AnswerShape, CacheShape
from raylora.spec import RunSpec


def answers_after(spec: RunSpec, sets: DataSets | None) -> AnswerShape | None:
    """Return what is answered when all members are finished; without rows, of prompts as long as may be."""
    settings = spec.evaluation.generation
    if settings is None:
        return None
    of_name = {} if sets is None else {loaded.name: loaded.examples for loaded in sets.all()}
    asked = None if sets is None else [of_name[name][: settings.rows] for name in asked_sets(sets)]
    return AnswerShape(
        _longest(spec, asked), settings.max_new_tokens, _most(asked), spec.evaluation.batch,
        spec.ensemble.members, ways=2,
    )


def answers_within(spec: RunSpec, sets: DataSets | None) -> tuple[AnswerShape, ...]:
    """Return what those who train together answer on the way: for early stopping, and to learn from it."""
    found, settings = [], spec.evaluation.generation
    if settings is not None and watched_by_answers(member_plans_of(spec)):
        asked = None if sets is None else [sets.validation.examples[: settings.rows]]
        found.append(AnswerShape(
            _longest(spec, asked), settings.max_new_tokens, _most(asked), spec.evaluation.batch
        ))
    loss = loss_of(spec)
    if isinstance(loss, AsksTeacher) and loss.writing.share:
        asked = None if sets is None else [sets.train.examples]
        found.append(AnswerShape(
            _longest(spec, asked), loss.writing.max_new_tokens, spec.optimization.micro_batch
        ))
    return tuple(found)


def caches_of(config: Any) -> tuple[CacheShape, ...]:
    """Return what the layers of a model of this config remember of a token, those of one window together."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    windows = [int(getattr(layer, "sliding_window", None) or 0) for layer in DynamicCache(config=config).layers]
    windows = windows or [0] * int(text.num_hidden_layers)  # such a cache gets its layers as they are met
    return tuple(
        CacheShape(2 * heads * width * windows.count(window), windows.count(window), window)
        for window in dict.fromkeys(windows)
    )


def _longest(spec: RunSpec, asked: Sequence[Sequence[Example]] | None) -> int:
    if asked is None:
        return spec.task.max_length
    return max((prompt_length(example) for examples in asked for example in examples), default=0)


def _most(asked: Sequence[Sequence[Example]] | None) -> int:
    return MOST_ROWS if asked is None else max(map(len, asked), default=0)
