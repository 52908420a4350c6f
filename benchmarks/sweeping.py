"""What a sweep costs beside runs of its own and beside PEFT, and whether members that differ make a better ensemble.

    python -m benchmarks.sweeping                        # --part speed, --part ensembles

**Speed.** Eight settings (four rates, two ranks) of LoRA on MiniLM-L6 over nf4: one sweep whose members share a
forward, eight runs of raylora with one member each, and eight trainings with PEFT, which loads base and data once. Each
contender has a process of its own and gives the validation NLL of every setting; counted is the time from the first
line of its work to its last number, and the peak of its memory.

**Ensembles.** On three tasks and with several seeds, what the same sweep is worth: its best member by validation rows,
a deep ensemble of four members that have the best member's settings, and a hyper-deep ensemble (arXiv 2006.13570), the
four that greedy selection takes among the eight that the sweep has trained. The test rows are read once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import record
from benchmarks.distillation import TASKS
from benchmarks.rates import validation

NAME = "sweeping"
VARY: dict[str, list[Any]] = {"optimization.lr": [3e-4, 1e-3, 3e-3, 1e-2], "adapter.rank": [2, 8]}
SIZE = 4
CHOSEN = ("movie-reviews", "tweets", "bbc-news")
METRICS = ("nll", "accuracy", "ece", "brier")
Row = dict[str, Any]


def spec_of(folder: str, name: str, task: str, rows: int, seed: int = 0, test_rows: int = 100) -> Row:
    """Return the spec of one run as plain data."""
    return {
        "name": name, "storage_path": folder,
        "base": {"source": "pypi:minilm-l6", "quantization": "nf4"},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16, "target_modules": ["query", "key", "value"]},
        "task": TASKS[task]["task"],
        "data": {"train": {"source": f"pypi:{task}"}, "train_rows": rows, "validation_rows": 200,
                 "test_rows": test_rows},
        "ensemble": {"members": 1, "seed": 100 * seed},
        "optimization": {"lr": 1e-3, "epochs": 2, "micro_batch": 8, "group_by_length": True},
        "baselines": {"single": False}, "evaluation": {"bootstrap_samples": 200}, "placement": {"workers": 1},
    }


def train(content: Row) -> Row:
    """Train and evaluate a run in this process and return its metrics."""
    from raylora.engine.run.local_driver import run_in_process
    from raylora.engine.run.plan_run import prepare
    from raylora.spec import build_spec

    return dict(run_in_process(prepare(build_spec(content))))


def settings() -> list[Row]:
    """Return what is tried, as the members of a sweep have it."""
    from raylora.spec.vary import varied_settings

    return varied_settings(dict(VARY), range(8))


def varied(content: Row) -> Row:
    """Return a run whose members are the eight settings."""
    return {**content, "ensemble": {**content["ensemble"], "members": 8, "vary": VARY}}


# --- speed ----------------------------------------------------------------------------------------------
def one_sweep(folder: str, rows: int) -> list[float]:
    """Return the validation NLL of each setting, of members that shared a forward."""
    return validation(train(varied(spec_of(folder, "sweep", CHOSEN[0], rows))))


def eight_runs(folder: str, rows: int) -> list[float]:
    """Return the same of eight runs with one member each, one after another in one process."""
    from raylora.spec.vary import with_settings

    found = []
    for number, own in enumerate(settings()):
        content = spec_of(folder, f"alone-{number}", CHOSEN[0], rows)
        content["ensemble"]["seed"] = number  # the seed that the sweep's member has
        found += validation(train(with_settings(content, own)))
    return found


def eight_of_peft(folder: str, rows: int) -> list[float]:
    """Return the same of PEFT: a LoRA model after another on one base, on the rows and schedule of the sweep."""
    import torch
    from peft import LoraConfig, get_peft_model

    from raylora.engine.model.base import frozen_model
    from raylora.engine.run.plan_run import prepare
    from raylora.engine.run.session import TrainingSession
    from raylora.engine.training.member_plan import member_plans_of
    from raylora.engine.training.member_state import lengths_of, order_of
    from raylora.engine.training.schedule import learning_rate_factor, total_steps
    from raylora.spec import build_spec

    spec = build_spec(varied(spec_of(folder, "peft", CHOSEN[0], rows)))
    work = TrainingSession(spec, prepare(spec).store, cpus=torch.get_num_threads(), gpus=0)
    work.load()
    train_rows, found = work.sets.train.examples, []
    total, lengths = total_steps(len(train_rows), spec.optimization), lengths_of(train_rows)

    def loss_of(model: Any, examples: Sequence[Any]) -> Any:
        batch = work.task.collate(examples, work.base.tokenizer)
        return work.task.loss(work.task.scores(model(**batch.model_inputs()).logits, batch), batch)

    for plan in member_plans_of(spec):
        torch.manual_seed(plan.seed)
        model, _ = frozen_model(spec.base, work.task, work.base.device, work.base.dtype)
        rank, targets = plan.adapter.model_dump()["rank"], list(spec.adapter.target_modules)
        config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=16, target_modules=targets)
        peft_model = get_peft_model(model, config)
        trained = [p for p in peft_model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
        order = order_of(plan, lengths, spec.optimization, spec.ensemble)
        for step in range(total):
            for group in optimizer.param_groups:
                group["lr"] = plan.optimization.lr * learning_rate_factor(plan.optimization, step, total)
            loss_of(peft_model, [train_rows[i] for i in order.indices(step)]).mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, plan.optimization.clip_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 in (total // 2, total):  # as raylora does, at every epoch's end
                value = _mean_loss(loss_of, peft_model, work.sets.validation.examples)
        _mean_loss(loss_of, peft_model, work.sets.validation.examples)  # the predictions that a run keeps
        _mean_loss(loss_of, peft_model, work.sets.test.examples)
        found.append(value)
    return found


def _mean_loss(loss_of: Callable[..., Any], model: Any, examples: Sequence[Any]) -> float:
    import torch

    by_length = sorted(examples, key=lambda example: len(example.sequences[0]))
    with torch.no_grad():
        # The base is in evaluation mode all along, as raylora's is: to put it there again would repack its weights.
        parts = [loss_of(model, by_length[i : i + 64]) for i in range(0, len(by_length), 64)]
    return float(torch.cat(parts).mean())


CONTENDERS: dict[str, Callable[[str, int], list[float]]] = {
    "one sweep": one_sweep, "eight runs": eight_runs, "eight trainings with PEFT": eight_of_peft,
}


def timed(who: str, rows: int) -> Row:
    """Return a contender's time, peak memory and results; this is its process."""
    from raylora.engine.model.machine import peak_memory_bytes

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        values = CONTENDERS[who](folder, rows)
        seconds = time.perf_counter() - started
    return {"part": "speed", "who": who, "rows": rows, "s": seconds, "peak_bytes": peak_memory_bytes(),
            "validation_nll": values}


