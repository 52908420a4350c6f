"""The state machine and the planner with 10,000 members on 1,000 workers, of which some are slow and some die.

    python -m benchmarks.scheduler_scale

Workers are simulated (``benchmarks.cluster_simulation``); plan, events, ``transition`` and commands are the real ones.
Measured: events per second through ``transition``, how long a start and a replay of the log take, memory, and how far
the makespan is from a bound. ``--before`` prints what the largest load takes, and does so with older versions too.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.cluster_simulation import Cluster, Load, Outcome
from raylora import control

_NAME = "scheduler_scale"
SIZES = [(10_000, 1_000), (1_000, 100), (100, 10)]
SCENARIOS: dict[str, dict[str, Any]] = {
    "equal jobs": {"spread": 0.0},
    "lengths unknown": {},
    "lengths known": {"known": True},
    "unknown, some workers slow": {"slow": 0.02},
    "known, some workers slow": {"known": True, "slow": 0.02},
    "known, deaths, commits": {"known": True, "lifetime": 10.0, "commit": 0.1},
    "known, deaths, no commits": {"known": True, "lifetime": 10.0},
}
PACKS: list[dict[str, Any]] = [{"pack": 1}, {"pack": 4}, {"pack": 4, "split": True}]
BEFORE = {
    "events_per_s": 25,
    "states": 1518,
    "bytes_per_state": 236_046,
    "start_s": 0.011,
    "plan_s": 0.305,
    "command": "mkdir before; git archive 6927779 | tar x -C before; "
               "cp benchmarks/{cluster_simulation,scheduler_scale}.py before/benchmarks; "
               "cd before; python -m benchmarks.scheduler_scale --before",
}
"""The machine that copied and scanned whole dicts, on the same machine: measured once."""


def measure(name: str, load: Load, seeds: int) -> dict[str, Any]:
    """Return one row: medians over seeds, of which each is a run of its own."""
    runs = [Cluster(load, seed).run() for seed in range(seeds)]
    row: dict[str, Any] = {
        "scenario": name, **{key: value for key, value in vars(load).items() if key != "restart"},
        "jobs": runs[0].jobs, "events": len(runs[0].log), "pieces": runs[0].pieces, "seeds": seeds,
    }
    for key, values in {
        "events_per_s": [(len(run.log) - 1) / run.events_s for run in runs],
        "makespan_over_bound": [run.makespan / run.bound for run in runs],
        "makespan": [run.makespan for run in runs],
        "lost_work": [run.lost_work for run in runs],
        "plan_s": [run.plan_s for run in runs],
        "start_s": [run.start_s for run in runs],
        "replay_s": [_replay_s(run) for run in runs],
    }.items():
        row[key] = statistics.median(values)
        if key in ("events_per_s", "makespan_over_bound"):
            row |= {f"{key}_min": min(values), f"{key}_max": max(values)}
    return row


def _replay_s(run: Outcome) -> float:
    started = time.process_time()
    control.replay(run.log)
    return time.process_time() - started


def keeping_states(limit_s: float = math.inf) -> dict[str, Any]:
    """Return what a kept state of the largest load takes, and how fast events go, in the first seconds."""
    import gc

    import psutil

    kept: list[Any] = []
    cluster = Cluster(Load(*SIZES[0]), 0, kept.append)
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    run = cluster.run(limit_s)
    gc.collect()
    return {
        "states": len(kept), "bytes_per_state": (process.memory_info().rss - before) // len(kept),
        "events_per_s": round((len(run.log) - 1) / run.events_s), "start_s": run.start_s, "plan_s": run.plan_s,
    }


def peak_bytes() -> dict[str, Any]:
    """Return the peak resident bytes of this process after one run of the largest load that keeps no states."""
    before = _peak_rss_bytes()
    Cluster(Load(*SIZES[0]), 0).run()
    return {"peak_rss_bytes": _peak_rss_bytes(), "of_which_imports_bytes": before}


def _peak_rss_bytes() -> int:
    """Return the peak from the kernel; getrusage would count what the parent had when it started this process."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def log_on_disk(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Return per number of events that ``events.jsonl`` has, how long adding one takes: the median of 20."""
    from raylora.store.run_store import RunStore

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            store = RunStore(f"{folder}/{size}")
            event = {**control.to_record(control.JobFinished("job-0000", 1)), "at": 1.5e9}
            line = json.dumps(event, sort_keys=True) + "\n"
            store.append_event(event)
            Path(folder, str(size), "events.jsonl").write_text(line * size)
            times = []
            for _ in range(20):
                started = time.perf_counter()
                store.append_event(event)
                times.append(time.perf_counter() - started)
            rows.append({"events": size, "append_s": statistics.median(times), "log_bytes": len(line) * size})
    return rows


