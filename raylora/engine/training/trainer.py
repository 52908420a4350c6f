"""Train a pack: K members step together through one base, each with its own data, gradient and optimizer.

A member is stopped (early, or by a loss that is not finite) by leaving the pack; the others go on.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raylora.adapters.base import Tensors
from raylora.adapters.packed import stack
from raylora.adapters.side_by_side import SideBySide
from raylora.data.task import Batch, Example
from raylora.engine.model.packed_model import PackedModel, StepTensors
from raylora.engine.training.answer_validation import answer_metrics, watched_by_answers
from raylora.engine.training.bracket import VALIDATION, Ended, begin_order, behind, has_left
from raylora.engine.training.collator import Collator
from raylora.engine.training.distillation_loss import DistillationLoss
from raylora.engine.training.live_teacher import LiveDistillationLoss
from raylora.engine.training.member_plan import MemberPlan
from raylora.engine.training.member_state import MemberBuilder, MemberState, SavedState
from raylora.engine.training.news import news_of
from raylora.engine.training.optimizer import let_engines_go
from raylora.engine.training.own_answers import OwnAnswers
from raylora.engine.training.predict import validation_metrics
from raylora.engine.training.row_packing import first_epoch_of
from raylora.engine.training.schedule import epochs_done, micro_batches_per_epoch, total_steps
from raylora.engine.training.weight_moments import collection_steps
from raylora.ensemble.metric_table import METRICS
from raylora.errors import Interrupted, TrainingError
from raylora.progress import Activity, Leaving, OnProgress, Progress, Span, nobody, unmarked
from raylora.spec import EnsembleSpec, EvaluationSpec, OptimizationSpec, RunSpec

_HISTORY_POINTS = 500


@dataclass(frozen=True)
class TrainingSettings:
    """The sections of a run's spec that training goes by."""

    optimization: OptimizationSpec
    ensemble: EnsembleSpec
    evaluation: EvaluationSpec
    save_every: int | None = None
    """Steps between two commits; by default one at every epoch's end."""

    @classmethod
    def of(cls, spec: RunSpec) -> TrainingSettings:
        """Return a run's own."""
        return cls(spec.optimization, spec.ensemble, spec.evaluation, spec.checkpointing.every_steps)


