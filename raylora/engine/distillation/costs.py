"""What a finished run costs to use: memory in a process of its own, speed side by side in another.

    python -m raylora.engine.distillation.costs '[["teacher", "runs/demo", ["member-000", "member-001"]]]' speed

Only the models' forward passes are timed, on tokens that are ready.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, cast

from raylora.errors import RayloraError
from raylora.records import Costs, MeasuredOn

BATCH_ROWS = 64
TEXT_ROWS = 8
"""A batch of a language model, whose logits are gigabytes."""
ROUNDS = 10
_LIMIT_S = 900


@dataclass(frozen=True)
class Contender:
    """Some members of a finished run, used together."""

    name: str
    uri: str
    members: tuple[str, ...]


def measure(contenders: Sequence[Contender]) -> tuple[dict[str, Costs], MeasuredOn]:
    """Return by name ``latency_ms`` (one row), ``rows_per_s`` (batches), ``peak_memory_bytes``; and where that was.

    Peak memory is of a fresh process that loads one contender and predicts one batch, libraries included; on a GPU
    it is the device's. Speeds are medians of rounds in which all take turns in one process.

    Raises:
        RayloraError: a process failed; the message is its last line.
    """
    timed = _in_process(contenders, "speed")
    where: MeasuredOn = timed.pop("measured_on")
    found: dict[str, Costs] = {}
    for one in contenders:
        found[one.name] = cast(Costs, {**timed[one.name], **_in_process([one], "memory")})
    return found, where


def _in_process(contenders: Sequence[Contender], what: str) -> dict[str, Any]:
    listing = json.dumps([astuple(one) for one in contenders])
    done = subprocess.run(
        [sys.executable, "-m", "raylora.engine.distillation.costs", listing, what], capture_output=True, text=True,
        timeout=_LIMIT_S, check=False,
    )
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["it said nothing"]
    if done.returncode:
        raise RayloraError(f"measuring {what} failed: {lines[-1]}", "distill.costs: false leaves the measurement out")
    return json.loads(lines[-1])


class _Loaded:
    """A contender ready to predict."""

    def __init__(self, contender: Contender) -> None:
        import torch

        from raylora.engine.model.base import load_base
        from raylora.engine.model.machine import compute_device
        from raylora.engine.model.quantized_layers import prepared_store
        from raylora.engine.run.finished_members import adapters_of, read_members
        from raylora.engine.training.distillation_loss import task_of
        from raylora.engine.training.inputs import sets_of
        from raylora.engine.training.member_plan import member_adapters
        from raylora.ensemble.outputs import output_of
        from raylora.store.run_store import RunStore

        store = RunStore(contender.uri)
        spec = store.read_spec()
        self.task = task_of(spec)
        device = compute_device(torch.cuda.device_count())
        self.base = load_base(spec.base, member_adapters(spec), self.task, device, prepared_store(store))
        self.adapter = adapters_of(spec, contender.members)
        self.stacked = read_members(spec, store, self.base, contender.members)
        examples = sets_of(spec, self.task, self.base.tokenizer, store).test.examples
        self.rows = TEXT_ROWS if output_of(self.task.output).per_token else BATCH_ROWS
        self.examples = (examples * (self.rows // len(examples) + 1))[: self.rows]

    def forward(self, rows: int) -> Callable[[], None]:
        """Return a call that predicts the first rows."""
        import torch

        from raylora.engine.model.packed_model import PackedModel

        batch = self.task.collate(self.examples[:rows], self.base.tokenizer)
        model = PackedModel(self.base, self.adapter, self.task)

        def call() -> None:
            model.scores(self.stacked, batch)
            if self.base.device.type == "cuda":
                torch.cuda.synchronize()

        return call


def _speed(contenders: Sequence[Contender]) -> dict[str, Any]:
    import torch

    loaded = {one.name: _Loaded(one) for one in contenders}
    found: dict[str, Any] = {name: {} for name in loaded}
    batch = next(iter(loaded.values())).rows
    for rows in (1, batch):
        times_s = _interleaved({name: one.forward(rows) for name, one in loaded.items()})
        for name, seconds in times_s.items():
            key, value = ("latency_ms", 1000 * seconds) if rows == 1 else ("rows_per_s", rows / seconds)
            found[name][key] = value
    device = next(iter(loaded.values())).base.device
    found["measured_on"] = {"device": device.type, "threads": torch.get_num_threads(), "rounds": ROUNDS,
                            "batch_rows": batch}
    return found


def _interleaved(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return the median seconds of calls that take turns, so that a drifting machine drifts for all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:  # the first round compiles kernels
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _memory(contender: Contender) -> Costs:
    import torch

    loaded = _Loaded(contender)
    loaded.forward(loaded.rows)()
    if torch.cuda.is_available():
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated()}
    return {"peak_memory_bytes": _own_peak_bytes()}


def _own_peak_bytes() -> int:
    """Return this process's peak; ``getrusage`` would give that of the parent it was forked from, if larger."""
    from raylora.engine.model.machine import peak_memory_bytes

    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [line for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(peaks[0].split()[1]) if peaks else peak_memory_bytes()


def _main(listing: str, what: str) -> None:
    contenders = [Contender(name, uri, tuple(members)) for name, uri, members in json.loads(listing)]
    print(json.dumps(_speed(contenders) if what == "speed" else _memory(contenders[0])))


if __name__ == "__main__":
    _main(*sys.argv[1:])
