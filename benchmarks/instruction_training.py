"""Instruction tuning: how fast chats are trained on, and what answers cost afterwards.

    python -m benchmarks.instruction_training            # --part speed, --part answers, --go-on

**Speed.** K = 4 members of SmolLM2-135M (nf4) on ToMi's chats: in one forward, with short rows packed into shared
sequences, with blocks run again in the backward pass, and PEFT's LoRA models one after another in a plain loop over the
same rows and the same quantized base. Steps are interleaved; peak memory is that of a process of its own.

**Answers.** The NLL of reference answers, per token and of whole answers, on ToMi and on job titles: the untuned
base, one LoRA, an ensemble of four, and an ensemble of MoS members with an eighth of the parameters, over nf4 and over
a 3-bit base with a CLoQ pair. Every contender has the same three learning rates; the mean member's NLL on the
validation rows picks one, with the first seed, and the test rows are read once per seed. One LoRA is the first member
of its ensemble.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.packing import stepper

NAME = "instruction_training"
MEMBERS, ROUNDS = 4, 5
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASES: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": "nf4"},
    "CLoQ, 3 bits": {
        "quantization": {"kind": "optq", "bits": 3, "group_size": 64}, "compensation": {"kind": "cloq", "rank": 16},
        "calibration": {"source": "pypi:bbc-news", "samples": 32, "length": 256, "held_out": 4},
    },
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"kind": "lora", "rank": 16, "alpha": 16, "target_modules": _TARGETS},
    "MoS": {"kind": "mos", "equivalent_rank": 2, "rank": 8, "private_rank": 1, "shards": 4, "alpha": 16,
            "target_modules": _TARGETS},
}
TASKS: dict[str, dict[str, Any]] = {
    "tomi": {
        "train": {"source": "pypi:tomi"}, "validation": {"source": "pypi:tomi-validation", "rows": 32},
        "test": {"source": "pypi:tomi-test", "rows": 80}, "train_rows": 120,
    },
    "soc-codes": {"train": {"source": "pypi:soc-codes"}, "train_rows": 120, "validation_rows": 32, "test_rows": 80},
}
RATES, SEEDS = (3e-4, 1e-3, 3e-3), (0, 1, 2)


def spec_of(
    folder: str, task: str, base: str, adapter: str, lr: float = 1e-3, seed: int = 0, **optimization: Any
) -> dict[str, Any]:
    """Return the spec of one run as plain data."""
    name = "".join(c if c.isalnum() else "-" for c in f"{task}-{base}-{adapter}-{lr:g}-{seed}".lower())
    return {
        "name": name.replace("--", "-")[:40].strip("-"), "storage_path": folder,
        "base": {"source": "pypi:smollm2-135m", **BASES[base]}, "adapter": ADAPTERS[adapter],
        "task": {"kind": "instruction", "max_length": 256, "on_too_long": "truncate_prompt"}, "data": TASKS[task],
        "ensemble": {"members": MEMBERS, "seed": 100 * seed},
        "optimization": {"lr": lr, "epochs": 1, "micro_batch": 4, "group_by_length": True, **optimization},
        "evaluation": {"bootstrap_samples": 200, "batch": 32}, "placement": {"workers": 1},
    }


# --- speed ----------------------------------------------------------------------------------------------
WAYS: dict[str, dict[str, Any]] = {
    "packed": {}, "packed, rows packed": {"pack_rows": True}, "packed, blocks run again": {"recompute": True},
}


class Cell:
    """A loaded base, and what trains on it in one way."""

    def __init__(self, folder: str, recompute: bool = False, **optimization: Any) -> None:
        from raylora.engine.run.plan_run import prepare
        from raylora.engine.run.session import TrainingSession
        from raylora.spec import build_spec

        content = spec_of(tempfile.mkdtemp(dir=folder), "tomi", "nf4", "LoRA", steps=1000, epochs=None, micro_batch=8,
                          **optimization)
        content["optimization"] = {k: v for k, v in content["optimization"].items() if v is not None}
        content["placement"]["recompute"] = recompute
        prepared = prepare(build_spec(content))
        self.spec = prepared.spec
        self.session = TrainingSession(self.spec, prepared.store, cpus=2, gpus=0)
        self.session.load()

    def trainer(self) -> Any:
        """Return the trainer of all members together."""
        from raylora import registry
        from raylora.engine.model.packed_model import PackedModel
        from raylora.engine.training.trainer import PackTrainer, TrainingSettings

        adapter = registry.load("adapter", "lora").build(self.spec.adapter)
        model = PackedModel(self.session.base, adapter, self.session.task)
        return PackTrainer(model, TrainingSettings.of(self.spec), list(self.session.plans.values()),
                           self.session.sets.train.examples, [])

    def step(self) -> Callable[[int], object]:
        """Return a function that takes the step of a given number with all members."""
        return stepper([self.trainer()])

    def peft_step(self) -> Callable[[int], object]:
        """Return a function that takes one step of each member with PEFT, on the same rows."""
        import torch
        from peft import LoraConfig, get_peft_model

        from raylora.engine.model.base import frozen_model

        work, members = self.session, []
        for state in self.trainer().states:
            torch.manual_seed(state.plan.seed)
            model, _ = frozen_model(self.spec.base, work.task, work.base.device, work.base.dtype)
            config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules=_TARGETS)
            peft_model = get_peft_model(model, config)
            trained = [p for p in peft_model.parameters() if p.requires_grad]
            members.append((peft_model, trained, torch.optim.AdamW(trained, lr=1e-3), state.order))

        def step(number: int) -> None:
            for model, trained, optimizer, order in members:
                examples = [work.sets.train.examples[i] for i in order.indices(number)]
                batch = work.task.collate(examples, work.base.tokenizer)
                logits = model(**batch.model_inputs(), use_cache=False).logits
                work.task.loss(work.task.scores(logits, batch), batch).mean().backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()

        return step

    def tokens(self, rounds: int) -> float:
        """Return how many tokens of text all members read in a step, on the mean of some steps."""
        examples = self.session.sets.train.examples
        orders = [state.order for state in self.trainer().states]
        per_step = [sum(len(examples[i].sequences[0]) for order in orders for i in order.indices(n))
                    for n in range(rounds)]
        return statistics.fmean(per_step)


def speed(folder: str) -> list[dict[str, Any]]:
    """Return a row per way, PEFT's last."""
    cells = {way: Cell(folder, **settings) for way, settings in WAYS.items()}
    contenders = {way: cell.step() for way, cell in cells.items()}
    contenders["PEFT, one by one"] = cells["packed"].peft_step()
    times = record.interleaved(contenders, ROUNDS)
    tokens = cells["packed"].tokens(ROUNDS)
    rows = []
    for way, seconds in times.items():
        rows.append({
            "part": "speed", "way": way, "members": MEMBERS, "micro_batch": 8, "step_s": statistics.median(seconds),
            "step_s_all": seconds, "tokens_per_s": tokens / statistics.median(seconds),
            "peft_over_this": record.ratio(times["PEFT, one by one"], seconds),
        })
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_memory(rows: list[dict[str, Any]], keep: Callable[[], None]) -> None:
    """Add to each way's row what a process of its own takes."""
    for row in rows:
        if row["part"] == "speed":
            row["peak_rss_bytes"] = record.in_own_process("benchmarks.instruction_training", "--peak-of", row["way"])
            print(row["way"], row["peak_rss_bytes"], flush=True)
            keep()


