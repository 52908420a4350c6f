"""What an ensemble of language models answers, how well it knows when it is wrong, and how fast it writes.

    python -m benchmarks.generation                      # --part answers, --part speed, --processes 12 on a GPU

**Answers.** SmolLM2-135M on ToMi's questions, on arithmetic and on job titles: the untuned base, one LoRA, an ensemble
of four, one MoS with an eighth of the parameters and an ensemble of four, over nf4 and over a 3-bit base with a CLoQ
pair, and students of the LoRA ensembles. Of each: the share of right answers, the NLL of the references, and whether
its doubts tell wrong answers from right ones (AUROC). Every contender has the same three rates, the mean member's NLL
on validation rows picks one with the first seed, and there are three seeds. One LoRA is member 0 of its ensemble.

**Speed.** Tokens per second of an ensemble of four beside four ``generate`` calls of PEFT, PEFT's batch of mixed
adapters, and the bound: the base alone writing four times the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

from benchmarks import record
from benchmarks.chat_runs import ADAPTERS, BASES, TASKS
from benchmarks.generation_cells import SEEDS, STUDENTS, measure_cell, prepare_bases

NAME = "generation"
DOUBTS = ("mean_nll", "mean_entropy", "mean_mutual_information", "disagreement")
Row = dict[str, Any]


def cells(tasks: Sequence[str], bases: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return every task, base and adapter, those first that others wait for."""
    return sorted(product(tasks, bases, ADAPTERS), key=lambda cell: not _teaches(cell))


def _teaches(cell: tuple[str, str, str]) -> bool:
    return cell[1:] == ("nf4", "LoRA")


def in_processes(
    chosen: Sequence[tuple[str, str, str]], folder: str, sizes: str, processes: int, going_on: bool,
    keep: Callable[[Row], None],
) -> list[str]:
    """Measure cells, so many at once, each in a process of its own; return what the failed ones said."""

    def one(cell: tuple[str, str, str]) -> str:
        command = [sys.executable, "-m", f"benchmarks.{NAME}", "--cell", *cell, "--sizes", sizes, "--folder", folder]
        command += ["--go-on"] * going_on
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"part": "answers"'):
                    keep(json.loads(line))
            if process.wait():
                said.seek(0)
                return f"{', '.join(cell)}:\n" + "".join(said.readlines()[-20:])
        return ""

    failures = []
    with ThreadPoolExecutor(processes) as pool:
        waiting = [(cell, pool.submit(one, cell)) for cell in chosen]
        for cell, done in waiting:  # teachers are first, and their students are put behind all others
            failures.append(done.result())
            if _teaches(cell) and not failures[-1]:
                waiting += [(own, pool.submit(one, own)) for own in ((*cell[:2], student) for student in STUDENTS)]
    return [failure for failure in failures if failure]


def contenders(rows: Sequence[Row]) -> Iterator[tuple[str, str, str, str, list[Row]]]:
    """Yield task, base, contender, which of its voices, and the rows at its picked rate, a row per seed."""
    answers = [row for row in rows if row["part"] == "answers"]
    for task, base, who in dict.fromkeys((row["task"], row["base"], row["who"]) for row in answers):
        own = [row for row in answers if (row["task"], row["base"], row["who"]) == (task, base, who)]
        if who == "untuned":
            yield task, base, who, "single", own
            continue
        first = [row for row in own if row["seed"] == SEEDS[0]]
        best = min(first, key=lambda row: row["validation_nll"])["lr"]
        at_best = [row for row in own if row["lr"] == best]
        if who in ADAPTERS:
            yield task, base, f"one {who}", "single", at_best
            yield task, base, f"4 {who}", "ensemble", at_best
        else:
            yield task, base, who, "ensemble", at_best


