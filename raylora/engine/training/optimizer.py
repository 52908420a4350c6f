"""DeepSpeed as the optimizer driver: one engine per member, fed with the gradient that member received.

A pack of members shares one backward pass through the base, so no engine can run that pass itself.
Instead the gradients G of the packed forward are handed over as the surrogate loss <P, G>, whose
gradient in the parameters P is exactly G: everything after it (accumulation, ZeRO, clipping, the step)
is DeepSpeed's ordinary work, and it is per member because the engine is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raylora.adapters.base import HEAD, Adapter, Tensors
from raylora.engine.training.schedule import learning_rate_factor
from raylora.spec import OptimizationSpec, RegularizersSpec

_STATE_KEYS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


def start_deepspeed(device: torch.device) -> None:
    """Join a process group of this worker alone, once per process, without compiling anything.

    DeepSpeed's shared-memory collective would be built by a C++ compiler on the first start, for minutes;
    a group of one has no use for it.
    """
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(key, value)
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    __compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # An in-process store: no port to choose, so any number of workers start on one machine.
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


class MemberOptimizer:
    """One member's parameters and the DeepSpeed engine that updates them."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        adapter: Adapter,
        optimization: OptimizationSpec,
        regularizers: RegularizersSpec,
        total_steps: int,
        device: torch.device,
        anchors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Build the engine; every matrix is its own parameter group, so that A and B decay on their own.

        Args:
            anchors: what a tensor's weight decay pulls towards, where that is not zero.
        """
        import deepspeed

        self.names = list(tensors)
        self.optimization = optimization
        self.total_steps = total_steps
        self.steps_done = 0
        self.grad_norm = 0.0
        container = nn.Module()
        container.matrices = nn.ParameterList([nn.Parameter(tensors[n].detach().float().clone()) for n in self.names])
        container.to(device)
        self.parameters = dict(zip(self.names, container.matrices, strict=True))
        groups = [
            {"params": [p], "weight_decay": _decay(name, adapter, regularizers), "name": name}
            for name, p in self.parameters.items()
        ]
        self._anchors = {name: anchor.detach().float().to(device) for name, anchor in (anchors or {}).items()}
        self._decays = {name: _decay(name, adapter, regularizers) for name in self.names}
        self.engine, self._optimizer, *_ = deepspeed.initialize(
            model=container, optimizer=_optimizer(groups, optimization), config=_config(optimization)
        )

    def tensors(self) -> Tensors:
        """Return the live parameters, detached; read them, do not write them."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def backward(self, gradients: Mapping[str, Tensor]) -> None:
        """Hand one micro-batch's gradient to the engine, which averages it over the accumulation."""
        terms = [(p * gradients[name].to(p.dtype)).sum() for name, p in self.parameters.items()]
        self.engine.backward(torch.stack(terms).sum())

    def step(self) -> bool:
        """Count a micro-batch; at the accumulation's boundary clip, update and return True."""
        boundary = self.engine.is_gradient_accumulation_boundary()
        if boundary:
            factor = learning_rate_factor(self.optimization, self.steps_done, self.total_steps)
            for group in self._optimizer.param_groups:
                group["lr"] = self.optimization.lr * factor
            if self.optimization.zero_stage == 0:
                self.grad_norm = _norm([p.grad for p in self.parameters.values()])
        self.engine.step()
        if boundary:
            self._pull_back()
            self.steps_done += 1
            if self.optimization.zero_stage > 0:
                self.grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        return bool(boundary)

    def _pull_back(self) -> None:
        """Turn decay towards zero into decay towards the anchors: give back ``lr * decay * anchor``."""
        with torch.no_grad():
            for index, (name, p) in enumerate(self.parameters.items()):
                if name in self._anchors and self._decays[name]:
                    given = self.lr * self._decays[name] * self._anchors[name]
                    p.add_(given)
                    updated = self._updated(index)
                    if updated is not p:  # ZeRO updates a flat copy
                        updated.flatten()[: p.numel()].add_(given.flatten())

    @property
    def lr(self) -> float:
        """The learning rate of the latest update."""
        return float(self._optimizer.param_groups[0]["lr"])

    def state(self) -> Tensors:
        """Return the optimizer's moments as ``<name>|<moment>``, in the parameters' shapes whatever the ZeRO stage."""
        if not self.steps_done:
            return {}
        return {
            f"{name}|{key}": self._state_of(index)[key].flatten()[: p.numel()].view_as(p).detach().float().cpu().clone()
            for index, (name, p) in enumerate(self.parameters.items())
            for key in _STATE_KEYS[self.optimization.optimizer]
        }

    def load_state(self, state: Mapping[str, Tensor], steps_done: int) -> None:
        """Continue from saved moments; the parameters were given to the constructor."""
        self.steps_done = steps_done
        if not steps_done or not state:
            return
        for index, (name, p) in enumerate(self.parameters.items()):
            updated, own = self._updated(index), self._state_of(index)
            for key in _STATE_KEYS[self.optimization.optimizer]:
                own[key] = torch.zeros_like(updated)
                own[key].flatten()[: p.numel()].copy_(state[f"{name}|{key}"].flatten())
            own["step"] = torch.tensor(float(steps_done))  # bias correction depends on how many updates there were

    def _updated(self, index: int) -> Tensor:
        """Return what torch's optimizer updates: the matrix, or ZeRO's flat (and padded) partition of it.

        Every matrix is its own group and a worker is a group of one, so a partition holds one whole matrix.
        """
        return self._torch_optimizer.param_groups[index]["params"][0]

    def _state_of(self, index: int) -> dict[str, Tensor]:
        return self._torch_optimizer.state[self._updated(index)]

    @property
    def _torch_optimizer(self) -> Any:
        return self._optimizer if self.optimization.zero_stage == 0 else self._optimizer.optimizer


def _decay(name: str, adapter: Adapter, rules: RegularizersSpec) -> float:
    if name.startswith(HEAD):
        return rules.decay_head
    return rules.decay_a if adapter.decay_group(name) == "a" else rules.decay_b


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