def peak_of(way: str) -> int:
    """Return the peak resident bytes of this process after three steps in one way."""
    with tempfile.TemporaryDirectory() as folder:
        cell = Cell(folder, **WAYS.get(way, {}))
        step = cell.step() if way in WAYS else cell.peft_step()
        for number in range(3):
            step(number)
    # Not getrusage's: that begins with the peak of the process that started this one.
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


# --- answers --------------------------------------------------------------------------------------------
def untuned(folder: str, task: str, base: str) -> dict[str, Any]:
    """Return what the base says of the test's answers before anything is learned."""
    from raylora import registry
    from raylora.adapters.packed import stack
    from raylora.engine.model.base import head_tensors
    from raylora.engine.model.member_tensors import initial_member
    from raylora.engine.model.packed_model import PackedModel
    from raylora.engine.quantization.quantize_base import ensure_prepared
    from raylora.engine.run.plan_run import prepare
    from raylora.engine.run.session import TrainingSession
    from raylora.engine.training.distillation_loss import task_of
    from raylora.engine.training.predict import predict
    from raylora.ensemble.outputs.tokens import text_nlls
    from raylora.spec import build_spec

    prepared = prepare(build_spec(spec_of(folder, task, base, "LoRA", seed=99)))
    if prepared.base is not None:
        import torch

        ensure_prepared(prepared.spec.base, task_of(prepared.spec), prepared.base, torch.device("cpu"))
    prepared.begin()
    session = TrainingSession(prepared.spec, prepared.store, cpus=2, gpus=0)
    session.load()
    adapter = registry.load("adapter", "lora").build(prepared.spec.adapter)
    plan = next(iter(session.plans.values()))
    member = initial_member(session.base, adapter, head_tensors(session.base), plan.stream("init"))
    model = PackedModel(session.base, adapter, session.task)
    values, ids = predict(model, stack([member]), session.sets.test.examples, 32)
    return {
        "part": "answers", "task": task, "base": base, "adapter": "none", "lr": None, "seed": None,
        "single": {"nll": -float(values.double().mean()), "sequencewise_nll": float(text_nlls(values, ids)[1].mean())},
    }


