"""DeepSpeed as the optimizer driver: one engine per member, fed with the gradient that member received.

A pack of members shares one backward pass through the base, so no engine can run that pass itself.
Instead the gradients G of the packed forward are handed over as the surrogate loss <P, G>, whose
gradient in the parameters P is exactly G: everything after it (accumulation, ZeRO, clipping, the step)
is DeepSpeed's ordinary work, and it is per member because the engine is.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raylora.adapters.base import HEAD, Adapter, Tensors, TwoFactors
from raylora.engine.model.gang import Gang, GangPlace, backend_for
from raylora.engine.training.schedule import learning_rate_factor
from raylora.spec import OptimizationSpec, RegularizersSpec

_STATE_KEYS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


def start_deepspeed(device: torch.device, place: GangPlace | None = None) -> Gang | None:
    """Join a process group, once per process, without compiling anything: a gang's, or one of this worker alone.

    DeepSpeed's shared-memory collective would be built by a C++ compiler on the first start, for minutes;
    a group of one has no use for it.
    """
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"
    rank, size = (place.rank, place.size) if place is not None else (0, 1)
    for key, value in {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": size}.items():
        os.environ[key] = str(value)
    with _no_linker_errors():
        import deepspeed
        from deepspeed.ops import __compatible_ops__
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        __compatible_ops__["deepspeed_shm_comm"] = False
        _compute_on(device)
    gang = Gang(place, device) if place is not None else None
    if not torch.distributed.is_initialized():
        # An in-process store: no port to choose, so any number of workers start on one machine.
        torch.distributed.init_process_group(
            backend_for(device), store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return gang


def let_engines_go() -> None:
    """Free what the optimizers of members took that nobody trains any more.

    DeepSpeed's engines refer to themselves, so parameters and moments would stay until Python happens to look.
    """
    gc.collect()


@contextmanager
def engines_let_go() -> Iterator[None]:
    """Free at the end what the optimizers took that were made within.

    Python looks through what was made within, too, and not through the million objects of torch and transformers, which
    would take it a third of a second each time.
    """
    is_ours = not gc.get_freeze_count()  # what somebody else has set aside stays so
    if is_ours:
        gc.freeze()
    try:
        yield
    finally:
        let_engines_go()
        if is_ours:
            gc.unfreeze()


def _compute_on(device: torch.device) -> None:
    """Tell DeepSpeed where engines compute; it asks the environment once, and a notebook may do runs on both."""
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if get_accelerator().device_name() == device.type:
        return
    if device.type == "cuda":
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

        set_accelerator(CUDA_Accelerator())
    else:
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())


@contextmanager
def _no_linker_errors() -> Iterator[None]:
    """Keep quiet what a linker says of libraries that DeepSpeed looks for and that nothing here needs.

    DeepSpeed tries to; it silences ``sys.stderr``, which in a notebook is not the one that a linker writes to.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class MemberOptimizer:
    """One member's parameters and the DeepSpeed engine that updates them.

    Matrices of equal decay lie one after another in one flat parameter, so that a step costs a few operations
    and not a few per matrix. By name they are views into it, and so are the optimizer's moments.

    Shapes: P numbers of one flat parameter.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        adapter: Adapter,
        optimization: OptimizationSpec,
        regularizers: RegularizersSpec,
        total_steps: int,
        device: torch.device,
        anchors: Mapping[str, Tensor] | None = None,
        restarts: Sequence[int] = (),
        gang: Gang | None = None,
        renewals: Sequence[int] = (),
    ) -> None:
        """Build the engine; every decay and every rate is its own parameter group: A, B and the head have theirs.

        With LoRA+ (arXiv 2402.12354, section 4) ``A <- A - eta G_A`` and ``B <- B - lambda eta G_B``, where G is what
        the optimizer makes of the gradient, eta the scheduled rate and lambda ``optimization.lora_plus_ratio``; the
        decoupled decay of B goes by B's rate, too.

        Args:
            anchors: what a tensor's weight decay pulls towards, where that is not zero.
            restarts: steps at which the schedule starts anew.
            gang: the ranks that this process is one of; the member lives on it, or on it and its partners.
            renewals: steps at which the adapter's tensors are others, with moments of their own.
        """
        import deepspeed

        self.names = list(tensors)
        self.device = device
        self.partners = gang.partners if gang is not None else None
        self.optimization = optimization
        self.total_steps, self.restarts, self.renewals = total_steps, restarts, renewals
        self.steps_done = 0
        self.grad_norm = 0.0
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.lr = optimization.lr
        """The scheduled learning rate of the latest update, that of all but LoRA+'s B."""
        self._groups = _groups_by_rule(self.names, adapter, optimization, regularizers, bool(renewals))
        container = nn.Module()
        container.flat = nn.ParameterList(
            [nn.Parameter(_flat(tensors, names, device)) for names in self._groups.values()]
        )
        self._flat_P = list(container.flat)
        groups = [
            {"params": [p_P], "weight_decay": rule.decay} for rule, p_P in zip(self._groups, self._flat_P, strict=True)
        ]
        self._anchors_P = [self._flat_anchor(names, anchors or {}) for names in self._groups.values()]
        self.engine, self._optimizer, *_ = deepspeed.initialize(
            model=container, optimizer=_optimizer(groups, optimization), config=_config(optimization),
            mpu=gang.partners if gang is not None else None,
        )
        # ZeRO moves the flat parameters once, while it is built; views made before that would be left behind.
        self.parameters = self._by_name([p_P.detach() for p_P in self._flat_P])

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return sum(p_P.numel() for p_P in self.parameters.values())

    def tensors(self) -> Tensors:
        """Return the live parameters, views into the flat ones; read them, do not write them."""
        return dict(self.parameters)

    def backward(self, gradients: Mapping[str, Tensor]) -> None:
        """Hand one micro-batch's gradient to the engine, which averages it over the accumulation."""
        terms = [
            (p_P * _flat(gradients, names, self.device)).sum()
            for names, p_P in zip(self._groups.values(), self._flat_P, strict=True)
        ]
        self.engine.backward(torch.stack(terms).sum())

    def step(self) -> bool:
        """Count a micro-batch; at the accumulation's boundary clip, update and return True."""
        boundary = self.engine.is_gradient_accumulation_boundary()
        if boundary:
            factor = learning_rate_factor(self.optimization, self.steps_done, self.total_steps, self.restarts)
            self.lr = self.optimization.lr * factor
            for rule, group in zip(self._groups, self._optimizer.param_groups, strict=True):
                group["lr"] = self.lr * rule.rate
            if self.optimization.zero_stage == 0:
                self.grad_norm = _norm([p_P.grad for p_P in self._flat_P])
        self.engine.step()
        if boundary:
            self._pull_back()
            self.steps_done += 1
            if self.optimization.zero_stage > 0:
                self.grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        return bool(boundary)

    @torch.no_grad()
    def _pull_back(self) -> None:
        """Turn decay towards zero into decay towards the anchors: give back ``lr * decay * anchor``."""
        for index, (rule, p_P, anchor_P) in enumerate(zip(self._groups, self._flat_P, self._anchors_P, strict=True)):
            if anchor_P is None or not rule.decay:
                continue
            given_P = self.lr * rule.rate * rule.decay * anchor_P
            p_P.add_(given_P)
            updated = self._updated(index)
            if updated is not p_P:  # ZeRO updates a padded copy, or this rank's part of one
                updated.add_(self._part(given_P, updated))

    def state(self) -> Tensors:
        """Return the optimizer's moments as ``<name>|<moment>``, in the matrices' shapes whatever the ZeRO stage."""
        if not self.steps_done:
            return {}
        moments = {
            key: self._by_name([
                self._whole(self._state_of(index)[key].detach())[: p_P.numel()].float().cpu()
                for index, p_P in enumerate(self._flat_P)
            ])
            for key in _STATE_KEYS[self.optimization.optimizer]
        }
        return {f"{name}|{key}": by_name[name].clone() for name in self.names for key, by_name in moments.items()}

    def load_state(self, state: Mapping[str, Tensor], steps_done: int) -> None:
        """Continue from saved moments; the parameters were given to the constructor. What has none begins anew."""
        self.steps_done = steps_done
        if not steps_done or not state:
            return
        for index, (rule, names) in enumerate(self._groups.items()):
            if not all(f"{names[0]}|{key}" in state for key in _STATE_KEYS[self.optimization.optimizer]):
                continue
            updated, own = self._updated(index), self._state_of(index)
            for key in _STATE_KEYS[self.optimization.optimizer]:
                saved_P = _flat(state, [f"{name}|{key}" for name in names], self.device)
                own[key] = self._part(saved_P, updated).to(updated.dtype).clone()
            begun = max((at for at in self.renewals if at < steps_done), default=0) if rule.is_renewed else 0
            own["step"] = torch.tensor(float(steps_done - begun))  # bias correction depends on how many there were

    def _by_name(self, flat_P: Sequence[Tensor]) -> Tensors:
        """Return the matrices, in the order they were given in, as views into one flat tensor per group."""
        views: Tensors = {}
        for names, numbers_P in zip(self._groups.values(), flat_P, strict=True):
            parts = numbers_P.split([self._shapes[name].numel() for name in names])
            views |= {name: part.view(self._shapes[name]) for name, part in zip(names, parts, strict=True)}
        return {name: views[name] for name in self.names}

    def _flat_anchor(self, names: Sequence[str], anchors: Mapping[str, Tensor]) -> Tensor | None:
        """Return what a group's numbers decay towards, zero where nothing is given; None where nothing is at all."""
        if not any(name in anchors for name in names):
            return None
        zeros = {name: torch.zeros(self._shapes[name]) for name in names if name not in anchors}
        return _flat({**anchors, **zeros}, names, self.device)

    def _part(self, flat_P: Tensor, updated: Tensor) -> Tensor:
        """Return what belongs to the numbers that this rank updates, zero where those are padding."""
        index = self.partners.index if self.partners is not None and self.optimization.zero_stage else 0
        part = torch.zeros(updated.numel(), dtype=flat_P.dtype, device=flat_P.device)
        own = flat_P[index * updated.numel() : (index + 1) * updated.numel()]
        part[: own.numel()] = own
        return part.view_as(updated)

    def _whole(self, part: Tensor) -> Tensor:
        """Return the moments of all numbers from those that the partners update, each its part under ZeRO."""
        if self.partners is None or not self.optimization.zero_stage:
            return part
        return self.partners.gathered(part)

    def _updated(self, index: int) -> Tensor:
        """Return what torch's optimizer updates: the flat parameter, or ZeRO's padded partition of it.

        Every flat parameter is its own group, so the partners' partitions hold one whole parameter between them.
        """
        return self._torch_optimizer.param_groups[index]["params"][0]

    def _state_of(self, index: int) -> dict[str, Tensor]:
        return self._torch_optimizer.state[self._updated(index)]

    @property
    def _torch_optimizer(self) -> Any:
        return self._optimizer if self.optimization.zero_stage == 0 else self._optimizer.optimizer


