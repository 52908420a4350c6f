"""Train a pack: K members step together through one base, each with its own data, gradient and optimiser.

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
from raylora.data.task import Batch, Example, Task, predicts_value
from raylora.engine.base import Base, head_tensors
from raylora.engine.deepspeed import MemberOptimiser
from raylora.engine.forward import (
    ExampleLoss,
    StepTensors,
    fixed_tensors,
    initial_member,
    pack_gradients,
    start_tensors,
)
from raylora.engine.lessons import Lessons
from raylora.engine.persist import check_layout, layout_of
from raylora.engine.predict import validation_metrics
from raylora.engine.schedule import epochs_done, total_steps
from raylora.engine.units import Unit, order_seed
from raylora.errors import Interrupted, TrainingError
from raylora.spec import RunSpec

_HISTORY_POINTS = 500
_LOWER_IS_BETTER = {"nll": True, "brier": True, "ece": True, "rmse": True, "accuracy": False}


@dataclass
class Trainee:
    """One member while it trains."""

    unit: Unit
    optimiser: MemberOptimiser
    order: Order
    initial_head: Tensors
    fixed: Tensors
    """What the adapter needs but does not train."""
    history: list[dict[str, float]] = field(default_factory=list)
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
        return {**self.optimiser.tensors(), **self.fixed}

    def result(self) -> Tensors:
        """Return the member: its best state if early stopping watched it, else its last."""
        final = self.best_tensors if self.best_tensors is not None else self.optimiser.tensors()
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
        self, base: Base, adapter: Adapter, task: Task, spec: RunSpec, units: Sequence[Unit],
        train: Sequence[Example], validation: Sequence[Example], lessons: Lessons | None = None,
    ) -> None:
        """Take what is trained, and on what; a student's ``lessons`` take the place of the task's loss."""
        self.lessons = lessons
        self.base, self.adapter, self.task, self.spec = base, adapter, task, spec
        self.train, self.validation = train, validation
        self.total = total_steps(len(train), spec.optimisation)
        self.step = 0
        head = head_tensors(base)
        self.trainees = [self._new(unit, head) for unit in units]
        self._fixed_of: tuple[tuple[str, ...], Tensors] = (), {}
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
            save: commits the state of every trainee at the current step.
            report: told of every step.
            epoch_end: called after each whole epoch, with its number from 1.

        Raises:
            Interrupted: the state after the current step was saved and the run can be resumed.
            TrainingError: no member is left to train.
        """
        every = self.spec.checkpointing.every_steps
        while self.step < self.total and any(t.training for t in self.trainees):
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
        if all(t.failure for t in self.trainees):
            raise TrainingError("; ".join(f"{t.unit.name}: {t.failure}" for t in self.trainees))

    def epochs(self, step: int) -> int:
        """Return how many whole epochs a number of steps makes."""
        return epochs_done(step, len(self.train), self.spec.optimisation)

    @property
    def epochs_begun(self) -> int:
        """Return the number, from 1, of the epoch that the latest step ended or is in."""
        return self.epochs(self.step - 1) + 1

    # --- one step -----------------------------------------------------------------------------------
    def _take_step(self) -> Progress:
        started = time.perf_counter()
        accumulation = self.spec.optimisation.accumulation
        active = [t for t in self.trainees if t.training]
        sums = dict.fromkeys((t.unit.name for t in active), 0.0)
        tokens = 0
        for micro in range(accumulation):
            stepping = [t for t in active if not t.failure]
            if not stepping:
                break
            number = self.step * accumulation + micro
            tokens += self._micro_batch(stepping, number, sums, accumulation)
        self.step += 1
        self._ready = None  # it belongs to the weights before the update
        losses = {t.unit.name: sums[t.unit.name] for t in active if not t.failure}
        for trainee in active:
            if not trainee.failure:
                self._record(trainee, losses[trainee.unit.name])
        return Progress(self.step, self.total, losses, tokens, time.perf_counter() - started)

    def _micro_batch(
        self, stepping: Sequence[Trainee], number: int, sums: dict[str, float], accumulation: int
    ) -> int:
        regularisers = self.spec.ensemble.regularisers
        rows = [t.order.indices(number) for t in stepping]
        batches = [self._collate([self.train[i] for i in indices]) for indices in rows]
        step = self._step_tensors(stepping, accumulation)
        outcome = pack_gradients(
            self.base, self.adapter, self.task, step.leaves, batches,
            [t.unit.stream("dropout", number) for t in stepping],
            regularisers.kl,
            stack([t.initial_head for t in stepping]) if regularisers.kl and stepping[0].initial_head else None,
            step=step, loss=self._lesson(),
        )
        for trainee, batch, loss, gradients in zip(
            stepping, batches, outcome.losses_K, outcome.gradients, strict=True
        ):
            if not math.isfinite(loss):
                ids = ", ".join(batch.ids[:8])
                trainee.failure = f"the loss is {loss} at step {self.step + 1} on examples {ids}"
                continue
            trainee.optimiser.backward(gradients)
            trainee.optimiser.step()
            if not math.isfinite(trainee.optimiser.grad_norm):
                ids = ", ".join(batch.ids[:8])
                trainee.failure = f"the gradient is not finite at step {self.step + 1}, after examples {ids}"
                continue
            sums[trainee.unit.name] += loss / accumulation
        return outcome.tokens

    def _lesson(self) -> ExampleLoss | None:
        if self.lessons is None:
            return None
        lessons, progress = self.lessons, self.step / self.total
        return lambda logits, batch: lessons.losses(logits, batch, progress)

    def _step_tensors(self, stepping: Sequence[Trainee], accumulation: int) -> StepTensors:
        """Return the pack's tensors for this step, made anew after an update and when a member has left."""
        names = tuple(t.unit.name for t in stepping)
        if self._fixed_of[0] != names:
            self._fixed_of = names, stack([t.fixed for t in stepping])
        if self._ready is None or self._ready[0] != (self.step, names):
            stacked = stack([t.optimiser.tensors() for t in stepping])
            step = StepTensors(self.base, self.adapter, stacked, self._fixed_of[1], accumulation)
            self._ready = (self.step, names), step
        return self._ready[1]

    def _collate(self, examples: Sequence[Example]) -> Batch:
        return self.task.collate(examples, self.base.tokenizer)

    def _record(self, trainee: Trainee, loss: float) -> None:
        if self.step % max(1, self.total // _HISTORY_POINTS) == 0 or self.step == self.total:
            optimiser = trainee.optimiser
            trainee.history.append(
                {"step": self.step, "loss": loss, "lr": optimiser.lr, "grad_norm": optimiser.grad_norm}
            )

    # --- epochs and early stopping ------------------------------------------------------------------
    def _validate(self) -> None:
        rule = self.spec.ensemble.regularisers.early_stopping
        for trainee in self.trainees:  # the last update may have left numbers that no loss has seen yet
            if trainee.training and not all(p.isfinite().all() for p in trainee.optimiser.tensors().values()):
                trainee.failure = f"its weights are not finite after step {self.step}"
        active = [t for t in self.trainees if t.training]
        if not active:
            return
        metrics = validation_metrics(
            self.base, self.adapter, self.task, stack([t.whole() for t in active]),
            self.validation, self.spec.evaluation,
        )
        for trainee, values in zip(active, metrics, strict=True):
            trainee.history.append(
                {"step": self.step, **{f"validation_{name}": value for name, value in values.items()}}
            )
            if rule is not None:
                self._judge(trainee, values[rule.metric], rule.patience, _LOWER_IS_BETTER[rule.metric])

    def _judge(self, trainee: Trainee, value: float, patience: int, lower_is_better: bool) -> None:
        best = trainee.best_value
        if best is None or (value < best if lower_is_better else value > best):
            trainee.best_value, trainee.bad_epochs = value, 0
            trainee.best_tensors = {n: t.cpu().clone() for n, t in trainee.optimiser.tensors().items()}
            return
        trainee.bad_epochs += 1
        if trainee.bad_epochs >= patience:
            trainee.stopped_at = self.step

    # --- state --------------------------------------------------------------------------------------
    def state_of(self, trainee: Trainee) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """Return a trainee's tensors by section, and the plain facts beside them; a failed one has no tensors."""
        if trainee.failure:
            return {}, {"step": self.step, "failure": trainee.failure}
        sections = {"member": trainee.optimiser.tensors(), "optimiser": trainee.optimiser.state()}
        if trainee.best_tensors is not None:
            sections["best"] = trainee.best_tensors
        facts = {
            "step": self.step,
            "updates": trainee.optimiser.steps_done,
            "history": trainee.history,
            "best_value": trainee.best_value,
            "bad_epochs": trainee.bad_epochs,
            "stopped_at": trainee.stopped_at,
            "layout": layout_of(sections["member"], trainee.fixed),
        }
        return sections, facts

    def restore(self, states: Mapping[str, tuple[dict[str, Tensors], dict[str, Any]]]) -> None:
        """Continue from states of one step; every unit of the pack must be among them."""
        for index, trainee in enumerate(self.trainees):
            sections, facts = states[trainee.unit.name]
            self.step = facts["step"]
            if "failure" in facts:
                trainee.failure = facts["failure"]
                continue
            check_layout(
                f"the checkpoint of {trainee.unit.name}", facts.get("layout"),
                layout_of(trainee.optimiser.tensors(), trainee.fixed),
            )
            names = trainee.optimiser.names  # a file has its own order, and sums depend on it
            best = {n: sections["best"][n] for n in names} if "best" in sections else None
            optimiser = self._optimiser({n: sections["member"][n] for n in names})
            optimiser.load_state(sections.get("optimiser", {}), facts["updates"])
            self.trainees[index] = Trainee(
                trainee.unit, optimiser, trainee.order, trainee.initial_head, trainee.fixed, facts["history"],
                facts["best_value"], best, facts["bad_epochs"], facts["stopped_at"],
            )

    def _new(self, unit: Unit, head: Mapping[str, Tensor]) -> Trainee:
        tensors = initial_member(
            self.base, self.adapter, head, unit.stream("init"), start_value(self.task, self.train)
        )
        lengths = tuple(max(map(len, example.sequences)) for example in self.train)
        order = Order(
            len(self.train), self.spec.optimisation.micro_batch, order_seed(unit, self.spec),
            unit.stream("bootstrap") if self.spec.ensemble.bootstrap else None,
            lengths if self.spec.optimisation.group_by_length else None,
        )
        initial_head = {n: t.to(self.base.device) for n, t in tensors.items() if n.startswith(HEAD)}
        fixed = fixed_tensors(self.base, self.adapter, unit.stream("fixed"))
        return Trainee(unit, self._optimiser(tensors), order, initial_head, fixed)

    def _optimiser(self, tensors: Mapping[str, Tensor]) -> MemberOptimiser:
        return MemberOptimiser(
            tensors, self.adapter, self.spec.optimisation, self.spec.ensemble.regularisers, self.total,
            self.base.device, start_tensors(self.base, self.adapter),
        )


def start_value(task: Task, train: Sequence[Example]) -> float:
    """Return what a fresh head says before it has learnt anything: of a regression the mean label, else 0.

    A head that starts at 0 is first pushed to the mean by everything that can push it, and adapters bent to that end
    were seen to forget the text (the loss stays at the labels' variance).
    """
    if not predicts_value(task):
        return 0.0
    known = [example.label for example in train if example.label is not None and not math.isnan(example.label)]
    return math.fsum(known) / max(1, len(known))