def trained(folder: str, task: str, base: str, adapter: str, lr: float, seed: int) -> dict[str, Any]:
    """Train and evaluate one ensemble and return its row."""
    from raylora.engine.run.local_driver import run_in_process
    from raylora.engine.run.plan_run import prepare
    from raylora.spec import build_spec

    started = time.perf_counter()
    metrics = run_in_process(prepare(build_spec(spec_of(folder, task, base, adapter, lr, seed))))
    last = [
        [row["validation_nll"] for row in metrics["training"][f"member-{m:03d}"] if "validation_nll" in row][-1]
        for m in range(MEMBERS)
    ]
    keys = ("nll", "tokenwise_nll", "sequencewise_nll")
    found = metrics["ensemble"]["eval"]["test"]
    return {
        "part": "answers", "task": task, "base": base, "adapter": adapter, "lr": lr, "seed": seed,
        "validation_nll": statistics.fmean(last), "ensemble": {key: found[key] for key in keys},
        "intervals": found["intervals"], "single": {key: metrics["members"][0]["eval"]["test"][key] for key in keys},
        "mean_member": {key: metrics["mean_member"]["eval"]["test"][key]["mean"] for key in keys},
        "wall_s": time.perf_counter() - started,
    }


def answers(
    folder: str, tasks: list[str], bases: list[str], rows: list[dict[str, Any]], keep: Callable[[], None]
) -> None:
    """Measure what is missing among the rows, rates with the first seed and then the picked one with the others."""
    done = {(r["task"], r["base"], r["adapter"], r["lr"], r["seed"]) for r in rows if r["part"] == "answers"}

    def add(key: tuple[Any, ...], measure: Callable[[], dict[str, Any]]) -> None:
        if key not in done:
            rows.append(measure())
            print(json.dumps(rows[-1]), flush=True)
            keep()

    for task in tasks:
        for base in bases:
            add((task, base, "none", None, None), lambda t=task, b=base: untuned(folder, t, b))
            for adapter in ADAPTERS:
                for lr in RATES:
                    add((task, base, adapter, lr, SEEDS[0]),
                        lambda t=task, b=base, a=adapter, r=lr: trained(folder, t, b, a, r, SEEDS[0]))
                best = picked(rows, task, base, adapter)
                for seed in SEEDS[1:]:
                    add((task, base, adapter, best, seed),
                        lambda t=task, b=base, a=adapter, r=best, s=seed: trained(folder, t, b, a, r, s))


