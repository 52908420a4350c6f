"""What every benchmark writes: the command, the machine, the versions, one row per measured cell, a summary."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("raylora", "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "ray")


def write(
    name: str, rows: Sequence[dict[str, Any]], summary: dict[str, Any], module: str, command: str | None = None
) -> Path:
    """Write ``results/NAME.json`` and return its path; the command is how this process was called, unless given."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "command": command or " ".join(["python", "-m", module, *sys.argv[1:]]),
        "machine": machine(),
        "versions": _versions(),
        "rows": list(rows),
        "summary": summary,
    }
    whole = path.with_suffix(".json.partial")  # others may read what is there while this is written
    whole.write_text(json.dumps(content, indent=1) + "\n")
    whole.replace(path)
    return path


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:  # a benchmark that needs no Ray runs without it
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def machine() -> dict[str, Any]:
    """Return the processor, its cores and memory, and the GPU if there is one."""
    import psutil
    import torch

    from raylora.engine.model.machine import multiplies_bfloat16

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "processor": model,
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "bf16_native": multiplies_bfloat16(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def in_own_process(module: str, *arguments: str, variables: Mapping[str, str] | None = None) -> Any:
    """Return what a benchmark says, as JSON on its last line, when it is run in a process of its own."""
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, **(variables or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def interleaved(contenders: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Time contenders in turn, round after round, so that a drifting machine drifts for all; seconds by name.

    Each is called with the number of the round. All rounds are made once before any is timed: a CPU matrix
    library compiles a kernel for every new shape, and whoever came first would pay for all.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for timed in (False, True):
        for number in range(rounds):
            for name, call in contenders.items():
                started = time.perf_counter()
                call(number)
                if timed:
                    times[name].append(time.perf_counter() - started)
    return times


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Return the median of the ratios round by round, and their range."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
