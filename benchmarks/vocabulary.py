"""Memory and time of a real vocabulary: logits in chunks of positions against the logits of all at once.

    python -m benchmarks.vocabulary
    python -m benchmarks.vocabulary --steps 1     # where there is little time

Every cell takes steps of K members in one forward over SmolLM2-135M in 4 bits, whose vocabulary has 49,152 tokens, in
a fresh process, and reads the peak of its resident memory (``VmHWM``) and the time of a step, the fastest of some. Rows
are as long as ``task.max_length``. "Whole" is the same packed model without its chunked output layer. With ``kept
heap`` glibc keeps freed buffers instead of giving them back to the kernel (``MALLOC_MMAP_MAX_=0``,
``MALLOC_TRIM_THRESHOLD_=-1``).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.memory_estimate import Cell as WorkerCell
from benchmarks.memory_estimate import peak_bytes, plan_cell, take_steps

_NAME = "vocabulary"
_ROWS, _TIME = 4, 512
_KEPT_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}


@dataclass(frozen=True)
class Cell:
    """How one process makes its logits, and whether it runs blocks again."""

    logits: str
    """``whole`` or ``chunked``."""
    recompute: bool
    members: int
    kept_heap: bool = False


CELLS = [
    Cell(logits, recompute, members, kept_heap)
    for recompute, members, kept_heap in ((True, 4, False), (False, 2, False), (True, 4, True))
    for logits in ("whole", "chunked")
]
"""Pairs. Four members that keep whole logits and all activations would take 20 GB."""


def train(cell: Cell, folder: str, steps: int) -> dict[str, Any]:
    """Take the cell's steps; return their median time, the peak of memory, and that after loading alone."""
    from raylora.engine.model.token_head import WholeHead
    from raylora.engine.run.session import TrainingSession
    from raylora.store.run_store import RunStore

    (run,) = (path for path in Path(folder).glob("run-*") if path.is_dir())
    store = RunStore(str(run))
    session = TrainingSession(store.spec_in_place(), store, cpus=2, gpus=0)
    session.load()
    loaded = peak_bytes()
    if cell.logits == "whole":
        session.base.token_head = WholeHead()
    train = session.sets.train  # without the rests that texts leave when they are cut into blocks
    full = [example for example in train.examples if len(example.sequences[0]) == _TIME]
    session.sets = replace(session.sets, train=replace(train, examples=full))
    times = take_steps(session, steps)
    return {"loaded_bytes": loaded, "peak_bytes": peak_bytes(), "step_s": min(times)}


def planned(cell: Cell, folder: str) -> int:
    """Plan and begin the cell's run in a folder, keep its base, and return what its worker is estimated at."""
    worker = WorkerCell("smollm2-135m", "nf4", "language_modeling", cell.members, _ROWS, _TIME, cell.recompute)
    return plan_cell(worker, folder).worker_bytes


def measure(cell: Cell, steps: int) -> dict[str, Any]:
    """Return a cell's row, planned in one process and trained in another."""
    with tempfile.TemporaryDirectory() as folder:
        return _row(cell, folder, steps)


def _row(cell: Cell, folder: str, steps: int) -> dict[str, Any]:
    cell_json = json.dumps(asdict(cell))
    estimate = record.in_own_process("benchmarks.vocabulary", "--plan", cell_json, "--folder", folder)
    found = record.in_own_process(
        "benchmarks.vocabulary", "--train", cell_json, "--folder", folder, "--steps", str(steps),
        variables=_KEPT_HEAP if cell.kept_heap else {},
    )
    row = {**asdict(cell), "rows": _ROWS, "time": _TIME, "timed_steps": steps, **found}
    if cell.logits == "chunked":
        row["estimate_bytes"] = estimate
    print(f"{cell}: {row['peak_bytes'] / 1e9:.2f} GB, {row['step_s']:.1f} s a step", flush=True)
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, per way to run blocks and to keep the heap, how much less memory and time chunks take."""
    found = {}
    for whole, chunked in zip(rows[::2], rows[1::2], strict=True):
        found[_name(whole, ", ")] = {
            "peak_ratio": round(whole["peak_bytes"] / chunked["peak_bytes"], 2),
            "saved_bytes": whole["peak_bytes"] - chunked["peak_bytes"],
            "step_ratio": round(whole["step_s"] / chunked["step_s"], 2),
        }
    return found


def _name(row: dict[str, Any], between: str) -> str:
    blocks = "blocks run again" if row["recompute"] else "activations kept"
    return between.join([f"{row['members']} members", blocks, *(["kept heap"] if row["kept_heap"] else [])])


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw peaks and times of a step, whole beside chunked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4))
    names = [_name(row, "\n") for row in rows[::2]]
    for axis, key, scale, label in ((axes[0], "peak_bytes", 1e9, "GB at the peak"), (axes[1], "step_s", 1, "s a step")):
        for shift, first, title in ((-0.2, 0, "logits of all positions"), (0.2, 1, "in chunks")):
            places = [place + shift for place in range(len(names))]
            axis.bar(places, [row[key] / scale for row in rows[first::2]], width=0.38, label=title)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, axis="y")
    axes[0].legend()
    figure.suptitle(f"{_ROWS} x {_TIME} tokens of each member, vocabulary 49,152")
    figure.tight_layout()
    figure.savefig(record.RESULTS / f"{_NAME}.png", dpi=130)


def main() -> None:
    """Measure every cell in a process of its own and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=3, help="how many are taken")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        print(json.dumps(train(Cell(**json.loads(arguments.train)), arguments.folder, arguments.steps)))
        return
    if arguments.plan:
        print(json.dumps(planned(Cell(**json.loads(arguments.plan)), arguments.folder)))
        return
    rows = []
    for whole, chunked in zip(CELLS[::2], CELLS[1::2], strict=True):
        rows += [measure(whole, arguments.steps), measure(chunked, arguments.steps)]
        record.write(_NAME, rows, summary(rows), "benchmarks.vocabulary")
    plot(rows)
    print(record.RESULTS / f"{_NAME}.json")


if __name__ == "__main__":
    main()
