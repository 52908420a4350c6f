"""What this machine is, and what a process has needed of it."""

from __future__ import annotations

import os
import platform
import resource
import sys

import torch

from raylora.records import Machine


def machine() -> Machine:
    """Return what kind of machine this is, without its name."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "bf16_native": multiplies_bfloat16(),
    }


def multiplies_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 itself, which is several times faster than float32."""
    native = torch.cpu.get_capabilities()
    return bool(native.get("amx_bf16") or native.get("avx512_bf16"))


def peak_memory_bytes() -> int:
    """Return the largest resident size that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int:
    """Return the most that this process has had on a device; of cores there is none."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def compute_device(gpus: int) -> torch.device:
    """Return the device that a worker computes on."""
    return torch.device("cuda", 0) if gpus and torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve ``auto``: bfloat16 where it is multiplied natively (several times faster), else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32
