"""What a trainable parameter buys: LoRA, MoS and its ablations, PRoLoRA and VB-LoRA on three tasks.

    python -m benchmarks.parameter_efficiency

Every contender has three learning rates with several seeds at each, as the members of one run on the same rows of real
text with the same schedule. The validation rows choose its rate; the table holds the test rows at that one alone, as
mean and standard error over seeds and as the ensemble of them. All linear layers of a 4-bit MiniLM-L6 are
adapted, with dropout 0.1 as in the paper of MoS. The head is trained by everyone and left out of the count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import record
from benchmarks.rates import best_rate, mean_and_error, members_at

NAME = "parameter_efficiency"
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
_TOPICS = ["business", "entertainment", "politics", "sports", "tech"]
TASKS: dict[str, dict[str, Any]] = {
    "movie-reviews": {"labels": ["negative", "positive"], "train_rows": 1000, "epochs": 2},
    "bbc-news": {"labels": _TOPICS, "train_rows": 400, "epochs": 5},
    "sarcasm-headlines": {"labels": ["earnest", "satire"], "train_rows": 1000, "epochs": 2},
}
RATES = (5e-4, 1e-3, 3e-3)
RATES_OF = {"VB-LoRA": (3e-3, 1e-2, 3e-2)}
"""VB-LoRA chooses its vectors by logits that move little at a LoRA's rates: its paper trains them at 1e-2."""
DROPOUT = 0.1
METRICS = ("accuracy", "nll", "ece")
_LAYERS = 6
_MOS = {"kind": "mos", "equivalent_rank": 2, "alpha": 16}
CONTENDERS: dict[str, dict[str, Any]] = {
    "LoRA, r 2": {"kind": "lora", "rank": 2, "alpha": 16},
    "LoRA, r 16 (8x)": {"kind": "lora", "rank": 16, "alpha": 16},
    "MoS": {**_MOS, "rank": 6, "private_rank": 1, "shards": 2},
    "pure sharing": {**_MOS, "rank": 2 * _LAYERS, "private_rank": 0, "shards": 1, "pair_dissociation": False},
    "+ subset selection": {**_MOS, "rank": 6, "private_rank": 0, "shards": 1, "pair_dissociation": False},
    "MoS - dissociation": {**_MOS, "rank": 6, "private_rank": 1, "shards": 2, "pair_dissociation": False},
    "MoS - privatisation": {**_MOS, "rank": 6, "private_rank": 0, "shards": 2},
    "MoS - sharding": {**_MOS, "rank": 6, "private_rank": 1, "shards": 1},
    "PRoLoRA": {"kind": "prolora", "rank": 4, "unshared_rank": 1, "reduction": 3, "alpha": 16},
    "VB-LoRA": {
        "kind": "peft", "method": "VBLORA",
        "options": {"r": 4, "num_vectors": 78, "vector_length": 192, "topk": 2},
    },
}


def content(task: str, contender: str, seeds: int, folder: str) -> dict[str, Any]:
    """Return the spec of one cell, as plain data."""
    chosen, rates = TASKS[task], rates_of(contender)
    adapter = {**CONTENDERS[contender], "target_modules": TARGETS}
    adapter["dropout"] = DROPOUT
    return {
        "name": "".join(c if c.isalnum() else "-" for c in f"{task}-{contender}".lower())[:40].strip("-"),
        "storage_path": folder,
        "base": {"source": "pypi:minilm-l6", "quantization": "nf4"},
        "adapter": adapter,
        "task": {"kind": "classification", "labels": chosen["labels"], "max_length": 40},
        "data": {"train": {"source": f"pypi:{task}"}, "train_rows": chosen["train_rows"], "validation_rows": 200,
                 "test_rows": 1000},
        "ensemble": {**members_at(rates, seeds), "seed": 1},
        "optimization": {"epochs": chosen["epochs"], "micro_batch": 16, "group_by_length": True, "clip_norm": 0.3,
                         "warmup": 0.03},
        "baselines": {"single": False}, "evaluation": {"bootstrap_samples": 0, "batch": 64},
        "placement": {"workers": 1},
    }


def rates_of(contender: str) -> tuple[float, ...]:
    """Return the rates that a contender is tried at, as many for everyone."""
    return RATES_OF.get(contender, RATES)


def measure(task: str, contender: str, seeds: int) -> dict[str, Any]:
    """Train and evaluate one contender on one task and return its row."""
    import raylora
    from raylora.engine.model.checkpoint import load_config
    from raylora.engine.run.local_driver import run_in_process
    from raylora.engine.run.plan_run import prepare
    from raylora.engine.run.speakers import predictions_of
    from raylora.spec import build_spec

    started, rates = time.perf_counter(), rates_of(contender)
    with tempfile.TemporaryDirectory() as folder:
        spec = build_spec(content(task, contender, seeds, folder))
        prepared = prepare(spec)
        metrics = run_in_process(prepared)
        names = [member["name"] for member in metrics["members"]]
        sets = {one.role: one for one in predictions_of(prepared.store, names)}
    best = best_rate(metrics, rates)
    values = {key: best.test(metrics, key) for key in METRICS}
    errors = {key: mean_and_error(found) for key, found in values.items()}
    return {
        "task": task, "contender": contender, "adapter": spec.adapter.model_dump(mode="json"), "seeds": seeds,
        "lr": best.lr, "validation_nll": best.validation_nll,
        # Without the head, which all train.
        "parameters": int(raylora.parameter_count(load_config(spec.base), spec.adapter)),
        "per_seed": values,
        **{key: mean for key, (mean, _) in errors.items()},
        **{f"{key}_se": error for key, (_, error) in errors.items()},
        "ensemble": together(sets["test"], best.members),
        "peak_rss_bytes": max(metrics["memory"]["peak_rss_bytes_per_worker"]),
        "wall_s": time.perf_counter() - started,
    }


