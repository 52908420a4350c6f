"""What an ensemble's student keeps and saves: KD-LoRA (arXiv 2410.20777) with one teacher, with an ensemble, without.

    python -m benchmarks.distillation

The teacher is an ensemble of LoRA members on a 4-bit MiniLM-L6; the student has three of its six layers, LoRA and a
head of its own. Every seed trains a teacher and its students anew on the same rows; the table holds mean and standard
error over seeds. Where the adapter kind ``full`` is registered, a fully fine-tuned MiniLM-L6 is a teacher too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record

_TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
_BINARY = {"kind": "classification", "labels": ["negative", "positive"], "max_length": 40}
_TOPICS = ["business", "entertainment", "politics", "sports", "tech"]
TASKS: dict[str, dict[str, Any]] = {
    "movie-reviews": {"task": _BINARY, "rows": 500, "epochs": 3, "foreign": "bbc-news"},
    "bbc-news": {
        "task": {"kind": "classification", "labels": _TOPICS, "max_length": 40}, "rows": 250, "epochs": 6,
        "foreign": "movie-reviews",
    },
    "tweets": {"task": _BINARY, "rows": 500, "epochs": 3, "foreign": "bbc-news"},
}
SINGLE, ENSEMBLE, ALONE = "LoRA, one member", "LoRA ensemble", "student, no teacher"
FULL, FROM_FULL = "full fine-tuning", "student of full fine-tuning"
STUDENTS: dict[str, dict[str, Any]] = {
    "student of the ensemble": {"teacher": "ensemble", "loss": {"kind": "kl"}},
    "student of one member": {"teacher": "single", "loss": {"kind": "kl"}},
    "student of the distribution": {"teacher": "ensemble", "loss": {"kind": "dirichlet", "temperature": 2.0}},
}
METRICS = ("accuracy", "nll", "ece", "brier")
COSTS = ("parameters", "trainable_parameters", "peak_memory_bytes", "latency_ms", "rows_per_s")


def teacher_spec(task: str, seed: int, sizes: argparse.Namespace, folder: str, full: bool = False) -> dict[str, Any]:
    """Return the spec of a teacher, as plain data."""
    chosen = TASKS[task]
    foreign_rows = min(500, sizes.test_rows)
    adapter: dict[str, Any] = {"kind": "lora", "rank": 8, "alpha": 16, "target_modules": _TARGETS}
    return {
        "name": f"{task}-{'full' if full else 'lora'}-{seed}", "storage_path": folder,
        "base": {"source": "pypi:minilm-l6", "quantization": "none" if full else "nf4"},
        "adapter": {"kind": "full"} if full else adapter,
        "task": chosen["task"],
        "data": {
            "train": {"source": f"pypi:{task}"}, "train_rows": min(chosen["rows"], sizes.train_rows),
            "validation_rows": 100, "test_rows": sizes.test_rows,
        },
        "ensemble": {"members": 1 if full else sizes.members, "seed": 100 * seed},
        "optimisation": optimisation(5e-5 if full else 1e-3, chosen["epochs"]),
        "evaluation": {
            "bootstrap_samples": 0,
            "out_of_distribution": {"foreign": {"source": f"pypi:{chosen['foreign']}", "rows": foreign_rows}},
        },
        "placement": {"workers": 1, "cpus_per_worker": 1},
    }


def optimisation(lr: float, epochs: float) -> dict[str, Any]:
    """Return a schedule that teachers and students share but for its length and rate."""
    return {"lr": lr, "epochs": epochs, "micro_batch": 16, "group_by_length": True, "clip_norm": 0.3, "warmup": 0.03}


def settings_of(task: str, name: str, seed: int, lr: float, more: dict[str, Any], first: bool, costs: bool) -> Any:
    """Return the distill section of one student; only a run's first brings the student without a teacher."""
    from raylora.spec import DistillSpec

    student = {
        "base": {"source": "pypi:minilm-l6-half", "quantization": "nf4"},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16, "target_modules": _TARGETS},
        "seed": 100 * seed, "optimisation": optimisation(lr, 2 * TASKS[task]["epochs"]),
    }
    folder = "".join(c if c.isalnum() else "-" for c in name)
    return DistillSpec.model_validate(
        {"name": folder, "student": student, **more, "alone": first, "costs": costs}
    )


