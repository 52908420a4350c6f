"""What the planner says that a worker needs, beside what a process really took.

    python -m benchmarks.memory_estimate
    python -m benchmarks.memory_estimate --gpu        # on a GPU, with a made-up model of 1.1 billion weights

Every cell trains K members in one forward for a few steps, in a fresh process with the kept base at hand, and reads
the peak of its resident memory (``VmHWM`` of ``/proc/self/status``). That counts the pages of the base, which workers
of one machine share, and those of the libraries. Every row of data is as long as the cell's ``time``, so that batches
are what the planner takes them for. The planner's constants are the same in all cells; they were chosen by all but the
last three.

On a GPU the peak is what the process allocated at most and what its context takes. There the time of a step is
measured, too, and stands beside the planner's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import billion, record

_NAME = "memory_estimate"
_STEPS, _TIMED = 4, 12
_TARGETS = {"minilm-l6": "[query, key, value]", "smollm2-135m": "[q_proj, k_proj, v_proj]"}
_TARGETS["billion"] = _TARGETS["smollm2-135m"]
_TASKS = {
    "classification": "{{kind: classification, labels: [negative, positive], max_length: {time}}}",
    "language_modeling": "{{kind: language_modeling, max_length: {time}}}",
}
_SPEC = """
storage_path: {folder}
base: {{source: "{source}", quantization: {quantization}}}
adapter: {{rank: 8, alpha: 16, target_modules: {targets}}}
task: {task}
data: {{train: {{files: [{folder}/rows.jsonl]}}, validation_rows: 4, test_rows: 4}}
ensemble: {{members: {members}}}
evaluation: {{batch: 1}}
optimization: {{steps: 100, micro_batch: {rows}}}
placement: {{workers: 1, cpus_per_worker: 2, members_per_worker: {members}, recompute: {recompute}}}
"""


@dataclass(frozen=True)
class Cell:
    """One worker: a base, how it is stored, a task, and what its forward holds."""

    base: str
    quantization: str
    task: str
    members: int
    rows: int
    """Of one member."""
    time: int
    recompute: bool = False


CELLS = [
    Cell("minilm-l6", "none", "classification", 1, 16, 64),
    Cell("minilm-l6", "none", "classification", 4, 16, 128),
    Cell("minilm-l6", "nf4", "classification", 4, 16, 64),
    Cell("minilm-l6", "nf4", "classification", 8, 16, 128),
    Cell("minilm-l6", "int8", "classification", 8, 16, 64),
    Cell("minilm-l6", "rtn", "classification", 8, 4, 256),
    Cell("smollm2-135m", "none", "classification", 4, 4, 64),
    Cell("smollm2-135m", "nf4", "language_modeling", 4, 2, 128),
    Cell("smollm2-135m", "int8", "language_modeling", 1, 4, 256),
    Cell("smollm2-135m", "rtn", "language_modeling", 8, 1, 128),
]
"""What the planner's constants were chosen by."""
HELD_OUT = [
    Cell("minilm-l6", "nf4", "classification", 2, 8, 256),
    Cell("smollm2-135m", "int8", "classification", 4, 4, 128),
    Cell("smollm2-135m", "none", "language_modeling", 2, 2, 128),
]
"""What they were not chosen by."""
_LM, _CLASSES = "language_modeling", "classification"
GPU_CELLS = [
    Cell("billion", "none", _LM, 1, 4, 512),
    Cell("billion", "none", _LM, 4, 4, 512),
    Cell("billion", "none", _LM, 4, 4, 512, recompute=True),
    Cell("billion", "nf4", _LM, 1, 1, 512),
    Cell("billion", "nf4", _LM, 1, 4, 512),
    Cell("billion", "nf4", _LM, 4, 4, 512),
    Cell("billion", "nf4", _LM, 8, 1, 1024),
    Cell("billion", "rtn", _LM, 4, 2, 512),
    Cell("billion", "int8", _LM, 2, 2, 512),
    Cell("billion", "nf4", _CLASSES, 4, 8, 256),
    Cell("minilm-l6", "nf4", _CLASSES, 8, 16, 64),
    Cell("minilm-l6", "none", _CLASSES, 4, 64, 128),
]
"""On a GPU. No constant was chosen by any of them but the context's size."""


