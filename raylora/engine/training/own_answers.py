"""What a student has just written, in place of the answers in its rows (GKD, arXiv 2306.13649, algorithm 1).

Each member of a pack is a student for itself: whether it writes in a step, and what, depends on its own seed, the step,
the row and its weights. Nothing is kept between steps, so a student that is taken up again writes the same.

Shapes: K members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from raylora.adapters.base import Tensors
from raylora.data.answered import answered, prompt_length
from raylora.data.task import Asks, Example, Task
from raylora.distill import Writing
from raylora.engine.generation.own_answers import OwnPrompt, write_own
from raylora.engine.generation.questions import answers_obstacle
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.training.collator import Collator
from raylora.engine.training.member_state import MemberState
from raylora.errors import SpecError

Stack = Callable[[Sequence[MemberState], Sequence[Tensors]], Tensors]


class OwnAnswers:
    """Writes what members learn from in the steps that are theirs."""

    def __init__(self, model: PackedModel, writing: Writing, stack: Stack) -> None:
        """Take the students' model, and how it takes their tensors.

        Raises:
            SpecError: its task's rows are no prompts with answers.
        """
        check_writes(model.task)
        self.model, self.writing, self.stack = model, writing, stack
        self.ends = cast(Asks, model.task).ends(model.base.tokenizer)
        self.longest: int = model.task.spec.max_length

    def of_step(
        self, step: int, total: int, accumulation: int, states: Sequence[MemberState], collator: Collator
    ) -> dict[tuple[int, str], Sequence[Example]]:
        """Return by micro-batch and member the rows of those who learn from themselves in this of all optimizer steps.

        All of a step's answers are written before its first micro-batch, with the weights that the step begins with.
        """
        due = [state for state in states if self.is_due(state, step)]
        if not due or step / total < self.writing.begins:
            return {}
        found: dict[tuple[int, str], Sequence[Example]] = {}
        stacked = self.stack(due, [state.whole() for state in due])
        for number in range(step * accumulation, (step + 1) * accumulation):
            rows_K = collator.rows(number, {state.plan.name: state.order for state in due})
            answers_K = write_own(
                self.model, stacked, [[self._prompt(number, row) for row in rows] for rows in rows_K],
                [state.plan.stream("answers") for state in due], self.writing.temperature, self.ends,
            )
            for state, rows, answers in zip(due, rows_K, answers_K, strict=True):
                found[number, state.plan.name] = [answered(*pair) for pair in zip(rows, answers, strict=True)]
        return found

    def is_due(self, state: MemberState, step: int) -> bool:
        """Return whether a member learns from itself in a step, which its seed alone decides."""
        return state.plan.stream("on-policy", step) / 2**63 < self.writing.share

    def _prompt(self, number: int, row: Example) -> OwnPrompt:
        tokens = row.sequences[0][: prompt_length(row)]
        return OwnPrompt(f"{number}/{row.id}", tokens, min(self.writing.max_new_tokens, self.longest - len(tokens)))


def check_writes(task: Task) -> None:
    """Refuse a task whose rows do not show where an answer begins. Raises: SpecError."""
    obstacle = answers_obstacle(task)
    if obstacle:
        raise SpecError(
            f"distill.loss.on_policy: {obstacle}",
            "use task.kind instruction with train_on: completion, or on_policy: 0",
        )