class Table:
    """Cells by task and contender, one value per seed; written after each."""

    def __init__(self, seeds: int) -> None:
        self.seeds = seeds
        self.cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.path: Path | None = None

    def add(self, task: str, name: str, seed: int, found: dict[str, Any], wall_s: float) -> None:
        """Take one contender of one seed, say it, and write everything there is."""
        test, foreign = found["eval"]["test"], found["ood"]["foreign"]
        cell = {
            "seed": seed, **{key: test[key] for key in METRICS},
            "mutual_information": test["mutual_information"],
            "auroc_entropy": foreign["predictive_entropy"],
            "auroc_mutual_information": foreign.get("mutual_information"),
            **{key: found[key] for key in COSTS if key in found}, "wall_s": wall_s,
        }
        self.cells.setdefault((task, name), []).append(cell)
        said = "  ".join(f"{key} {cell[key]:.4f}" for key in (*METRICS, "auroc_entropy"))
        print(f"{task:14s} seed {seed}  {name:28s} {said}  {wall_s:.0f} s", flush=True)
        self.path = record.write("distillation", self.rows(), self.summary(), "benchmarks.distillation")

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per task and contender: mean and standard error over the seeds so far, and the costs."""
        return [self._row(task, name, cells) for (task, name), cells in self.cells.items()]

    def _row(self, task: str, name: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
        row: dict[str, Any] = {"task": task, "contender": name, "seeds": len(cells)}
        for key in (*METRICS, "mutual_information", "auroc_entropy", "auroc_mutual_information"):
            values = [cell[key] for cell in cells if cell[key] is not None]
            if values:
                row[key] = statistics.fmean(values)
                row[f"{key}_se"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        for key in COSTS:
            row[key] = next((cell[key] for cell in cells if key in cell), None)
        kept = [
            cell["accuracy"] / whole["accuracy"]
            for cell, whole in zip(cells, self.cells.get((task, ENSEMBLE), []), strict=False)
        ]
        return {**row, "retained_accuracy": statistics.fmean(kept) if kept else None, "per_seed": cells}

    def summary(self) -> dict[str, Any]:
        """Return per task what the teacher is worth: each student against the one without, seed by seed."""
        found: dict[str, Any] = {}
        for (task, name), cells in self.cells.items():
            alone = self.cells.get((task, ALONE), [])
            if not name.startswith("student of") or len(alone) < len(cells):
                continue
            gains = {key: [a[key] - b[key] for a, b in zip(cells, alone, strict=False)] for key in ("accuracy", "nll")}
            found.setdefault(task, {})[name] = {
                key: {"mean": statistics.fmean(values),
                      "se": statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None}
                for key, values in gains.items()
            }
        return found


def measure(task: str, seed: int, sizes: argparse.Namespace, folder: str, table: Table) -> None:
    """Train one seed's teacher and its students."""
    from raylora.client import distil
    from raylora.engine.local import run_in_process
    from raylora.engine.prepare import prepare
    from raylora.spec import build_spec

    started = time.perf_counter()
    prepared = prepare(build_spec(teacher_spec(task, seed, sizes, folder)))
    run_in_process(prepared)
    trained_s = time.perf_counter() - started
    for number, (name, more) in enumerate(STUDENTS.items()):
        started, first = time.perf_counter(), number == 0
        costs = seed == 0 and not sizes.no_costs
        found = distil(
            prepared.store.uri, settings_of(task, name, seed, sizes.lr, more, first, costs and first), local=True
        )["contenders"]
        wall_s = time.perf_counter() - started
        if first:
            table.add(task, SINGLE, seed, found["single"], trained_s)
            table.add(task, ENSEMBLE, seed, found["teacher"], trained_s)
            table.add(task, ALONE, seed, found["alone"], wall_s)
        table.add(task, name, seed, found["student"], wall_s)


def measure_full(task: str, seed: int, sizes: argparse.Namespace, folder: str, table: Table) -> None:
    """Train one seed's fully fine-tuned teacher and its student, where that adapter kind is registered."""
    from raylora import registry
    from raylora.client import distil
    from raylora.engine.local import run_in_process
    from raylora.engine.prepare import prepare
    from raylora.spec import build_spec

    if "full" not in registry.kinds("adapter"):
        return
    started = time.perf_counter()
    prepared = prepare(build_spec(teacher_spec(task, seed, sizes, folder, full=True)))
    run_in_process(prepared)
    costs = seed == 0 and not sizes.no_costs
    found = distil(
        prepared.store.uri, settings_of(task, FROM_FULL, seed, sizes.lr, {"loss": {"kind": "kl"}}, False, costs),
        local=True,
    )["contenders"]
    wall_s = time.perf_counter() - started
    table.add(task, FULL, seed, found["teacher"], wall_s)
    table.add(task, FROM_FULL, seed, found["student"], wall_s)


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw accuracy, NLL and ECE of every contender, with standard errors over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    shown = (("accuracy", 100.0, "accuracy (%)"), ("nll", 1.0, "NLL (nats)"), ("ece", 1.0, "ECE"))
    figure, grid = plt.subplots(len(tasks), 3, figsize=(15, 3.2 * len(tasks)), squeeze=False)
    for line, task in enumerate(tasks):
        chosen = [row for row in rows if row["task"] == task][::-1]
        for axis, (key, factor, name) in zip(grid[line], shown, strict=True):
            for height, row in enumerate(chosen):
                taught = row["contender"].startswith("student")
                axis.errorbar(factor * row[key], height, xerr=factor * row[f"{key}_se"], marker="o", capsize=3,
                              linestyle="none", color="tab:orange" if taught else "tab:blue")
            axis.set_yticks(range(len(chosen)), [row["contender"] for row in chosen] if axis is grid[line][0] else [])
            axis.set_ylim(-0.6, len(chosen) - 0.4)
            axis.set_title(f"{task}: test {name}, mean ± s.e.", fontsize=10)
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(record.RESULTS / "distillation.png", dpi=130)


def main() -> None:
    """Measure every cell and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--members", type=int, default=4, help="of the teacher")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--lr", type=float, default=1e-3, help="of the students")
    parser.add_argument("--train-rows", type=int, default=10**9, help="at most this many; for a quick look")
    parser.add_argument("--test-rows", type=int, default=600)
    parser.add_argument("--no-costs", action="store_true", help="measure no memory and no speed")
    parser.add_argument("--no-full", action="store_true", help="leave the fully fine-tuned teacher out")
    sizes = parser.parse_args()
    table = Table(sizes.seeds)
    with tempfile.TemporaryDirectory() as folder:
        for task in sizes.tasks:
            for seed in range(sizes.seeds):
                measure(task, seed, sizes, folder, table)
                if not sizes.no_full:
                    measure_full(task, seed, sizes, folder, table)
    plot(table.rows())
    print(table.path)


if __name__ == "__main__":
    main()