def picked(rows: list[dict[str, Any]], task: str, base: str, adapter: str) -> float:
    """Return the rate that the validation rows pick, with the first seed."""
    own = [r for r in rows if (r["part"], r.get("task"), r.get("base"), r.get("adapter"), r.get("seed")) ==
           ("answers", task, base, adapter, SEEDS[0])]
    return float(min(own, key=lambda row: row["validation_nll"])["lr"])


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each contender's NLL at its picked rate: mean and standard error over seeds."""
    found: dict[str, Any] = {}
    own = [row for row in rows if row["part"] == "answers"]
    for task, base in dict.fromkeys((row["task"], row["base"]) for row in own):
        cell = found.setdefault(f"{task}, {base}", {})
        for row in own:
            if (row["task"], row["base"], row["adapter"]) == (task, base, "none"):
                cell["untuned"] = row["single"]
        for adapter in ADAPTERS:
            if not any((r["task"], r["base"], r["adapter"], r["seed"]) == (task, base, adapter, SEEDS[0]) for r in own):
                continue
            best = picked(rows, task, base, adapter)
            at_best = [r for r in own if (r["task"], r["base"], r["adapter"], r["lr"]) == (task, base, adapter, best)]
            for who in ("single", "ensemble"):
                values = {key: [row[who][key] for row in at_best] for key in ("nll", "sequencewise_nll")}
                cell[f"{adapter}, {who}"] = {
                    "lr": best, "seeds": len(at_best),
                    **{key: statistics.fmean(v) for key, v in values.items()},
                    **{f"{key}_se": statistics.stdev(v) / len(v) ** 0.5 for key, v in values.items() if len(v) > 1},
                }
    keys = ("step_s", "tokens_per_s", "peak_rss_bytes", "peft_over_this")
    found["speed"] = {
        row["way"]: {key: row[key] for key in keys if key in row} for row in rows if row["part"] == "speed"
    }
    return found


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw tokens per second and memory, and what answers cost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summary = summary_of(rows)
    speeds, cells = summary.pop("speed"), summary
    figure, axes = plt.subplots(1, 2 + len(cells), figsize=(3.6 * (2 + len(cells)), 3.4), squeeze=False)
    ways = list(speeds)
    axes[0][0].barh(ways, [speeds[way]["tokens_per_s"] for way in ways], color="#4477aa")
    axes[0][0].set_xlabel("tokens of text per second")
    axes[0][1].barh(ways, [speeds[way].get("peak_rss_bytes", 0) / 1e9 for way in ways], color="#228833")
    axes[0][1].set_xlabel("peak memory, GB")
    axes[0][1].set_yticklabels([])
    for axis, (title, cell) in zip(axes[0][2:], cells.items(), strict=True):
        before = cell.pop("untuned")["nll"]  # far off: it would leave no room for the others
        errors = [one.get("nll_se", 0) for one in cell.values()]
        axis.barh(list(cell), [one["nll"] for one in cell.values()], xerr=errors, color="#ccbb44", capsize=3)
        axis.set_title(f"{title}; untuned: {before:.2f}", fontsize=9)
        axis.set_xlabel("NLL per token of answers", fontsize=9)
    for axis in axes[0]:
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(record.RESULTS / f"{NAME}.png", dpi=130)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["speed", "memory", "answers", "all"], default="all")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--go-on", action="store_true", help="keep what was measured before, and measure the rest")
    parser.add_argument("--peak-of", default="")
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(json.dumps(peak_of(arguments.peak_of)))
        return
    path = record.RESULTS / f"{NAME}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if arguments.go_on and path.exists() else []

    def keep() -> None:
        record.write(NAME, rows, summary_of(rows), f"benchmarks.{NAME}")

    with tempfile.TemporaryDirectory() as folder:
        if arguments.part in ("speed", "all"):
            rows = [row for row in rows if row["part"] != "speed"] + speed(folder)
            keep()
        if arguments.part in ("memory", "all"):
            measure_memory(rows, keep)
        if arguments.part in ("answers", "all"):
            answers(folder, arguments.tasks, arguments.bases, rows, keep)
    keep()
    draw(rows)
    print(path)


if __name__ == "__main__":
    main()
