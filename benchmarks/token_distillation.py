"""What a language model's student keeps of its ensemble, and what targets of the top k tokens cost (``topk_kl``).

    python -m benchmarks.token_distillation

The teacher is an ensemble of LoRA members on SmolLM2-135M; the student has the first 8 and the last 7 of its 30 layers
and LoRA of a higher rank. Every seed trains a teacher and its students anew, on news texts in blocks of 128 tokens.
The first seed tries all rates, for the student without a teacher and for the one with the middle k, and keeps by
validation NLL what the others then use. Costs are measured last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

TEACHER, SINGLE, ALONE = "teacher: ensemble of 2", "its member 0", "student, no teacher"
MEMBERS, LENGTH, SHARD_ROWS = 2, 128, 8
RATES = (1e-3, 3e-3, 1e-2)
_BASE = {"dtype": "bfloat16", "quantization": "none"}
_MODULE = "benchmarks.token_distillation"


def teacher_spec(seed: int, sizes: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return the spec of a teacher, as plain data."""
    return {
        "name": f"teacher-{seed}", "storage_path": folder,
        "base": {"source": "pypi:smollm2-135m", **_BASE},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16, "target_modules": "all-linear"},
        "task": {"kind": "language_modeling", "max_length": LENGTH},
        "data": {
            "train": {"source": "pypi:bbc-news"}, "train_rows": sizes.train_rows, "validation_rows": 4,
            "test_rows": sizes.test_rows,
        },
        "ensemble": {"members": MEMBERS, "seed": 100 * seed},
        "optimization": {"lr": 5e-4, "epochs": 1, "micro_batch": 4, "clip_norm": 1.0},
        "evaluation": {"bootstrap_samples": 0, "batch": 8},
        "placement": {"workers": 1, "cpus_per_worker": 1},
    }


def finished(spec: Any) -> tuple[str, dict[str, Any]]:
    """Return where a run lies and its metrics; it is carried out unless that was done before."""
    from raylora.engine.distillation.plan import is_finished
    from raylora.engine.run.local_driver import run_in_process
    from raylora.engine.run.plan_run import prepare
    from raylora.store.run_store import RunStore

    store = RunStore.for_spec(spec)
    return store.uri, store.read_json("metrics.json") if is_finished(store) else run_in_process(prepare(spec))


def train_student(run: str, seed: int, lr: float, sizes: argparse.Namespace, k: int | None) -> dict[str, Any]:
    """Train a student on the top k, or without a teacher, and return its metrics, where it lies, and its targets."""
    from raylora.engine.distillation.plan import prepare_distillation
    from raylora.engine.run.local_driver import run_in_process
    from raylora.spec import DistillSpec

    work = prepare_distillation(run, DistillSpec.model_validate({
        "name": f"k{k or 0}-lr{1e4 * lr:g}", "loss": {"kind": "topk_kl", "top_k": k or 1}, "costs": False,
        "student": {
            "base": {"source": "pypi:smollm2-135m-half", **_BASE}, "seed": 100 * seed,
            "adapter": {"kind": "lora", "rank": 64, "alpha": 64, "target_modules": "all-linear"},
            "optimization": {"lr": lr, "epochs": sizes.epochs, "micro_batch": 2, "clip_norm": 1.0},
        },
    }))
    if k is not None and not work.targets.is_done:
        run_in_process(work.targets)
    spec = work.student if k is not None else work.alone
    assert spec is not None
    uri, metrics = finished(spec)
    return {"metrics": metrics, "uri": uri, "targets": work.targets.store.read_json("targets.json")}


def cells_of(found: dict[str, Any], lr: float, epochs: float) -> dict[str, Any]:
    """Return what a student's cell holds beside its scores."""
    metrics, targets = found["metrics"], found["targets"]
    counts = metrics["parameters"]
    cell = {
        "lr": lr, "epoch_s": metrics["timing"]["train_s"] / epochs,
        "parameters": counts["base"] + counts["per_member_trainable"], "trained": counts["per_member_trainable"],
    }
    if targets is not None:
        cell |= {"targets_s": targets["made_s"], "bytes_per_token": targets["size_bytes"] / targets["positions"]}
    return cell