def spec_of(cell: Cell, folder: str, made_up: str = "") -> Any:
    """Return the cell's spec, after writing rows that are longer than it takes; the made-up model is in a folder."""
    from raylora.spec import parse_spec

    random.seed(0)
    words = ("the", "film", "was", "long", "and", "music", "good", "but", "nobody", "in", "town", "would", "say", "so")
    rows = [
        {"text": " ".join(random.choices(words, k=cell.time + 20)), "label": ("negative", "positive")[n % 2]}
        for n in range(300)
    ]
    Path(folder, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_spec(_SPEC.format(
        folder=folder, targets=_TARGETS[cell.base], source=made_up if cell.base == "billion" else f"pypi:{cell.base}",
        **{**asdict(cell), "task": _TASKS[cell.task].format(time=cell.time)},
    ))


def plan_cell(cell: Cell, folder: str) -> Any:
    """Plan the cell's run and begin it; quantize and keep its base, so that a worker only maps it."""
    import torch

    from raylora.engine.quantization.quantize_base import ensure_prepared
    from raylora.engine.run.plan_run import local_inventory, prepare
    from raylora.engine.training.distillation_loss import task_of

    prepared = prepare(spec_of(cell, folder), local_inventory(in_process=True))
    prepared.begin()
    if prepared.base is not None:
        ensure_prepared(prepared.spec.base, task_of(prepared.spec), prepared.base, torch.device("cpu"))
    prepared.make_session(cpus=2, gpus=0).load()
    return prepared.plan


def train(folder: str) -> dict[str, int]:
    """Take some steps as a worker would; return the peak of its resident bytes, and that after loading alone."""
    from raylora.engine.run.session import TrainingSession
    from raylora.store.run_store import RunStore

    (run,) = (path for path in Path(folder).glob("run-*") if path.is_dir())
    store = RunStore(str(run))
    session = TrainingSession(store.spec_in_place(), store, cpus=2, gpus=0)
    session.load()
    loaded = peak_bytes()
    take_steps(session, _STEPS)
    return {"loaded_bytes": loaded, "peak_bytes": peak_bytes()}


def take_steps(session: Any, steps: int) -> list[float]:
    """Take steps of all members in one forward, and return how long each took."""
    import torch

    from raylora import registry
    from raylora.engine.model.packed_model import PackedModel
    from raylora.engine.training.trainer import PackTrainer, TrainingSettings

    spec, sets = session.spec, session.sets
    adapter = registry.load("adapter", "lora").build(spec.adapter)
    trainer = PackTrainer(
        PackedModel(session.base, adapter, session.task), TrainingSettings.of(spec), list(session.plans.values()),
        sets.train.examples, sets.validation.examples,
    )
    collator, times = trainer.collator(), []
    for number in range(steps):
        trainer.step = number
        started = time.perf_counter()
        trainer.take_step(collator)
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times


def on_gpu(cell: Cell, folder: str, made_up: str) -> dict[str, Any]:
    """Plan and train a cell on the GPU; return the estimates and what it took."""
    import torch

    from raylora.engine.quantization.quantize_base import ensure_prepared
    from raylora.engine.run.plan_run import local_inventory, prepare
    from raylora.engine.training.distillation_loss import task_of
    from raylora.placement.pace import pace_of, rates_of

    inventory = local_inventory(in_process=True)
    prepared = prepare(spec_of(cell, folder, made_up), inventory)
    prepared.begin()
    if prepared.base is not None:
        ensure_prepared(prepared.spec.base, task_of(prepared.spec), prepared.base, torch.device("cuda"))
    prepared.make_session(cpus=2, gpus=1).load()  # makes the base's file, which a worker maps
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    session = prepared.make_session(cpus=2, gpus=1)
    session.load()
    loaded = torch.cuda.max_memory_allocated()
    times = take_steps(session, _STEPS + _TIMED)[_STEPS:]
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    pace = pace_of(prepared.demand, prepared.plan, inventory, rates_of(prepared.plan))
    model, step_s = prepared.demand.model, statistics.median(times)
    tokens = cell.members * prepared.demand.member.tokens
    parameters = model.block_parameters + (model.head_parameters if cell.task == _LM else 0)
    return {
        "estimate_bytes": prepared.plan.worker_bytes, "parts_bytes": prepared.plan.parts.by_name(),
        "loaded_bytes": loaded, "peak_bytes": torch.cuda.max_memory_allocated() + context, "context_bytes": context,
        "reserved_bytes": torch.cuda.max_memory_reserved(), "step_s": step_s, "estimate_step_s": pace.step_s,
        "estimate_weights_s": pace.weights_s, "tokens_per_s": tokens / step_s,
        "reached_tflops": (6 if cell.recompute else 4) * parameters * tokens / step_s / 1e12,
    }


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _in_own_process(*arguments: str) -> Any:
    return record.in_own_process("benchmarks.memory_estimate", *arguments)


def measure(cell: Cell) -> dict[str, Any]:
    """Return a row: the estimate by part, the peak, and the estimate over it."""
    with tempfile.TemporaryDirectory() as folder:
        found = _in_own_process("--plan", json.dumps(asdict(cell)), "--folder", folder)
        found |= _in_own_process("--train", "--folder", folder)
    return _row(cell, found)


def measure_on_gpu(cell: Cell, made_up: str) -> dict[str, Any]:
    """Return the row of a cell on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        cell_json = json.dumps(asdict(cell))
        return _row(cell, _in_own_process("--on-gpu", cell_json, "--folder", folder, "--made-up", made_up))


def _row(cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
    row = {**asdict(cell), **found, "ratio": found["estimate_bytes"] / found["peak_bytes"]}
    print(f"{cell}: estimate {row['estimate_bytes'] / 1e9:.2f} GB, took {row['peak_bytes'] / 1e9:.2f} GB, "
          f"{row['ratio']:.2f}" + (f"; step {row['step_s']:.3f} s, {row['estimate_step_s']:.3f} s estimated, "
          f"{row['reached_tflops']:.0f} TFLOP/s" if "step_s" in row else ""), flush=True)
    return row


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how far estimates are from peaks, and how many are near."""
    off = [abs(row["ratio"] - 1) for row in rows]
    return {
        "cells": len(rows), "within_15_percent": sum(one <= 0.15 for one in off), "furthest_off": round(max(off), 3),
        "lowest_ratio": round(min(row["ratio"] for row in rows), 3),
        "highest_ratio": round(max(row["ratio"] for row in rows), 3),
    }


def plot(rows: list[dict[str, Any]], name: str = _NAME) -> None:
    """Draw the parts of every estimate beside the peak."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 5.5))
    names = [
        f"{row['base']}, {row['quantization']}, {'LM' if 'language' in row['task'] else 'classes'}, "
        f"{row['members']} x {row['rows']} x {row['time']}"
        + (" (held out)" if row["held_out"] else "") + (", run again" if row["recompute"] else "")
        for row in rows
    ]
    places, left = range(len(rows)), [0.0] * len(rows)
    for part in rows[0]["parts_bytes"]:
        sizes = [row["parts_bytes"][part] / 1e9 for row in rows]
        if max(sizes) >= 0.01:
            axis.barh(places, sizes, left=left, height=0.6, label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axis.plot([row["peak_bytes"] / 1e9 for row in rows], places, "k|", markersize=22, markeredgewidth=2.5, label="peak")
    axis.set_yticks(list(places), names)
    axis.invert_yaxis()
    axis.set_xlabel("GB of one worker: the estimate by part, and the measured peak")
    axis.set_title("members x rows x tokens")
    axis.legend(loc="upper right")
    axis.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    figure.savefig(record.RESULTS / f"{name}.png", dpi=130)


def all_on_gpu(tokenizer: str) -> None:
    """Measure every cell of the GPU and write the result as it comes."""
    from raylora.data.catalog.assets import model_folder

    name, rows = f"{_NAME}_gpu", []
    with tempfile.TemporaryDirectory() as folder:
        billion.save(Path(folder), tokenizer or model_folder("smollm2-135m"))
        for cell in GPU_CELLS:
            rows.append({**measure_on_gpu(cell, folder), "held_out": False})
            record.write(name, rows, _summary(rows), "benchmarks.memory_estimate")
    plot(rows, name)


def main() -> None:
    """Measure every cell and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--on-gpu", help=argparse.SUPPRESS)
    parser.add_argument("--made-up", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--gpu", action="store_true", help="measure on a GPU")
    parser.add_argument("--tokenizer", default="", help="a folder, where the catalog is out of reach")
    arguments = parser.parse_args()
    if arguments.plan:
        plan = plan_cell(Cell(**json.loads(arguments.plan)), arguments.folder)
        print(json.dumps({"estimate_bytes": plan.worker_bytes, "parts_bytes": plan.parts.by_name()}))
    elif arguments.train:
        print(json.dumps(train(arguments.folder)))
    elif arguments.on_gpu:
        print(json.dumps(on_gpu(Cell(**json.loads(arguments.on_gpu)), arguments.folder, arguments.made_up)))
    elif arguments.gpu:
        all_on_gpu(arguments.tokenizer)
    else:
        rows = [{**measure(cell), "held_out": cell in HELD_OUT} for cell in [*CELLS, *HELD_OUT]]
        plot(rows)
        print(record.write(_NAME, rows, _summary(rows), "benchmarks.memory_estimate"))


if __name__ == "__main__":
    main()
