"""What an ensemble's student keeps and saves: KD-LoRA (arXiv 2410.20777) with one teacher, with an ensemble, without.

    python -m benchmarks.distillation                # teacher: members on mpnet-base; student: its lower six layers
    python -m benchmarks.distillation --pair minilm  # teacher: members on MiniLM-L6; student: three of its six layers

Every seed trains a teacher and its students anew on the same rows; the table holds mean and standard error over seeds.
Where a pair has several rates, members at each of them are tried before a task's teachers, and every student at each;
validation NLL chooses, and only the chosen one's test rows are looked at.
Results are written after every contender, by any number of processes at once (``--go-on``, ``--tasks``); memory and
speed of all contenders are measured when everything is trained, on seed 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks import rates, record

_BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
_MPNET = ["attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"]
_BINARY = {"kind": "classification", "labels": ["negative", "positive"], "max_length": 40}
_TOPICS = {
    "kind": "classification", "labels": ["business", "entertainment", "politics", "sports", "tech"], "max_length": 32,
}
TASKS: dict[str, dict[str, Any]] = {
    "movie-reviews": {"task": _BINARY, "foreign": "bbc-news"},
    "bbc-news": {"task": _TOPICS, "foreign": "movie-reviews"},
    "tweets": {"task": _BINARY, "foreign": "bbc-news"},
    "sarcasm-headlines": {"task": {**_BINARY, "labels": ["earnest", "satire"]}, "foreign": "movie-reviews"},
}


@dataclass(frozen=True)
class Pair:
    """A teacher's base and a student's, and how much they are trained."""

    teacher: str
    targets: list[str]
    """The linear layers that get a LoRA, in both."""
    members: int
    lrs: tuple[float, ...]
    """What the teacher's members are tried at."""
    full_lrs: tuple[float, ...]
    student: str
    student_lrs: tuple[float, ...]
    """What every student is tried at."""
    plans: dict[str, Plan]
    students_of_full: bool
    result: str


@dataclass(frozen=True)
class Plan:
    """How much of a task is used."""

    rows: int
    epochs: float
    student: dict[str, float]
    """``steps`` or ``epochs``, with a teacher and without."""
    transfer: int = 0
    """Rows of the same source that only the teacher labels; what is in another set already drops out."""


PAIRS = {
    "mpnet": Pair(
        "pypi:mpnet-base", _MPNET, 3, (5e-4,), (7e-5,), "pypi:mpnet-base-half", (7e-4,),
        {
            "movie-reviews": Plan(rows=500, epochs=2, student={"steps": 240}, transfer=1600),
            "bbc-news": Plan(rows=250, epochs=3, student={"steps": 100}, transfer=400),
            "sarcasm-headlines": Plan(rows=500, epochs=2, student={"steps": 240}, transfer=1500),
        },
        students_of_full=False, result="distillation",
    ),
    "minilm": Pair(
        "pypi:minilm-l6", _BERT, 4, (5e-4, 1e-3, 2e-3), (5e-5, 1e-4, 2e-4), "pypi:minilm-l6-half", (5e-4, 1e-3, 2e-3),
        {
            "movie-reviews": Plan(rows=500, epochs=3, student={"epochs": 6}),
            "bbc-news": Plan(rows=250, epochs=6, student={"epochs": 12}),
            "tweets": Plan(rows=500, epochs=3, student={"epochs": 6}),
        },
        students_of_full=True, result="distillation_minilm",
    ),
}
SINGLE, ENSEMBLE, ALONE = "LoRA, one member", "LoRA ensemble", "student, no teacher"
FULL, FROM_FULL = "full fine-tuning", "student of full fine-tuning"
FROM_ENSEMBLE = "student of the ensemble"
LESSONS: dict[str, dict[str, Any]] = {
    FROM_ENSEMBLE: {"teacher": "ensemble", "loss": {"kind": "kl"}},
    "student of one member": {"teacher": "single", "loss": {"kind": "kl"}},
    "student of the distribution": {"teacher": "ensemble", "loss": {"kind": "dirichlet", "temperature": 2.0}},
    "student of the calibrated ensemble": {"teacher": "ensemble", "loss": {"kind": "kl"}, "calibrated": True},
}
METRICS = ("accuracy", "nll", "ece", "brier")
COSTS = ("peak_memory_bytes", "latency_ms", "rows_per_s")