class Table:
    """One cell per contender and seed; everything is written after each."""

    def __init__(self) -> None:
        self.cells: dict[str, list[dict[str, Any]]] = {}
        self.more: dict[str, Any] = {}
        self.path: Path | None = None

    def add(self, name: str, seed: int, found: dict[str, Any], **more: Any) -> None:
        """Take one contender of one seed and say it."""
        cell = {"seed": seed, **{key: found["eval"]["test"][key] for key in ("nll", "perplexity")}, **more}
        self.cells.setdefault(name, []).append(cell)
        said = "  ".join(f"{key} {value:.4g}" for key, value in cell.items() if key != "seed")
        print(f"seed {seed}  {name:24s} {said}", flush=True)
        self.write()

    def write(self) -> None:
        """Write the results so far."""
        self.path = record.write("token_distillation", self.rows(), self.summary(), _MODULE, command_of(sys.argv[1:]))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per contender: means over seeds, and what each seed gave."""
        rows = []
        for name, cells in self.cells.items():
            means = {key: statistics.fmean(cell[key] for cell in cells) for key in cells[0] if key != "seed"}
            rows.append({"contender": name, "seeds": len(cells), **means, "per_seed": cells})
        return rows

    def summary(self) -> dict[str, Any]:
        """Return what the teacher is worth, seed by seed, beside what was measured once."""
        alone = [cell["nll"] for cell in self.cells.get(ALONE, [])]
        gains = {
            name: [a - cell["nll"] for a, cell in zip(alone, cells, strict=False)]
            for name, cells in self.cells.items() if name.startswith("student, k")
        }
        return {"nll_below_the_student_without_a_teacher": gains, **self.more}


def measure(seed: int, sizes: argparse.Namespace, folder: str, table: Table, rates: dict[str, float]) -> dict[str, str]:
    """Train one seed's teacher and students; return the runs by contender. The first seed fills in ``rates``."""
    from raylora.spec import build_spec

    run, metrics = finished(build_spec(teacher_spec(seed, sizes, folder)))
    counts = metrics["parameters"]
    own = counts["per_member_trainable"]
    epoch_s = metrics["timing"]["train_s"]
    for name, found, members in ((TEACHER, metrics["ensemble"], MEMBERS), (SINGLE, metrics["members"][0], 1)):
        parameters = {"parameters": counts["base"] + members * own, "trained": members * own}
        table.add(name, seed, found, lr=5e-4, epoch_s=epoch_s * members / MEMBERS, **parameters)
    uris = {TEACHER: run}
    middle = sizes.k[len(sizes.k) // 2]
    for k in (None, middle, *(k for k in sizes.k if k != middle)):
        name = ALONE if k is None else f"student, k = {k}"
        kind = "alone" if k is None else "taught"
        tried = {}
        for lr in [rates[kind]] if kind in rates else sizes.lr:
            tried[lr] = train_student(run, seed, lr, sizes, k)
            nll = tried[lr]["metrics"]["training"]["member-000"][-1]["validation_nll"]
            tried[lr]["validation_nll"] = nll
            print(f"seed {seed}  {name:24s} lr {lr:g}: validation NLL {nll:.4f}", flush=True)
        rates[kind] = min(tried, key=lambda lr: tried[lr]["validation_nll"])
        if len(tried) > 1:
            table.more.setdefault("validation_nll_by_rate", {})[kind] = {
                str(lr): one["validation_nll"] for lr, one in tried.items()
            }
        best = tried[rates[kind]]
        table.add(name, seed, best["metrics"]["ensemble"], **cells_of(best, rates[kind], sizes.epochs))
        uris[name] = best["uri"]
    return uris


def command_of(arguments: Sequence[str]) -> str:
    """Return what measures all this in one go: where the runs were kept meanwhile says nothing of the result."""
    said = list(arguments)
    if "--folder" in said:
        at = said.index("--folder")
        del said[at : at + 2]
    return " ".join(["python", "-m", _MODULE, *said])


def memory_of_targets(run: str, rows: int, k: int) -> dict[str, Any]:
    """Return how much a fresh process grows while it makes and checks the targets of so many blocks of text."""
    done = subprocess.run(
        [sys.executable, "-m", _MODULE, "--grow", run, str(rows), str(k)],
        capture_output=True, text=True, check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def grow(run: str, rows: int, k: int) -> dict[str, Any]:
    """Make targets in this process; growth is counted from the loaded members and one example's targets on."""
    from dataclasses import replace

    from raylora.engine.distillation.target_job import FACTS, TargetJob, TargetSession, shard_names
    from raylora.store.run_store import RunStore

    with tempfile.TemporaryDirectory() as folder:
        spec, store = RunStore(run).read_spec(), RunStore(folder)
        packs = (tuple(f"member-{m:03d}" for m in range(MEMBERS)),)
        session = TargetSession(spec, store, 1, 0, TargetJob(run, "memory", packs, None, (k, 1.0), SHARD_ROWS))
        session.load()
        first = session.examples
        session.examples = [replace(first[n % len(first)], id=f"row-{n}") for n in range(rows)]
        session.content_of = {example.id: example.id for example in session.examples}
        warm = session._tokens("one", session.examples[:1], lambda done, of: None)
        RunStore(f"{folder}/warm").commit_result("shards/one", warm)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of loading, is forgotten
        before = _status("VmRSS")
        names = shard_names(rows, SHARD_ROWS)
        store.write_json(FACTS, {"rows": rows})
        for name in names:
            session.run_job(name, [name], lambda progress: None, lambda: 0)
        facts = session.aggregate(names, 0.0)
        peak = _status("VmHWM")
    return {"rows": rows, "k": k, "targets_bytes": facts["size_bytes"], "loaded_bytes": before, "peak_bytes": peak}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def costs(uris: dict[str, str], k: int) -> dict[str, Any]:
    """Return latency, throughput and peak memory of the first seed's teacher, member and student."""
    from raylora.engine.distillation.costs import Contender
    from raylora.engine.distillation.costs import measure as measured

    names = tuple(f"member-{m:03d}" for m in range(MEMBERS))
    return measured([
        Contender(TEACHER, uris[TEACHER], names), Contender(SINGLE, uris[TEACHER], names[:1]),
        Contender("student", uris[f"student, k = {k}"], names[:1]),
    ])


def plot(rows: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    """Draw test NLL, what a byte per token buys, and the memory that making targets takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (scores, sizes, peaks) = plt.subplots(1, 3, figsize=(14, 3.6), width_ratios=[1.4, 1, 1])
    for height, row in enumerate(rows[::-1]):
        color = "tab:orange" if row["contender"].startswith("student") else "tab:blue"
        seeds = [cell["nll"] for cell in row["per_seed"]]
        scores.plot(seeds, [height] * len(seeds), "o", color=color, alpha=0.45)
        scores.plot(row["nll"], height, "|", color=color, markersize=18)
        scores.annotate(f"{row['nll']:.3f}", (row["nll"], height), (0, 9), textcoords="offset points", ha="center",
                        fontsize=8)
    scores.set_yticks(range(len(rows)), [f"{row['contender']} (seeds: {row['seeds']})" for row in rows[::-1]])
    scores.set_ylim(-0.6, len(rows) - 0.3)
    scores.set_title("test NLL (nats per token): seeds and mean", fontsize=10)
    alone = [cell["nll"] for row in rows if row["contender"] == ALONE for cell in row["per_seed"]]
    taught = sorted((row for row in rows if "bytes_per_token" in row), key=lambda row: row["bytes_per_token"])
    for row in taught:
        gains = [a - cell["nll"] for a, cell in zip(alone, row["per_seed"], strict=False)]
        sizes.plot([row["bytes_per_token"]] * len(gains), gains, "o", color="tab:orange", alpha=0.45)
    sizes.axhline(0, color="tab:gray", linestyle="--", linewidth=1)
    sizes.set_xscale("log")
    sizes.set_xticks([row["bytes_per_token"] for row in taught],
                     [f"{row['bytes_per_token']:.0f}\n{row['contender'].partition(', ')[2]}" for row in taught])
    sizes.minorticks_off()
    sizes.set_xlabel("bytes per token")
    sizes.set_title("NLL below the student without a teacher", fontsize=10)
    for one in memory:
        name = f"{one['rows']}\n({one['targets_bytes'] / 2**20:.1f} MiB written)"
        peaks.bar(name, (one["peak_bytes"] - one["loaded_bytes"]) / 2**20, color="tab:green", width=0.5)
    peaks.set_xlabel("blocks of text taught")
    peaks.set_title("growth of the process meanwhile (MiB)", fontsize=10)
    for axis in (scores, sizes, peaks):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(record.RESULTS / "token_distillation.png", dpi=130)


def main() -> None:
    """Measure every cell and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--k", type=int, nargs="+", default=[8, 32, 128], help="tokens kept; the middle tries rates")
    parser.add_argument("--lr", type=float, nargs="+", default=list(RATES), help="rates that students try")
    parser.add_argument("--epochs", type=float, default=2, help="of the students")
    parser.add_argument("--train-rows", type=int, default=12, help="texts, of three or four blocks each")
    parser.add_argument("--test-rows", type=int, default=8)
    parser.add_argument("--memory-rows", type=int, nargs="*", default=[16, 32], help="blocks to make targets of")
    parser.add_argument("--no-costs", action="store_true", help="measure no latency and no memory of prediction")
    parser.add_argument("--folder", help="keep the runs there; called again, what is finished is not done again")
    parser.add_argument("--grow", nargs=3, help=argparse.SUPPRESS)
    sizes = parser.parse_args()
    if sizes.grow:
        run, rows, k = sizes.grow
        print(json.dumps(grow(run, int(rows), int(k))))
        return
    table = Table()
    rates: dict[str, float] = {}
    first: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = sizes.folder or temporary
        for seed in range(sizes.seeds):
            uris = measure(seed, sizes, folder, table, rates)
            first = first or uris
        memory = [memory_of_targets(first[TEACHER], rows, max(sizes.k)) for rows in sizes.memory_rows]
        table.more["memory_of_targets"] = memory
        table.write()
        plot(table.rows(), memory)
        if not sizes.no_costs:
            table.more["costs"] = costs(first, sizes.k[len(sizes.k) // 2])
            table.write()
    print(table.path)


if __name__ == "__main__":
    main()
