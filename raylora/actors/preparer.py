"""The preparer actor: quantizes the base before any worker starts, with the cluster's CPUs to solve layers on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from raylora.actors.inputs import spec_here
from raylora.actors.sealed import Sealed
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore

if TYPE_CHECKING:  # torch is imported where it computes, as by the other actors' modules
    from raylora.engine.model.quantized_layers import Solved
    from raylora.engine.quantization.layer_solver import GroupJob


@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"control": 1})  # type: ignore[call-overload]
class Preparer:
    """Runs the blocks one after another; within a block, its groups of linears are solved side by side."""

    def __init__(self, spec: Sealed[RunSpec], gpus: int, store_uri: str) -> None:
        self.spec, self.gpus, self.store_uri, self.signal_number = spec, gpus, store_uri, 0

    def prepare(self, base: Any, coordinator: Any) -> None:
        """Prepare a base and commit it.

        Raises:
            Interrupted: the blocks so far are committed.
            StoreError: this node cannot get the model's files.
        """
        from raylora.engine.model.machine import compute_device
        from raylora.engine.quantization.layer_solver import solve_here
        from raylora.engine.quantization.quantize_base import ensure_prepared
        from raylora.engine.training.distillation_loss import task_of

        spec = spec_here(self.spec.open(), RunStore(self.store_uri), coordinator)
        task = task_of(spec)
        device = compute_device(self.gpus)
        ensure_prepared(
            spec.base, task, base, device, solve_here if device.type == "cuda" else solve_on_cluster,
            lambda done: coordinator.report_preparation.remote(done), lambda: self.signal_number,
        )

    @ray.method(concurrency_group="control")
    def stop(self, signal_number: int) -> None:
        """Ask to commit and stop after the current block."""
        self.signal_number = signal_number


def solve_on_cluster(jobs: Sequence[GroupJob]) -> list[list[Solved]]:
    """Solve each group in a task of its own, the costliest first; each has one CPU."""
    def cost(job: GroupJob) -> int:
        return sum(weight.numel() * weight.shape[1] for weight in job.weights_OI.values())

    order = sorted(range(len(jobs)), key=lambda index: -cost(jobs[index]))
    references = {index: _solve.remote(jobs[index]) for index in order}
    return [ray.get(references[index]) for index in range(len(jobs))]


@ray.remote(num_cpus=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
def _solve(job: GroupJob) -> list[Solved]:
    import torch

    from raylora.engine.quantization.layer_solver import solve_group

    torch.set_num_threads(1)
    return solve_group(job)