def teacher_spec(
    pair: Pair, task: str, seed: int, sizes: argparse.Namespace, folder: str, lr: float, full: bool = False
) -> dict[str, Any]:
    """Return the spec of a teacher, as plain data."""
    chosen, plan = TASKS[task], pair.plans[task]
    adapter: dict[str, Any] = {"kind": "lora", "rank": 8, "alpha": 16, "target_modules": pair.targets}
    foreign = {"source": f"pypi:{chosen['foreign']}", "rows": min(200, sizes.test_rows)}
    return {
        "name": f"{task}-{'full' if full else 'lora'}-{seed}", "storage_path": folder,
        "base": {"source": pair.teacher, "quantization": "none" if full else "nf4"},
        "adapter": {"kind": "full"} if full else adapter,
        "task": chosen["task"],
        "data": {
            "train": {"source": f"pypi:{task}"}, "train_rows": min(plan.rows, sizes.train_rows),
            "validation_rows": 100, "test_rows": sizes.test_rows,
        },
        "ensemble": {"members": 1 if full else sizes.members or pair.members, "seed": 100 * seed},
        "optimization": optimization(lr, {"epochs": plan.epochs}),
        "evaluation": {"bootstrap_samples": 0, "out_of_distribution": {"foreign": foreign}},
        "placement": {"workers": 1, "cpus_per_worker": 1},
    }


def optimization(lr: float, length: dict[str, float]) -> dict[str, Any]:
    """Return a schedule that teachers and students share but for its length and rate."""
    return {"lr": lr, **length, "micro_batch": 16, "group_by_length": True, "clip_norm": 0.3, "warmup": 0.03}


def settings_of(
    pair: Pair, task: str, name: str, seed: int, sizes: argparse.Namespace, distill_from: dict[str, Any], lr: float
) -> Any:
    """Return the distill section of one student; only a teacher's first brings the student without a teacher."""
    from raylora.spec import DistillSpec

    student = {
        "base": {"source": pair.student, "quantization": "nf4"},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16, "target_modules": pair.targets},
        "seed": 100 * seed, "optimization": optimization(lr, pair.plans[task].student),
    }
    transfer = min(pair.plans[task].transfer, sizes.train_rows)
    return DistillSpec.model_validate({
        "name": folder_of(pair, name, lr), "student": student, **distill_from, "alone": name == FROM_ENSEMBLE,
        "costs": False,
        "transfer": {"source": f"pypi:{task}", "rows": transfer} if transfer else None,
    })


def folder_of(pair: Pair, name: str, lr: float) -> str:
    """Return a student's name as a run's."""
    at = f"-{1e5 * lr:.0f}" if len(pair.student_lrs) > 1 else ""
    return name.replace("student of", "of").replace(" ", "-").replace("full-fine-tuning", "full") + at


