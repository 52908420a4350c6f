"""What tests do with whole runs: train one, stop one, read its members, compare two bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch

from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.engine.run.run_status import RunStatus
from raylora.progress import Activity, Progress
from raylora.store.run_store import RunStore


def run(spec: Any, on_step: Callable[[Progress], None] = lambda progress: None) -> dict[str, Any]:
    """Train, or go on with, a run in this process and return its metrics; ``on_step`` is told of each new step."""
    seen: dict[str, Progress] = {}

    def on_status(status: RunStatus) -> None:
        for name, job in status.jobs.items():
            progress = job.progress
            if progress is not None and progress is not seen.get(name) and progress.activity is Activity.TRAINING:
                seen[name] = progress
                on_step(progress)

    return run_in_process(prepare(spec), on_status)


def stop_at(step: int | None = None) -> Callable[[Progress], None]:
    """Return a callback that sends this process a SIGTERM at a step, by default at every one."""
    def on_step(progress: Progress) -> None:
        if step is None or progress.done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


def weights(run: Any, name: str = "member-000") -> dict[str, torch.Tensor]:
    """Return one member's tensors; the run is given by its spec or by where it is."""
    store = RunStore(run) if isinstance(run, str) else RunStore.for_spec(run)
    return safetensors.torch.load(store.load_result(f"members/{name}")["adapter_model.safetensors"])


def members(run: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of all committed members by name."""
    store = RunStore(run) if isinstance(run, str) else RunStore.for_spec(run)
    return {name: weights(run, name) for name in store.storage.list("members")}


def assert_bit_equal(one: Mapping[str, Any], two: Mapping[str, Any], where: str = "") -> None:
    """Compare tensors by name, or members by name, and want at least one."""
    assert one.keys() == two.keys() and one, where
    for name, value in one.items():
        if isinstance(value, Mapping):
            assert_bit_equal(value, two[name], name)
        else:
            assert torch.equal(value, two[name]), f"{where} {name}"


def prepared_base(spec: Any, task: Any) -> Any:
    """Return where a spec's prepared base lies, prepared if need be; None for kinds that are quantized as loaded."""
    import torch

    from raylora.engine.model.quantized_layers import bases_folder
    from raylora.engine.quantization.quantize_base import ensure_prepared, open_base

    if spec.base.grid is None:
        return None
    found = open_base(spec.base, task, bases_folder(spec.storage_path))
    ensure_prepared(spec.base, task, found, torch.device("cpu"))
    return found.store