def _flat(tensors: Mapping[str, Tensor], names: Sequence[str], device: torch.device) -> Tensor:
    """Return a copy of the named tensors one after another, in float32."""
    return torch.cat([tensors[name].detach().to(device, torch.float32).flatten() for name in names])


class _Rule(NamedTuple):
    """What the numbers of one flat parameter have in common."""

    decay: float
    rate: float
    """By what the scheduled learning rate is multiplied."""
    is_renewed: bool = False
    """They become others in the course of training, so their updates are counted apart."""


def _groups_by_rule(
    names: Sequence[str], adapter: Adapter, optimization: OptimizationSpec, rules: RegularizersSpec, renews: bool
) -> dict[_Rule, list[str]]:
    """Return the names by their decay and rate, in the order of their first."""
    groups: dict[_Rule, list[str]] = {}
    for name in names:
        rule = _rule(name, adapter, optimization, rules)
        groups.setdefault(rule._replace(is_renewed=renews and not name.startswith(HEAD)), []).append(name)
    return groups


def _rule(name: str, adapter: Adapter, optimization: OptimizationSpec, rules: RegularizersSpec) -> _Rule:
    if name.startswith(HEAD):
        return _Rule(rules.decay_head, 1.0)
    if adapter.decay_group(name) == "a":
        return _Rule(rules.decay_a, 1.0)
    return _Rule(rules.decay_b, optimization.lora_plus_ratio if isinstance(adapter, TwoFactors) else 1.0)


def _optimizer(groups: list[dict[str, Any]], spec: OptimizationSpec) -> torch.optim.Optimizer:
    if spec.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr)
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)


def _config(spec: OptimizationSpec) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": spec.accumulation,
        "gradient_clipping": spec.clip_norm or 0.0,
        "zero_optimization": {"stage": spec.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _norm(gradients: list[Tensor | None]) -> float:
    norms = [g.detach().float().norm() for g in gradients if g is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0