# --- ensembles ------------------------------------------------------------------------------------------
def ensembles(folder: str, task: str, seed: int, rows: int, test_rows: int) -> list[Row]:
    """Return what the best member, the deep and the hyper-deep ensemble of one task and seed are worth."""
    common = {"task": task, "rows": rows, "test_rows": test_rows}
    content = varied(spec_of(folder, f"{task}-{seed}", task, rows, seed, test_rows))
    content["ensemble"]["select"] = {"method": "greedy", "size": SIZE}
    metrics = train(content)
    values = validation(metrics)
    best = values.index(min(values))
    own = settings()[best]
    deep = spec_of(folder, f"{task}-{seed}-deep", task, rows, seed + 50, test_rows)
    deep["ensemble"] |= {"members": SIZE, "vary": [own] * SIZE}
    voices = {
        "best member": metrics["members"][best], "deep ensemble": train(deep)["ensemble"],
        "hyper-deep ensemble": metrics["weighted"]["selected"], "all eight": metrics["ensemble"],
    }
    trainings = {"best member": 8, "deep ensemble": 8 + SIZE, "hyper-deep ensemble": 8, "all eight": 8}
    return [
        {"part": "ensembles", **common, "seed": seed, "who": who, "settings": own, "trainings": trainings[who],
         **{key: voice["eval"]["test"][key] for key in METRICS}}
        for who, voice in voices.items()
    ]