def _in_own_process(what: str) -> Any:
    return record.in_own_process("benchmarks.scheduler_scale", "--cell", what)


# --- what it comes to --------------------------------------------------------------------------------------
def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    largest = [row for row in rows if row["members"] == SIZES[0][0]]
    rates = [row["events_per_s"] for row in largest]
    return {
        "events_per_s": {"least": round(min(rates)), "most": round(max(rates))},
        "before": BEFORE,
        "makespan_over_bound": {
            f"{row['scenario']}|packs of {row['pack']}{', split' if row['split'] else ''}":
                round(row["makespan_over_bound"], 3) for row in largest
        },
    }


def plot(rows: Sequence[dict[str, Any]]) -> None:
    """Draw how far the makespan is from the bound, and events per second against members."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 5), width_ratios=(2, 1))
    names = list(SCENARIOS)
    for index, pack in enumerate(PACKS):
        line = [row for row in rows if row["members"] == SIZES[0][0] and row["pack"] == pack["pack"]
                and row["split"] == pack.get("split", False)]
        values = [row["makespan_over_bound"] for row in line]
        places = [place + 0.27 * (index - 1) for place in range(len(names))]
        label = f"packs of {pack['pack']}" + (", the last split" if pack.get("split") else "")
        bars = left.bar(places, values, 0.25, label=label)
        left.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=7)
    left.axhline(1.05, color="black", linewidth=0.8, linestyle="--")
    left.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8)
    left.set_ylim(bottom=0.9)
    left.set_yscale("log")
    left.set_yticks([1, 1.05, 1.2, 1.5, 2, 3, 5], ["1", "1.05", "1.2", "1.5", "2", "3", "5"])
    left.minorticks_off()
    left.set_title(f"Makespan over its bound, {SIZES[0][0]:,} members on {SIZES[0][1]:,} workers")
    left.legend(fontsize=8)
    for name in names:
        line = [row for row in rows if row["scenario"] == name and row["pack"] == 1]
        right.plot([r["members"] for r in line], [r["events_per_s"] for r in line], marker="o", label=name)
    if BEFORE["events_per_s"]:
        right.plot(SIZES[0][0], BEFORE["events_per_s"], "kx", label="before: copies and scans")
    right.axhline(10_000, color="black", linewidth=0.8, linestyle="--")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("members, each a job; a tenth as many workers")
    right.set_title("Events per second through transition")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(record.RESULTS / f"{_NAME}.png", dpi=130)


def main() -> None:
    """Measure every cell and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--before", action="store_true", help="print what the largest load takes in the first minute")
    parser.add_argument("--cell", choices=("states", "peak"), help=argparse.SUPPRESS)
    options, _ = parser.parse_known_args()
    if options.cell:
        print(json.dumps(keeping_states() if options.cell == "states" else peak_bytes()))
        return
    if options.before:
        print(json.dumps(keeping_states(limit_s=60)))
        return
    rows = []
    for members, workers in SIZES:
        for name, scenario in SCENARIOS.items():
            for pack in PACKS:
                row = measure(name, Load(members, workers, **{**pack, **scenario}), options.seeds)
                rows.append(row)
                print(f"{members} on {workers}, {name}, {pack}: {row['events_per_s']:.0f} events/s, "
                      f"{row['makespan_over_bound']:.3f} of the bound", flush=True)
    summary = {
        **_summary(rows), "keeping_states": _in_own_process("states"), "memory": _in_own_process("peak"),
        "log_on_disk": log_on_disk([100, 1_000, 10_000, 100_000]),
    }
    record.write(_NAME, rows, summary, "benchmarks.scheduler_scale")
    plot(rows)


if __name__ == "__main__":
    main()