class Table:
    """Cells by task and contender, one value per seed; the file is the truth, so that processes may share it."""

    def __init__(self, pair: str, members: int | None, go_on: bool) -> None:
        self.options = f"--pair {pair}" + (f" --members {members}" if members else "")
        self.result, self.tries_rates = result_of(pair, members), len(PAIRS[pair].student_lrs) > 1
        self.path = record.RESULTS / f"{self.result}.json"
        if not go_on:
            self.path.unlink(missing_ok=True)

    def cells(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """Return what is measured so far."""
        rows = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        return {(row["task"], row["contender"]): row["per_seed"] for row in rows}

    def has(self, task: str, seed: int, *names: str) -> bool:
        """Return whether every one of the contenders was measured with a seed."""
        cells = self.cells()
        return all(any(self._counts(cell, seed) for cell in cells.get((task, name), [])) for name in names)

    def _counts(self, cell: dict[str, Any], seed: int) -> bool:
        """Return whether a cell needs no measuring anew: where rates are tried, it has to have been chosen by them."""
        return cell["seed"] == seed and ("lr" in cell or not self.tries_rates)

    def add(self, task: str, name: str, seed: int, found: dict[str, Any], wall_s: float, lr: float) -> None:
        """Take one contender of one seed, say it, and write everything there is."""
        test, foreign = found["eval"]["test"], found["ood"]["foreign"]
        cell = {
            "seed": seed, "lr": lr, **{key: test[key] for key in METRICS},
            "mutual_information": test["mutual_information"],
            "auroc_entropy": foreign["predictive_entropy"],
            "auroc_mutual_information": foreign.get("mutual_information"),
            "parameters": found["parameters"], "trainable_parameters": found["trainable_parameters"],
        }
        said = "  ".join(f"{key} {cell[key]:.4f}" for key in (*METRICS, "auroc_entropy"))
        print(f"{task:14s} seed {seed}  {name:38s} {said}  lr {lr:g}  {wall_s:.0f} s", flush=True)
        self._change(task, name, lambda cells: [*(one for one in cells if one["seed"] != seed), cell])

    def add_costs(self, task: str, name: str, costs: Mapping[str, Any]) -> None:
        """Put memory and speed beside the first seed of a contender."""
        print(f"{task:14s} {name:38s} " + "  ".join(f"{key} {costs[key]:,.1f}" for key in COSTS), flush=True)
        measured = {key: costs[key] for key in COSTS}
        self._change(task, name, lambda cells: [one | measured if one["seed"] == 0 else one for one in cells])

    def _change(self, task: str, name: str, change: Any) -> None:
        with FileLock(Path(tempfile.gettempdir()) / f"raylora-{self.result}.lock"):
            cells = self.cells()
            cells[task, name] = sorted(change(cells.get((task, name), [])), key=lambda one: one["seed"])
            # Whether in one go or in several, this is what was measured.
            command = f"python -m benchmarks.distillation {self.options}"
            record.write(self.result, rows_of(cells), summary_of(cells), "benchmarks.distillation", command)


def result_of(pair: str, members: int | None) -> str:
    """Return what the result's files are called."""
    return PAIRS[pair].result + (f"_{members}_members" if members else "")


Cells = dict[tuple[str, str], list[dict[str, Any]]]


def rows_of(cells: Cells) -> list[dict[str, Any]]:
    """Return one row per task and contender: mean and standard error over the seeds so far, and the costs."""
    return [_row(task, name, own, cells.get((task, ENSEMBLE), [])) for (task, name), own in cells.items()]


def _row(task: str, name: str, own: list[dict[str, Any]], whole: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"task": task, "contender": name, "seeds": len(own)}
    for key in (*METRICS, "mutual_information", "auroc_entropy", "auroc_mutual_information"):
        values = [cell[key] for cell in own if cell.get(key) is not None]
        if values:
            row |= {key: statistics.fmean(values), f"{key}_se": error(values)}
    for key in ("parameters", "trainable_parameters", *COSTS):
        row[key] = next((cell[key] for cell in own if key in cell), None)
    of_seed = {cell["seed"]: cell["accuracy"] for cell in whole}
    kept = [cell["accuracy"] / of_seed[cell["seed"]] for cell in own if cell["seed"] in of_seed]
    if kept:
        row |= {"retained_accuracy": statistics.fmean(kept), "retained_accuracy_se": error(kept)}
    return {**row, "per_seed": own}


def summary_of(cells: Cells) -> dict[str, Any]:
    """Return per task each student against the one without a teacher, and against the student of one member."""
    found: dict[str, Any] = {}
    for (task, name), own in cells.items():
        if not name.startswith("student of"):
            continue
        for other in (ALONE, "student of one member"):
            of_seed = {cell["seed"]: cell for cell in cells.get((task, other), [])}
            both = [(cell, of_seed[cell["seed"]]) for cell in own if cell["seed"] in of_seed]
            if both and name != other:
                gains = {key: [a[key] - b[key] for a, b in both] for key in ("accuracy", "nll", "ece")}
                found.setdefault(task, {}).setdefault(name, {})[f"against {other}"] = {
                    key: {"mean": statistics.fmean(values), "se": error(values)} for key, values in gains.items()
                }
    return found


def error(values: list[float]) -> float:
    """Return the standard error of a mean; 0 for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def train(pair: Pair, task: str, seed: int, sizes: argparse.Namespace, folder: str, table: Table) -> None:
    """Train one seed's ensemble and its students."""
    beside = {FROM_ENSEMBLE: (SINGLE, ENSEMBLE, ALONE)}
    missing = [name for name in sizes.students if not table.has(task, seed, name, *beside.get(name, ()))]
    if not missing:
        return
    lr = rate_of_teachers(pair.lrs, pair, task, sizes, folder)
    uri, trained_s = run_teacher(teacher_spec(pair, task, seed, sizes, folder, lr))
    for name in missing:
        best = teach(pair, task, name, seed, sizes, uri, LESSONS[name])
        student, found = best["student"]
        if name == FROM_ENSEMBLE:
            table.add(task, SINGLE, seed, found["single"], trained_s, lr)
            table.add(task, ENSEMBLE, seed, found["teacher"], trained_s, lr)
            own, alone = best["alone"]
            table.add(task, ALONE, seed, alone["alone"], own.wall_s, own.lr)
        table.add(task, name, seed, found["student"], student.wall_s, student.lr)


@dataclass(frozen=True)
class Tried:
    """A student at one rate."""

    lr: float
    validation_nll: float
    wall_s: float


def teach(
    pair: Pair, task: str, name: str, seed: int, sizes: argparse.Namespace, uri: str, more: dict[str, Any]
) -> dict[str, tuple[Tried, Any]]:
    """Train a student at every rate; return that of the least validation NLL, alone too where it is trained so."""
    from raylora.client import distill_run
    from raylora.store.run_store import RunStore

    best: dict[str, tuple[Tried, Any]] = {}
    for lr in pair.student_lrs:
        started = time.perf_counter()
        found = distill_run(uri, settings_of(pair, task, name, seed, sizes, more, lr), local=True)["contenders"]
        wall_s = time.perf_counter() - started
        for who, end in (("student", ""), ("alone", "-alone")):
            if who in found:
                metrics = RunStore(f"{uri}/{folder_of(pair, name, lr)}{end}").read_json("metrics.json")
                tried = Tried(lr, statistics.fmean(rates.validation(metrics)), wall_s)
                if who not in best or tried.validation_nll < best[who][0].validation_nll:
                    best[who] = tried, found
    return best


def rate_of_teachers(
    tried: Sequence[float], pair: Pair, task: str, sizes: argparse.Namespace, folder: str, full: bool = False
) -> float:
    """Return the rate of a task's teachers: the best for members of other seeds, three at each rate."""
    from raylora.store.run_store import RunStore

    if len(tried) == 1:
        return tried[0]
    content = teacher_spec(pair, task, 0, sizes, folder, tried[0], full)
    content["name"] += "-rates"
    content["ensemble"] = {"seed": 1000, **rates.members_at(tried, 3)}
    uri, _ = run_teacher(content)
    return rates.best_rate(RunStore(uri).read_json("metrics.json"), tried).lr


def train_full(pair: Pair, task: str, seed: int, sizes: argparse.Namespace, folder: str, table: Table) -> None:
    """Train one seed's fully fine-tuned teacher and, for some pairs, its student."""
    from raylora.store.run_store import RunStore

    if table.has(task, seed, FULL, *([FROM_FULL] if pair.students_of_full else [])):
        return
    lr = rate_of_teachers(pair.full_lrs, pair, task, sizes, folder, full=True)
    uri, trained_s = run_teacher(teacher_spec(pair, task, seed, sizes, folder, lr, full=True))
    if not pair.students_of_full:
        metrics = RunStore(uri).read_json("metrics.json")
        trained = metrics["parameters"]["per_member_trainable"]
        counts = {"parameters": trained, "trainable_parameters": trained}
        table.add(task, FULL, seed, {**metrics["ensemble"], **counts}, trained_s, lr)
        return
    student, found = teach(pair, task, FROM_FULL, seed, sizes, uri, {"loss": {"kind": "kl"}})["student"]
    table.add(task, FULL, seed, found["teacher"], trained_s, lr)
    table.add(task, FROM_FULL, seed, found["student"], student.wall_s, student.lr)


def run_teacher(spec: dict[str, Any]) -> tuple[str, float]:
    """Train a teacher, unless a kept folder holds it already; return where it is, and the seconds it took."""
    from raylora.engine.run.local_driver import run_in_process
    from raylora.engine.run.plan_run import prepare
    from raylora.spec import build_spec

    started = time.perf_counter()
    prepared = prepare(build_spec(spec))
    run_in_process(prepared)
    return prepared.store.uri, time.perf_counter() - started


def measure_costs(pair: Pair, task: str, sizes: argparse.Namespace, folder: str, table: Table) -> None:
    """Measure memory and speed of every contender of seed 0, all in one go."""
    from raylora.engine.distillation.costs import Contender, measure
    from raylora.engine.run.roster import read_roster
    from raylora.store.run_store import RunStore

    taught, full = (f"{folder}/{task}-{kind}-0" for kind in ("lora", "full"))
    lr = pair.student_lrs[0]  # a student takes as long at every rate
    places = {ENSEMBLE: taught, ALONE: f"{taught}/{folder_of(pair, FROM_ENSEMBLE, lr)}-alone"}
    places |= {name: f"{taught}/{folder_of(pair, name, lr)}" for name in LESSONS if table.has(task, 0, name)}
    places |= {FULL: full} if table.has(task, 0, FULL) else {}
    places |= {FROM_FULL: f"{full}/{folder_of(pair, FROM_FULL, lr)}"} if table.has(task, 0, FROM_FULL) else {}
    contenders = [Contender(name, uri, tuple(read_roster(RunStore(uri)).members())) for name, uri in places.items()]
    contenders.append(Contender(SINGLE, taught, contenders[0].members[:1]))
    for name, costs in measure(contenders)[0].items():
        table.add_costs(task, name, costs)


def plot(rows: list[dict[str, Any]], result: str) -> None:
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
                taught = "student" in row["contender"]
                axis.errorbar(factor * row[key], height, xerr=factor * row[f"{key}_se"], marker="o", capsize=3,
                              linestyle="none", color="tab:orange" if taught else "tab:blue")
            axis.set_yticks(range(len(chosen)), [row["contender"] for row in chosen] if axis is grid[line][0] else [])
            axis.set_ylim(-0.6, len(chosen) - 0.4)
            axis.set_title(f"{task}: test {name}, mean ± s.e.", fontsize=10)
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(record.RESULTS / f"{result}.png", dpi=130)


def main() -> None:
    """Measure every cell and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", choices=list(PAIRS), default="mpnet")
    parser.add_argument("--members", type=int, help="of each teacher, in place of the pair's own number")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="by default all of the pair")
    parser.add_argument("--students", nargs="+", choices=list(LESSONS), default=list(LESSONS), help="of the ensembles")
    parser.add_argument("--train-rows", type=int, default=10**9, help="at most this many; for a quick look")
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--no-costs", action="store_true", help="measure no memory and no speed")
    parser.add_argument("--no-full", action="store_true", help="leave the fully fine-tuned teacher out")
    parser.add_argument("--go-on", action="store_true", help="keep what the result holds already")
    parser.add_argument("--keep", help="a folder for the runs, which are thrown away otherwise")
    sizes = parser.parse_args()
    pair = PAIRS[sizes.pair]
    tasks = sizes.tasks or list(pair.plans)
    table = Table(sizes.pair, sizes.members, sizes.go_on)
    with tempfile.TemporaryDirectory() as temporary:
        folder = sizes.keep or temporary
        for seed in sizes.seeds:
            for task in tasks:
                train(pair, task, seed, sizes, folder, table)
                if not sizes.no_full:
                    train_full(pair, task, seed, sizes, folder, table)
        if not sizes.no_costs:
            for task in tasks:
                measure_costs(pair, task, sizes, folder, table)
    plot(rows_of(table.cells()), table.result)
    print(table.path)


if __name__ == "__main__":
    main()