def together(predictions: Any, members: Sequence[int]) -> dict[str, Any]:
    """Return the metrics of some members' mean probabilities, and a 95 % interval of their NLL over test rows."""
    from raylora.ensemble.aggregate import mean_probabilities
    from raylora.ensemble.bootstrap import bootstrap_metrics, interval
    from raylora.ensemble.metrics import point_metrics, score_rows

    scores = score_rows(mean_probabilities(predictions.values[list(members)]), predictions.labels())
    drawn = bootstrap_metrics(scores, 15, 1000, 0, ["nll"])
    return {**point_metrics(scores, 15, METRICS), "nll_interval": interval(drawn["nll"], 0.95)}


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw accuracy and NLL against trainable parameters, with standard errors over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    color_of = dict(zip(CONTENDERS, plt.get_cmap("tab10").colors, strict=True))  # one color each in every panel
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, grid = plt.subplots(len(tasks), 2, figsize=(12, 4.4 * len(tasks)), squeeze=False)
    for line, task in enumerate(tasks):
        of_task = {row["contender"]: row for row in rows if row["task"] == task}
        chosen = [of_task[name] for name in CONTENDERS if name in of_task]
        for axis, (key, factor, name) in zip(
            grid[line], (("accuracy", 100.0, "accuracy (%)"), ("nll", 1.0, "NLL (nats)")), strict=True
        ):
            for index, row in enumerate(chosen):
                # Contenders of one budget would lie on each other: they stand side by side, in the table's order.
                shift = 1.0 + 0.035 * (index - len(chosen) / 2)
                axis.errorbar(row["parameters"] * shift, factor * row[key], yerr=factor * row[f"{key}_se"], marker="o",
                              capsize=3, linestyle="none", color=color_of[row["contender"]], label=row["contender"])
            axis.set_xscale("log")
            axis.set_title(task)
            axis.set_xlabel("trainable adapter parameters per member (log; spread sideways to be seen)")
            axis.set_ylabel(f"test {name}, mean ± s.e. over seeds")
            axis.grid(alpha=0.3)
    shown: dict[str, Any] = {}
    for axis in grid.flat:
        shown |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    names = [name for name in CONTENDERS if name in shown]
    figure.legend([shown[name] for name in names], names, loc="upper center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(record.RESULTS / f"{NAME}.png", dpi=130)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return per task what MoS keeps of LoRA with eight times its parameters, and what each part is worth."""
    found: dict[str, Any] = {}
    for task in TASKS:
        by = {row["contender"]: row for row in rows if row["task"] == task and "validation_nll" in row}
        if not {"MoS", "LoRA, r 2", "LoRA, r 16 (8x)"} <= by.keys():
            continue
        mos, small, large = by["MoS"], by["LoRA, r 2"], by["LoRA, r 16 (8x)"]
        error = (mos["nll_se"] ** 2 + large["nll_se"] ** 2) ** 0.5
        # The ensembles: a 95 % bootstrap interval over test rows is 3.92 standard errors wide.
        low, high = large["ensemble"]["nll_interval"]
        apart = mos["ensemble"]["nll"] - large["ensemble"]["nll"]
        found[task] = {
            "parameters_ratio": large["parameters"] / mos["parameters"],
            "nll_mos_minus_lora_8x": mos["nll"] - large["nll"],
            "nll_mos_minus_lora_small": mos["nll"] - small["nll"],
            "standard_error_of_difference_to_8x": error,
            "within_one_standard_error_of_8x": mos["nll"] - large["nll"] <= error,
            "ensemble_nll_mos_minus_lora_8x": apart,
            "standard_error_of_lora_8x_ensemble_nll": (high - low) / 3.92,
            "ensemble_within_one_standard_error_of_8x": apart <= (high - low) / 3.92,
        }
    return found


def main() -> None:
    """Measure every cell and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--go-on", action="store_true", help="keep the cells that the results file holds already")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        task, contender, seeds = arguments.cell
        print(json.dumps(measure(task, contender, int(seeds))))
        return
    path = record.RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text())["rows"] if arguments.go_on else []
    # A row that had one rate only stands until its cell is measured anew, and compares with nothing.
    done = {(row["task"], row["contender"]) for row in rows if "validation_nll" in row}
    for contender in arguments.contenders:
        for task in arguments.tasks:
            if (task, contender) in done:
                continue
            cell = ("--cell", task, contender, str(arguments.seeds))
            row = record.in_own_process(f"benchmarks.{NAME}", *cell)  # so that its peak memory is its own
            rows = [*(o for o in rows if (o["task"], o["contender"]) != (task, contender)), row]
            told = [f"{task:17s} {contender:20s} {row['parameters']:>9,d} parameters, lr {row['lr']:g}"]
            told += [f"{key} {row[key]:.4f} ± {row[key + '_se']:.4f}" for key in ("accuracy", "nll")]
            told += [f"ensemble NLL {row['ensemble']['nll']:.4f}", f"{row['wall_s']:.0f} s"]
            print("  ".join(told), flush=True)
            # After every cell: what is measured is kept if a later one fails.
            record.write(NAME, rows, summarize(rows), f"benchmarks.{NAME}")
    plot([row for row in rows if "validation_nll" in row])
    print(path)


if __name__ == "__main__":
    main()