def summary_of(rows: Sequence[Row]) -> Row:
    """Return the times beside the sweep's, and of each ensemble mean and standard error over seeds."""
    speed = {row["who"]: row for row in rows if row["part"] == "speed"}
    found: Row = {"speed": {}, "ensembles": {}}
    if "one sweep" in speed:
        base = speed["one sweep"]
        for who, row in speed.items():
            found["speed"][who] = {
                "s": row["s"], "over_the_sweep": row["s"] / base["s"], "peak_bytes": row["peak_bytes"],
                "least_nll": min(row["validation_nll"]),
            }
    of_cell: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["part"] == "ensembles":
            of_cell.setdefault((row["task"], row["who"]), []).append(row)
    for (task, who), own in of_cell.items():
        found["ensembles"].setdefault(task, {})[who] = {key: _mean([row[key] for row in own]) for key in METRICS}
    for task, cell in found["ensembles"].items():
        gains = [
            deep["nll"] - hyper["nll"]
            for deep, hyper in zip(of_cell[task, "deep ensemble"], of_cell[task, "hyper-deep ensemble"], strict=True)
        ]
        cell["deep minus hyper-deep, NLL"] = _mean(gains)
    return found


def _mean(values: Sequence[float]) -> Row:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "se": error, "seeds": len(values)}


def draw(summary: Mapping[str, Any]) -> None:
    """Draw the times, and the NLL of each ensemble on each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = summary["ensembles"]
    figure, axes = plt.subplots(1, 1 + len(tasks), figsize=(4 + 3.2 * len(tasks), 3), squeeze=False)
    speed = summary["speed"]
    axes[0][0].barh(list(speed), [one["s"] for one in speed.values()], color="#228833")
    for place, one in enumerate(speed.values()):
        axes[0][0].text(one["s"], place, f" {one['over_the_sweep']:.2f}x", va="center", fontsize=8)
    axes[0][0].set_xlabel("seconds for eight settings", fontsize=9)
    axes[0][0].margins(x=0.15)
    for axis, (task, cell) in zip(axes[0][1:], tasks.items(), strict=True):
        shown = {who: one for who, one in cell.items() if "minus" not in who}
        axis.errorbar([one["nll"]["mean"] for one in shown.values()], list(shown), fmt="o", capsize=3,
                      xerr=[one["nll"]["se"] or 0 for one in shown.values()], color="#4477aa")
        axis.set_xlabel("test NLL", fontsize=9)
        axis.set_title(task, fontsize=10)
        axis.margins(y=0.15)
    for axis in axes[0]:
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(record.RESULTS / f"{NAME}.png", dpi=130)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["speed", "ensembles", "all"], default="all")
    parser.add_argument("--rows", type=int, default=240, help="that every training sees, twice")
    parser.add_argument("--test-rows", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(CHOSEN))
    parser.add_argument("--go-on", action="store_true", help="keep the part that is not measured now")
    parser.add_argument("--who", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.who:
        print(json.dumps(timed(arguments.who, arguments.rows)))
        return
    path = record.RESULTS / f"{NAME}.json"
    before: list[Row] = json.loads(path.read_text())["rows"] if arguments.go_on and path.exists() else []
    rows = [row for row in before if arguments.part not in (row["part"], "all")]

    def keep(own: Sequence[Row]) -> None:
        rows.extend(own)
        print(json.dumps(own), flush=True)
        record.write(NAME, rows, summary_of(rows), f"benchmarks.{NAME}")

    if arguments.part != "ensembles":
        for who in CONTENDERS:
            keep([record.in_own_process(f"benchmarks.{NAME}", "--who", who, "--rows", str(arguments.rows))])
    if arguments.part != "speed":
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(arguments.seeds):
                for task in arguments.tasks:
                    keep(ensembles(folder, task, seed, arguments.rows, arguments.test_rows))
    draw(summary_of(rows))
    print(path)


if __name__ == "__main__":
    main()
