"""The runs on chats that several benchmarks ask about: tasks, bases and adapters, and a run's spec."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

MEMBERS = 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASES: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": "nf4"},
    "CLoQ, 3 bits": {
        "quantization": {"kind": "optq", "bits": 3, "group_size": 64}, "compensation": {"kind": "cloq", "rank": 16},
        "calibration": {"source": "pypi:bbc-news", "samples": 32, "length": 256, "held_out": 4},
    },
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"kind": "lora", "rank": 16, "alpha": 16, "target_modules": TARGETS},
    "MoS": {"kind": "mos", "equivalent_rank": 2, "rank": 8, "private_rank": 1, "shards": 4, "alpha": 16,
            "target_modules": TARGETS},
}
TASKS: dict[str, dict[str, Any]] = {
    "tomi": {
        "data": {"train": {"source": "pypi:tomi"}, "validation": {"source": "pypi:tomi-validation"},
                 "test": {"source": "pypi:tomi-test"}},
        "metric": "exact_match", "max_new_tokens": 8,
    },
    "arithmetic": {"data": {"train": {"source": "pypi:arithmetic"}}, "metric": "number", "max_new_tokens": 16},
    "soc-codes": {"data": {"train": {"source": "pypi:soc-codes"}}, "metric": "exact_match", "max_new_tokens": 32},
}
"""``number``: what ``exact_match`` compares has no decimal point left, and 57.2 is not 572."""


def data_of(task: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return a task's data section, cut to so many rows of each set."""
    data = json.loads(json.dumps(TASKS[task]["data"]))
    data["train_rows"] = sizes["train"]
    for name in ("validation", "test"):
        if name in data:
            data[name]["rows"] = sizes[name]
        else:
            data[f"{name}_rows"] = sizes[name]
    return data


def spec_of(
    folder: str, task: str, base: str, adapter: str, lr: float, seed: int, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Return the spec of one run as plain data."""
    on_gpu = torch.cuda.is_available()
    return {
        "name": f"{task}-{adapter.lower()}-{seed}-{lr:.0e}", "storage_path": folder,
        "base": {"source": "pypi:smollm2-135m", "dtype": "bfloat16" if on_gpu else "auto", **BASES[base]},
        "adapter": ADAPTERS[adapter], "data": data_of(task, sizes),
        "task": {"kind": "instruction", "max_length": 256, "on_too_long": "truncate_prompt"},
        "ensemble": {"members": MEMBERS, "seed": 100 * seed},
        "optimization": {"lr": lr, "epochs": 1, "micro_batch": 4, "group_by_length": True},
        "evaluation": {
            "bootstrap_samples": 200, "batch": 32,
            "generation": {"metrics": [TASKS[task]["metric"]], "max_new_tokens": TASKS[task]["max_new_tokens"],
                           "rows": sizes["test"]},
        },
        "placement": {"workers": 1, "gpus_per_worker": int(on_gpu), **({"cpus_per_worker": 1} if on_gpu else {})},
    }
