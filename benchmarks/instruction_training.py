"""Instruction tuning: how fast chats are trained on, and in how much memory.

    python -m benchmarks.instruction_training            # --part speed, --part memory, --go-on

K = 4 members of SmolLM2-135M (nf4) on ToMi's chats: in one forward, with short rows packed into shared sequences, with
blocks run again in the backward pass, and PEFT's LoRA models one after another in a plain loop over the same rows and
the same quantized base. Steps are interleaved; peak memory is that of a process of its own. What answers cost
afterwards is measured by ``benchmarks.generation``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.chat_runs import MEMBERS, TARGETS, spec_of
from benchmarks.packing import stepper

NAME, ROUNDS = "instruction_training", 5
SIZES = {"train": 120, "validation": 32, "test": 80}
WAYS: dict[str, dict[str, Any]] = {
    "packed": {}, "packed, rows packed": {"pack_rows": True}, "packed, blocks run again": {"recompute": True},
}


class Cell:
    """A loaded base, and what trains on it in one way."""

    def __init__(self, folder: str, recompute: bool = False, **optimization: Any) -> None:
        from raylora.engine.run.plan_run import prepare
        from raylora.engine.run.session import TrainingSession
        from raylora.spec import build_spec

        content = spec_of(tempfile.mkdtemp(dir=folder), "tomi", "nf4", "LoRA", 1e-3, 0, SIZES)
        del content["optimization"]["epochs"]
        content["optimization"] |= {"steps": 1000, "micro_batch": 8, **optimization}
        content["placement"]["recompute"] = recompute
        prepared = prepare(build_spec(content))
        self.spec = prepared.spec
        self.session = TrainingSession(self.spec, prepared.store, cpus=2, gpus=prepared.plan.gpus_per_worker)
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
            config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules=TARGETS)
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


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each way's step, tokens per second, memory and ratio to PEFT."""
    keys = ("step_s", "tokens_per_s", "peak_rss_bytes", "peft_over_this")
    return {row["way"]: {key: row[key] for key in keys if key in row} for row in rows}


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw tokens per second and memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    speeds = summary_of(rows)
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8))
    ways = list(speeds)
    axes[0].barh(ways, [speeds[way]["tokens_per_s"] for way in ways], color="#4477aa")
    axes[0].set_xlabel("tokens of text per second")
    axes[1].barh(ways, [speeds[way].get("peak_rss_bytes", 0) / 1e9 for way in ways], color="#228833")
    axes[1].set_xlabel("peak memory, GB")
    axes[1].set_yticklabels([])
    for axis in axes:
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(record.RESULTS / f"{NAME}.png", dpi=130)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["speed", "memory", "all"], default="all")
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
    keep()
    draw(rows)
    print(path)


if __name__ == "__main__":
    main()
