"""Train a pack: K members step together through one base, each with its own data, gradient and optimizer.

A member is stopped (early, or by a loss that is not finite) by leaving the pack; the others go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from raylora.adapters.base import HEAD, Adapter, Tensors
from raylora.adapters.packed import stack
from raylora.data.order import Order
from raylora.data.task import Batch, Example, Task
from raylora.engine.model.base import Base, head_tensors
from raylora.engine.model.member_tensors import frozen_tensors_of, initial_member, start_tensors
from raylora.engine.model.packed_model import ExampleLoss, PackedModel, StepTensors
from raylora.engine.model.serialization import check_layout, layout_of
from raylora.engine.training.distillation_loss import DistillationLoss
from raylora.engine.training.member_plan import MemberPlan, order_seed
from raylora.engine.training.optimizer import MemberOptimizer
from raylora.engine.training.predict import validation_metrics
from raylora.engine.training.schedule import epochs_done, total_steps
from raylora.ensemble.metric_table import METRICS
from raylora.ensemble.outputs import output_of
from raylora.errors import Interrupted, TrainingError
from raylora.records import HistoryRow
from raylora.spec import RunSpec

_HISTORY_POINTS = 500


@dataclass
class MemberState:
    """One member while it trains."""

    plan: MemberPlan
    optimizer: MemberOptimizer
    order: Order
    initial_head: Tensors
    frozen_tensors: Tensors
    """What the adapter needs but does not train."""
    history: list[HistoryRow] = field(default_factory=list)
    best_value: float | None = None
    best_tensors: Tensors | None = None
    bad_epochs: int = 0
    stopped_at: int | None = None
    """The step after which early stopping took the member out of the pack."""
    failure: str = ""

    @property
    def training(self) -> bool:
        """Whether the member still takes steps."""
        return self.stopped_at is None and not self.failure

    def whole(self) -> Tensors:
        """Return the live member with what is fixed, as a forward needs it."""
        return {**self.optimizer.tensors(), **self.frozen_tensors}

    def result(self) -> Tensors:
        """Return the member: its best state if early stopping watched it, else its last."""
        final = self.best_tensors if self.best_tensors is not None else self.optimizer.tensors()
        return {name: t.detach().cpu().clone() for name, t in final.items()}


@dataclass(frozen=True)
class Progress:
    """What one step of a pack did, per member that took it."""

    step: int
    total_steps: int
    losses: dict[str, float]
    tokens: int
    step_s: float


class PackTrainer:
    """Trains the units of one job; :meth:`run` is restartable from the state it hands to ``save``."""

    def __init__(
        self, base: Base, adapter: Adapter, task: Task, spec: RunSpec, plans: Sequence[MemberPlan],
        train: Sequence[Example], validation: Sequence[Example], distillation_loss: DistillationLoss | None = None,
    ) -> None:
        """Take what is trained, and on what; a student's ``distillation_loss`` take the place of the task's loss."""
        self.distillation_loss = distillation_loss
        self.base, self.adapter, self.task, self.spec = base, adapter, task, spec
        self.model = PackedModel(base, adapter, task)
        self.train, self.validation = train, validation
        self.total = total_steps(len(train), spec.optimization)
        self.step = 0
        head = head_tensors(base)
        self.states = [self._new(plan, head) for plan in plans]
        self._frozen_of: tuple[tuple[str, ...], Tensors] = (), {}
        self._ready: tuple[tuple[int, tuple[str, ...]], StepTensors] | None = None

    def run(
        self,
        save: Callable[[PackTrainer], None],
        report: Callable[[Progress], None],
        should_stop: Callable[[], int],
        epoch_end: Callable[[PackTrainer, int], None] = lambda trainer, epoch: None,
    ) -> None:
        """Train to the end, or until ``should_stop`` returns a signal number.

        Args:
            save: commits the state of every state at the current step.
            report: told of every step.
            epoch_end: called after each whole epoch, with its number from 1.

        Raises:
            Interrupted: the state after the current step was saved and the run can be resumed.
            TrainingError: no member is left to train.
        """
        every = self.spec.checkpointing.every_steps
        while self.step < self.total and any(t.training for t in self.states):
            report(self._take_step())
            ended_epoch = self.step == self.total or self.epochs(self.step) > self.epochs(self.step - 1)
            if ended_epoch:
                self._validate()
                epoch_end(self, self.epochs_begun)
            signal_number = should_stop()
            due = self.step % every == 0 if every else ended_epoch
            if signal_number or due or self.step == self.total:
                save(self)
            if signal_number:
                raise Interrupted(f"stopped after step {self.step}", signal_number=signal_number)
        if all(t.failure for t in self.states):
            raise TrainingError("; ".join(f"{t.plan.name}: {t.failure}" for t in self.states))

    def epochs(self, step: int) -> int:
        """Return how many whole epochs a number of steps makes."""
        return epochs_done(step, len(self.train), self.spec.optimization)

    @property
    def epochs_begun(self) -> int:
        """Return the number, from 1, of the epoch that the latest step ended or is in."""
        return self.epochs(self.step - 1) + 1

    # --- one step -----------------------------------------------------------------------------------
    def _take_step(self) -> Progress:
        started = time.perf_counter()
        accumulation = self.spec.optimization.accumulation
        active = [t for t in self.states if t.training]
        sums = dict.fromkeys((t.plan.name for t in active), 0.0)
        tokens = 0
        for micro in range(accumulation):
            stepping = [t for t in active if not t.failure]
            if not stepping:
                break
            number = self.step * accumulation + micro
            tokens += self._micro_batch(stepping, number, sums, accumulation)
        self.step += 1
        self._ready = None  # it belongs to the weights before the update
        losses = {t.plan.name: sums[t.plan.name] for t in active if not t.failure}
        for state in active:
            if not state.failure:
                self._record(state, losses[state.plan.name])
        return Progress(self.step, self.total, losses, tokens, time.perf_counter() - started)

    def _micro_batch(
        self, stepping: Sequence[MemberState], number: int, sums: dict[str, float], accumulation: int
    ) -> int:
        regularizers = self.spec.ensemble.regularizers
        rows = [t.order.indices(number) for t in stepping]
        batches = [self._collate([self.train[i] for i in indices]) for indices in rows]
        step = self._step_tensors(stepping, accumulation)
        has_reference = regularizers.kl is not None and stepping[0].initial_head
        outcome = self.model.gradients(
            step, batches, [t.plan.stream("dropout", number) for t in stepping], regularizers.kl,
            stack([t.initial_head for t in stepping]) if has_reference else None, self._student_loss(),
        )
        for state, batch, loss, gradients in zip(
            stepping, batches, outcome.losses_K, outcome.gradients, strict=True
        ):
            if not math.isfinite(loss):
                ids = ", ".join(batch.ids[:8])
                state.failure = f"the loss is {loss} at step {self.step + 1} on examples {ids}"
                continue
            state.optimizer.backward(gradients)
            state.optimizer.step()
            if not math.isfinite(state.optimizer.grad_norm):
                ids = ", ".join(batch.ids[:8])
                state.failure = f"the gradient is not finite at step {self.step + 1}, after examples {ids}"
                continue
            sums[state.plan.name] += loss / accumulation
        return outcome.tokens

    def _student_loss(self) -> ExampleLoss | None:
        if self.distillation_loss is None:
            return None
        distillation_loss, progress = self.distillation_loss, self.step / self.total
        return lambda logits, batch: distillation_loss.losses(logits, batch, progress)

    def _step_tensors(self, stepping: Sequence[MemberState], accumulation: int) -> StepTensors:
        """Return the pack's tensors for this step, made anew after an update and when a member has left."""
        names = tuple(t.plan.name for t in stepping)
        if self._frozen_of[0] != names:
            self._frozen_of = names, stack([t.frozen_tensors for t in stepping])
        if self._ready is None or self._ready[0] != (self.step, names):
            stacked = stack([t.optimizer.tensors() for t in stepping])
            step = self.model.step_tensors(stacked, self._frozen_of[1], accumulation)
            self._ready = (self.step, names), step
        return self._ready[1]

    def _collate(self, examples: Sequence[Example]) -> Batch:
        return self.task.collate(examples, self.base.tokenizer)

    def _record(self, state: MemberState, loss: float) -> None:
        if self.step % max(1, self.total // _HISTORY_POINTS) == 0 or self.step == self.total:
            optimizer = state.optimizer
            state.history.append(
                {"step": self.step, "loss": loss, "lr": optimizer.lr, "grad_norm": optimizer.grad_norm}
            )

    # --- epochs and early stopping ------------------------------------------------------------------
    def _validate(self) -> None:
        rule = self.spec.ensemble.regularizers.early_stopping
        for state in self.states:  # the last update may have left numbers that no loss has seen yet
            if state.training and not all(p.isfinite().all() for p in state.optimizer.tensors().values()):
                state.failure = f"its weights are not finite after step {self.step}"
        active = [t for t in self.states if t.training]
        if not active:
            return
        metrics = validation_metrics(
            self.model, stack([t.whole() for t in active]),
            self.validation, self.spec.evaluation,
        )
        for state, values in zip(active, metrics, strict=True):
            state.history.append(
                {"step": self.step, **{f"validation_{name}": value for name, value in values.items()}}
            )
            if rule is not None:
                self._judge(state, values[rule.metric], rule.patience, METRICS[rule.metric].sign < 0)

    def _judge(self, state: MemberState, value: float, patience: int, lower_is_better: bool) -> None:
        best = state.best_value
        if best is None or (value < best if lower_is_better else value > best):
            state.best_value, state.bad_epochs = value, 0
            state.best_tensors = {n: t.cpu().clone() for n, t in state.optimizer.tensors().items()}
            return
        state.bad_epochs += 1
        if state.bad_epochs >= patience:
            state.stopped_at = self.step

    # --- state --------------------------------------------------------------------------------------
    def state_of(self, state: MemberState) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """Return a state's tensors by section, and the plain facts beside them; a failed one has no tensors."""
        if state.failure:
            return {}, {"step": self.step, "failure": state.failure}
        sections = {"member": state.optimizer.tensors(), "optimizer": state.optimizer.state()}
        if state.best_tensors is not None:
            sections["best"] = state.best_tensors
        facts = {
            "step": self.step,
            "updates": state.optimizer.steps_done,
            "history": state.history,
            "best_value": state.best_value,
            "bad_epochs": state.bad_epochs,
            "stopped_at": state.stopped_at,
            "layout": layout_of(sections["member"], state.frozen_tensors),
        }
        return sections, facts

    def restore(self, states: Mapping[str, tuple[dict[str, Tensors], dict[str, Any]]]) -> None:
        """Continue from states of one step; every plan of the pack must be among them."""
        for index, state in enumerate(self.states):
            sections, facts = states[state.plan.name]
            self.step = facts["step"]
            if "failure" in facts:
                state.failure = facts["failure"]
                continue
            check_layout(
                f"the checkpoint of {state.plan.name}", facts.get("layout"),
                layout_of(state.optimizer.tensors(), state.frozen_tensors),
            )
            names = state.optimizer.names  # a file has its own order, and sums depend on it
            best = {n: sections["best"][n] for n in names} if "best" in sections else None
            optimizer = self._optimizer({n: sections["member"][n] for n in names})
            optimizer.load_state(sections.get("optimizer", {}), facts["updates"])
            self.states[index] = MemberState(
                state.plan, optimizer, state.order, state.initial_head, state.frozen_tensors, facts["history"],
                facts["best_value"], best, facts["bad_epochs"], facts["stopped_at"],
            )

    def _new(self, plan: MemberPlan, head: Mapping[str, Tensor]) -> MemberState:
        labels = [example.label for example in self.train if example.label is not None]
        start_value = output_of(self.task.output).start_value(labels)
        tensors = initial_member(self.base, self.adapter, head, plan.stream("init"), start_value)
        lengths = tuple(max(map(len, example.sequences)) for example in self.train)
        order = Order(
            len(self.train), self.spec.optimization.micro_batch, order_seed(plan, self.spec),
            plan.stream("bootstrap") if self.spec.ensemble.bootstrap else None,
            lengths if self.spec.optimization.group_by_length else None,
        )
        initial_head = {n: t.to(self.base.device) for n, t in tensors.items() if n.startswith(HEAD)}
        frozen_tensors = frozen_tensors_of(self.base, self.adapter, plan.stream("fixed"))
        return MemberState(plan, self._optimizer(tensors), order, initial_head, frozen_tensors)

    def _optimizer(self, tensors: Mapping[str, Tensor]) -> MemberOptimizer:
        return MemberOptimizer(
            tensors, self.adapter, self.spec.optimization, self.spec.ensemble.regularizers, self.total,
            self.base.device, start_tensors(self.base, self.adapter),
        )