def _mean(values: Sequence[float | None]) -> Row | None:
    """Return mean and standard error; None where there is nothing, as of an AUROC without wrong answers."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "se": error, "seeds": len(known)}


def summary_of(rows: Sequence[Row]) -> Row:
    """Return of each contender mean and standard error over seeds, and of each writer its speed."""
    found: Row = {"answers": {}, "speed": {}}
    for task, base, who, voice, own in contenders(rows):
        cell = found["answers"].setdefault(f"{task}, {base}", {})
        said = [row[voice] for row in own]
        cell[who] = {
            "lr": own[0]["lr"],
            **{key: _mean([one[key] for one in said]) for key in ("right", "nll", "sequencewise_nll")},
        }
        if who != "untuned":
            cell[who] |= {key: _mean([one[key] for one in said]) for key in ("ece", "aurc")}
            cell[who]["error_auroc"] = {
                name: _mean([one["error_auroc"][name] for one in said])
                for name in DOUBTS if name in said[0]["error_auroc"]
            }
            cell[who]["trainable"] = own[0]["trainable"]
    for row in rows:
        if row["part"] == "speed":
            keys = ("tokens_per_s", "s", "four_calls_over_this", "bound_over_this")
            found["speed"].setdefault(row["device"], {})[row["who"]] = {key: row[key] for key in keys}
    return found


def _label(who: str, base: str, one: Row) -> str:
    seeds = one["right"]["seeds"]
    return f"{who}, {base}" + (f" ({seeds} seed{'s' * (seeds > 1)})" if who != "untuned" and seeds < len(SEEDS) else "")


def draw(rows: Sequence[Row]) -> None:
    """Draw right answers, NLL and the AUROC of doubts for each task, and tokens per second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summary = summary_of(rows)
    tasks = [task for task in TASKS if any(name.startswith(f"{task},") for name in summary["answers"])]
    figure, axes = plt.subplots(max(1, len(tasks)), 4, figsize=(16, 0.6 + 2.9 * max(1, len(tasks))), squeeze=False)
    columns = {
        "right answers": lambda one: one["right"], "NLL per token of references": lambda one: one["nll"],
        "AUROC of errors, by mean NLL": lambda one: one.get("error_auroc", {}).get("mean_nll"),
    }
    for number, task in enumerate(tasks):
        of_task = {base: summary["answers"].get(f"{task}, {base}", {}) for base in BASES}
        own = {_label(who, base, one): one for base, cell in of_task.items() for who, one in cell.items()}
        for axis, (title, of) in zip(axes[number], columns.items(), strict=False):
            shown = {name: of(one) for name, one in own.items() if of(one) and not (
                title.startswith("NLL") and name.startswith("untuned"))}  # far off: it would leave no room
            colors = ["#4477aa" if "nf4" in name else "#ee6677" for name in shown]
            axis.barh(list(shown), [one["mean"] for one in shown.values()],
                      xerr=[one["se"] or 0 for one in shown.values()], color=colors, capsize=2)
            axis.set_xlabel(title, fontsize=9)
            axis.set_title(task, fontsize=10)
            axis.invert_yaxis()
            axis.tick_params(labelsize=7)
            if title.startswith("AUROC"):
                axis.set_xlim(0.4, 1)
                axis.axvline(0.5, color="#999999", linewidth=0.8)
    for axis, (device, own) in zip(axes[:, 3], summary["speed"].items(), strict=False):
        axis.barh(list(own), [one["tokens_per_s"] for one in own.values()], color="#228833")
        axis.set_xlabel(f"answer tokens per second, {device}", fontsize=9)
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
    for axis in axes[len(summary["speed"]) :, 3]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(record.RESULTS / f"{NAME}.png", dpi=130)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["answers", "speed", "all"], default="all")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--processes", type=int, default=1, help="cells that are measured at once")
    parser.add_argument("--sizes", default="120,32,80", help="rows to train on, to validate and to test")
    parser.add_argument("--prompts", type=int, default=4, help="that each contender for speed goes on from at once")
    parser.add_argument("--new-tokens", type=int, default=32, help="that each contender for speed writes to a prompt")
    parser.add_argument("--go-on", action="store_true", help="keep what is measured, and measure what is missing")
    parser.add_argument("--cell", nargs=3, metavar=("TASK", "BASE", "WHO"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="where runs are kept; those that are finished there are not done again")
    arguments = parser.parse_args()
    sizes = dict(zip(("train", "validation", "test"), map(int, arguments.sizes.split(",")), strict=True))
    path = record.RESULTS / f"{NAME}.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if arguments.go_on and path.exists() else []
    if arguments.cell:
        task, base, who = arguments.cell
        known = [row for row in rows if row["part"] == "answers" and row["sizes"] == sizes]
        known = [row for row in known if (row["task"], row["base"]) == (task, base)]
        here = {"part": "answers", "sizes": sizes, "device": record.machine()["gpu"] or "CPU"}
        measure_cell(arguments.folder, task, base, who, sizes, known,
                     lambda row: print(json.dumps({**here, **row}), flush=True))
        return
    chosen = cells(arguments.tasks, arguments.bases) if arguments.part != "speed" else []

    def keep(row: Row) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        record.write(NAME, rows, summary_of(rows), f"benchmarks.{NAME}")

    if arguments.part != "answers":
        from benchmarks.generation_speed import measure

        measured = measure(arguments.prompts, arguments.new_tokens)
        rows = [row for row in rows if (row["part"], row.get("device")) != ("speed", measured[0]["device"])]
        for row in measured:
            keep(row)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or temporary
        if chosen:
            prepare_bases(folder, arguments.bases, sizes)
        failures = in_processes(chosen, folder, arguments.sizes, arguments.processes, arguments.go_on, keep)
    draw(rows)
    print(path)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