class PackTrainer:
    """Trains the members of one job; what it hands to ``save`` is what it can go on from."""

    def __init__(
        self, model: PackedModel, settings: TrainingSettings, plans: Sequence[MemberPlan], train: Sequence[Example],
        validation: Sequence[Example], distillation_loss: DistillationLoss | LiveDistillationLoss | None = None,
        saved: Mapping[str, SavedState] | None = None,
    ) -> None:
        """Take what is trained, and on what.

        Args:
            distillation_loss: takes the place of the task's loss, for a student.
            saved: what was committed of every plan at one step; training goes on from there.

        Raises:
            RunDirectoryError: what was saved has other tensors than the members would have now.
        """
        self.model, self.settings, self.distillation_loss = model, settings, distillation_loss
        self.train, self.validation = train, validation
        writing = distillation_loss.writing if isinstance(distillation_loss, LiveDistillationLoss) else None
        self.span: Span = unmarked
        """Marks each step on a timeline."""
        self.leaving: Leaving = nobody
        """Who is outside and sees the reports may end members by them."""
        self.total = total_steps(len(train), settings.optimization)
        """Of one member."""
        saved = saved or {}
        self.step = max((facts["step"] for _, facts in saved.values()), default=0)
        self._builder = MemberBuilder(model, train, settings.optimization, settings.ensemble)
        self.places = settings.ensemble.places
        self.left = [Ended.restored(plan, saved[plan.name]) for plan in plans
                     if self.places is not None and plan.name in saved and has_left(saved[plan.name])]
        """Members that have given their places to others."""
        there = [plan for plan in plans if plan.name in saved] if self.places is not None else plans
        gone = {one.plan.name for one in self.left}
        self.states = [self._builder.build(plan, saved.get(plan.name)) for plan in there if plan.name not in gone]
        self._waiting = [plan for plan in begin_order(plans) if self.places is not None and plan.name not in saved]
        self._side_by_side = SideBySide.of([plan.adapter for plan in plans])
        self._places = {plan.name: place for place, plan in enumerate(plans)}
        self.own_answers = None
        if writing is not None and writing.share:
            self.own_answers = OwnAnswers(model, writing, self.stack)
        self._collected = {plan.name: frozenset(collection_steps(plan.swag, self.total))
                           for plan in plans if plan.swag is not None}
        self._frozen_of: tuple[tuple[str, ...], Tensors] = (), {}
        self._ready: tuple[tuple[int, tuple[str, ...]], StepTensors] | None = None
        self._turn_over()

    def run(
        self,
        save: Callable[[PackTrainer], None],
        report: OnProgress,
        should_stop: Callable[[], int],
        epoch_end: Callable[[PackTrainer, int], None] = lambda trainer, epoch: None,
    ) -> None:
        """Train to the end, or until ``should_stop`` returns a signal number.

        Args:
            save: commits every member's state at the current step.
            report: told of every step, and with it of what its epoch's end brought.
            epoch_end: called after each whole epoch, with its number from 1.

        Raises:
            Interrupted: the state after the current step was saved and the run can be resumed.
            TrainingError: no member is left to train.
        """
        every = self.settings.save_every
        with self.collator() as collator:
            while any(self._goes_on(t) for t in self.states):
                training = [t for t in self.states if t.training]
                with self.span("step"):
                    progress = self.take_step(collator)
                self._collect()
                ended_epoch = any(self._ends_epoch(t) for t in training)
                told = self._validate() if ended_epoch else []
                told += [f"{t.plan.name} failed: {t.failure}" for t in training if t.failure]
                told += self._packing() if self.step == 1 else []
                validations = self._validations() if ended_epoch else {}
                report(replace(progress, news=tuple(told), validations=validations))
                if ended_epoch:
                    epoch_end(self, self.epochs_begun)
                    self._let_leave(training)
                signal_number = should_stop()
                due = self.step % every == 0 if every else ended_epoch
                if signal_number or due or self.step == self.total or (self.places is not None and self._leaving()):
                    save(self)
                if signal_number:
                    raise Interrupted(f"stopped after step {self.step}", signal_number=signal_number)
                del training  # those who leave go with all that trained them
                self._turn_over()
        everyone = self.ended()
        if all(one.failure for one in everyone):
            raise TrainingError("; ".join(f"{one.plan.name}: {one.failure}" for one in everyone))

    def ended(self) -> list[Ended]:
        """Return what the members have become, in the order in which they were given."""
        found = [*self.left, *(Ended.of(state, self.step, keeps_frozen=True) for state in self.states)]
        return sorted(found, key=lambda one: self._places[one.plan.name])

    def own_step(self, state: MemberState) -> int:
        """Return how many steps a member has taken."""
        return self.step - state.begun_at

    @property
    def end(self) -> int:
        """After which step of the pack all members will have ended, as far as is known.

        Of a member that waits nothing is known but that it has a rung to reach.
        """
        pruning = self.settings.ensemble.pruning
        if self.places is None or pruning is None:
            return self.total
        left = max((self.total - self.own_step(t) for t in self.states if self._goes_on(t)), default=0)
        rounds = math.ceil(len(self._waiting) / self.places)
        return self.step + left + rounds * min(self.total, pruning.every_epochs * self._steps_per_epoch)

    def facts(self, state: MemberState) -> dict[str, Any]:
        """Return what a commit says of a member's bracket, beside what it says of the member."""
        if self.places is None:
            return {}
        everyone: list[Ended | MemberState] = [*self.left, *self.states]
        begun = {one.plan.name: one.begun_at for one in everyone}
        return {"begun_at": state.begun_at, "begun": begun, "left": not self._goes_on(state)}

    # --- places -------------------------------------------------------------------------------------
    def _goes_on(self, state: MemberState) -> bool:
        return state.training and self.own_step(state) < self.total

    def _leaving(self) -> bool:
        return not all(self._goes_on(t) for t in self.states)

    def _ends_epoch(self, state: MemberState) -> bool:
        step = self.own_step(state)
        return step == self.total or self.epochs(step) > self.epochs(step - 1)

    @property
    def _steps_per_epoch(self) -> int:
        return micro_batches_per_epoch(len(self.train), self.settings.optimization) // (
            self.settings.optimization.accumulation
        )

    def _turn_over(self) -> None:
        """Give the places of members that take no further step to those that wait, where an epoch begins for all."""
        if self.places is None:
            return
        if self._leaving():
            self.left += [Ended.of(t, self.step) for t in self.states if not self._goes_on(t)]
            self.states = [t for t in self.states if self._goes_on(t)]
            self._ready, self._frozen_of = None, ((), {})
            let_engines_go()
        if self.states and self.own_step(self.states[0]) % self._steps_per_epoch:
            return
        while self._waiting and len(self.states) < self.places:
            self.states.append(self._builder.build(self._waiting.pop(0), begun_at=self.step))
        self.states.sort(key=lambda state: self._places[state.plan.name])

    def stack(self, states: Sequence[MemberState], tensors: Sequence[Tensors]) -> Tensors:
        """Return tensors of some of the members as the model takes them."""
        return self._side_by_side.stack(tensors, [self._places[state.plan.name] for state in states])

    def epochs(self, step: int) -> int:
        """Return how many whole epochs a number of steps makes."""
        return epochs_done(step, len(self.train), self.settings.optimization)

    @property
    def epochs_begun(self) -> int:
        """Return the number, from 1, of the epoch that the latest step ended or is in, for those who began first."""
        return self._epoch_of(self.step)

    def _epoch_of(self, step: int) -> int:
        return self.epochs(step - 1) + 1

    # --- one step -----------------------------------------------------------------------------------
    def collator(self) -> Collator:
        """Return what makes this trainer's batches; close it when training ends."""
        spec = self.settings.optimization
        last = self.total if self.places is None else sys.maxsize  # which will be the last, nobody knows
        return Collator(self.model, self.train, last * spec.accumulation, spec.accumulation, spec.pack_rows)

    def take_step(self, collator: Collator) -> Progress:
        """Take one optimizer step with every member that still trains."""
        started = time.perf_counter()
        accumulation = self.settings.optimization.accumulation
        active = [t for t in self.states if t.training]
        for state in active:
            if self._builder.begin_rounds([state], self.own_step(state)):
                self._frozen_of = (), {}
        sums = dict.fromkeys((t.plan.name for t in active), 0.0)
        tokens = 0
        own = {}
        if self.own_answers is not None:
            own = self.own_answers.of_step(self.step, self.total, accumulation, active, collator)
        for micro in range(accumulation):
            stepping = [t for t in active if not t.failure]
            if not stepping:
                break
            number = self.step * accumulation + micro
            batch = collator.batch(number, {t.plan.name: t.order for t in stepping}, own)
            tokens += self._micro_batch(stepping, batch, number, sums)
        self.step += 1
        self._ready = None  # it belongs to the weights before the update
        losses = {t.plan.name: sums[t.plan.name] for t in active if not t.failure}
        for state in active:
            if not state.failure:
                self._record(state, losses[state.plan.name])
        seconds = time.perf_counter() - started
        norms = {t.plan.name: t.optimizer.grad_norm for t in active if not t.failure}
        return Progress(Activity.TRAINING, self.step, self.end, 1, seconds, losses, tokens, grad_norms=norms)

    def _micro_batch(
        self, stepping: Sequence[MemberState], batch: Batch, number: int, sums: dict[str, float]
    ) -> int:
        accumulation, kl = self.settings.optimization.accumulation, stepping[0].plan.regularizers.kl  # the pack's
        step = self._step_tensors(stepping, accumulation)
        has_reference = kl is not None and stepping[0].initial_head
        outcome = self.model.gradients(
            step, batch, [t.plan.stream("dropout", number - t.begun_at * accumulation) for t in stepping], kl,
            stack([t.initial_head for t in stepping]) if has_reference else None, **self._student_loss(),
        )
        rows = len(batch) // len(stepping)
        gang = self.model.base.gang
        losses_K = outcome.losses_K if gang is None else gang.partners.mean(outcome.losses_K)  # each has its part's
        for k, (state, loss, gradients) in enumerate(zip(stepping, losses_K, outcome.gradients, strict=True)):
            ids = ", ".join(batch.ids[k * rows : (k + 1) * rows][:8])
            if not math.isfinite(loss):
                state.failure = f"the loss is {loss} at step {self.own_step(state) + 1} on examples {ids}"
                continue
            state.optimizer.backward(gradients)
            state.optimizer.step()
            if not math.isfinite(state.optimizer.grad_norm):
                state.failure = f"the gradient is not finite at step {self.own_step(state) + 1}, after examples {ids}"
                continue
            sums[state.plan.name] += loss / accumulation
        return outcome.tokens

    def _student_loss(self) -> dict[str, Any]:
        """Return what takes the place of the task's loss, by the name that the model knows it by."""
        if self.distillation_loss is None:
            return {}
        distillation_loss, progress = self.distillation_loss, self.step / self.total
        if self.model.per_token:
            return {"token_loss": lambda batch: distillation_loss.of_positions(batch, progress)}
        assert isinstance(distillation_loss, DistillationLoss)
        return {"loss": lambda logits, batch: distillation_loss.losses(logits, batch, progress)}

    def _step_tensors(self, stepping: Sequence[MemberState], accumulation: int) -> StepTensors:
        """Return the pack's tensors for this step, made anew after an update and when a member has left."""
        names = tuple(t.plan.name for t in stepping)
        if self._frozen_of[0] != names:
            self._frozen_of = names, self.stack(stepping, [t.beside() for t in stepping])
        if self._ready is None or self._ready[0] != (self.step, names):
            stacked = self.stack(stepping, [t.optimizer.tensors() for t in stepping])
            step = self.model.step_tensors(stacked, self._frozen_of[1], accumulation)
            self._ready = (self.step, names), step
        return self._ready[1]

    def _record(self, state: MemberState, loss: float) -> None:
        step = self.own_step(state)
        if step % max(1, self.total // _HISTORY_POINTS) == 0 or step == self.total:
            optimizer = state.optimizer
            state.history.append(
                {"step": step, "loss": loss, "lr": optimizer.lr, "grad_norm": optimizer.grad_norm}
            )

    def _collect(self) -> None:
        """Count in the weights of members whose moments a baseline draws from."""
        for state in self.states:
            if state.training and self.own_step(state) in self._collected.get(state.plan.name, ()):
                state.moments.add(state.tensors())

    # --- epochs and early stopping ------------------------------------------------------------------
    def _validate(self) -> list[str]:
        """Validate the members that still train, stop those that have to, and return in words what came out."""
        for state in self.states:  # the last update may have left numbers that no loss has seen yet
            if state.training and not all(p.isfinite().all() for p in state.optimizer.tensors().values()):
                state.failure = f"its weights are not finite after step {self.own_step(state)}"
        active = [t for t in self.states if t.training and self._ends_epoch(t)]
        if not active:
            return []
        told = []
        scores = self._scored(self.stack(active, [t.whole() for t in active]))
        for state, values in zip(active, scores, strict=True):
            state.history.append(
                {"step": self.own_step(state), **{f"{VALIDATION}{name}": value for name, value in values.items()}}
            )
        behind, epochs = self._behind(active), self._epoch_of(self.total)
        for state, values in zip(active, scores, strict=True):
            step, rule = self.own_step(state), state.plan.regularizers.early_stopping
            if rule is not None:
                state.judge(values[rule.metric], step, rule.patience, METRICS[rule.metric].sign < 0)
            if state.plan.name in behind:
                state.stopped_at = step
            told += news_of(state, values, self._epoch_of(step), epochs, self.settings.ensemble.pruning)
        return told

    def _let_leave(self, training: Sequence[MemberState]) -> None:
        """End the members that somebody outside ends, where their epoch has ended."""
        leaving = self.leaving()
        for state in training:
            if state.training and state.plan.name in leaving and self._ends_epoch(state):
                state.stopped_at = self.own_step(state)

    def _behind(self, active: Sequence[MemberState]) -> set[str]:
        """Return the members that successive halving ends here."""
        rule = self.settings.ensemble.pruning
        if rule is None:
            return set()
        at = [(t, self.own_step(t)) for t in active]
        judged = [(t, step) for t, step in at if step < self.total and self._epoch_of(step) % rule.every_epochs == 0]
        return behind(rule, judged, [*self.left, *self.states])

    def _scored(self, stacked: Tensors) -> list[dict[str, float]]:
        """Return each member's validation metrics, with that of its own answers where early stopping watches one."""
        evaluation = self.settings.evaluation
        scores = validation_metrics(self.model, stacked, self.validation, evaluation)
        watched = watched_by_answers(t.plan for t in self.states)
        if not watched:
            return scores
        answered = answer_metrics(self.model, stacked, self.validation, evaluation, watched)
        return [{**values, **of_answers} for values, of_answers in zip(scores, answered, strict=True)]

    def _validations(self) -> dict[str, dict[str, float]]:
        """Return what the members scored in the validation after this step, by metric, as far as it is a number."""
        rows = {t.plan.name: t.history[-1] for t in self.states
                if t.history and t.history[-1]["step"] == self.own_step(t)}
        scores = {
            name: {
                key.removeprefix(VALIDATION): value for key, value in row.items()
                if key.startswith(VALIDATION) and math.isfinite(value)
            }
            for name, row in rows.items()
        }
        return {name: values for name, values in scores.items() if values}

    def _packing(self) -> list[str]:
        """Return what packing rows saves, in words; the pack of the run's first member says it for all."""
        plan, optimization = self.states[0].plan, self.settings.optimization
        if not optimization.pack_rows or plan.name != "member-000":
            return []
        size = self.model.task.spec.max_length
        return [str(first_epoch_of(plan, self.train, optimization, self.settings.ensemble, size))]
