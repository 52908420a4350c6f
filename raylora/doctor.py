"""Look at a machine before a run does: versions, processors, memory, disk, tokens."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raylora.actors.node_facts import NodeFacts

_NEEDED = ("ray", "torch", "transformers", "deepspeed", "bitsandbytes", "peft", "datasets")
_RAY_AT_LEAST = (2, 60)
_LOW_DISK_BYTES = 2 * 10**9
_LOW_MEMORY_BYTES = 3 * 10**9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: str  # ok | warn | bad
    what: str
    hint: str = ""


def examine() -> list[Finding]:
    """Return what was found, in the order a person would ask."""
    return [*_packages(), _processor(), _gpus(), _memory(), _disk(), *_ray_security()]


def examine_cluster(storage_path: str = "", timeout_s: float = 120.0) -> list[Finding]:
    """Return what every node of the cluster of ``RAY_ADDRESS`` answers: versions, GPUs, and whether it sees a path.

    Raises:
        UsageError: there is no such cluster, or the path cannot be written from here.
    """
    from raylora.actors.node_facts import ask_nodes, versions_here
    from raylora.connection import connect_to_running
    from raylora.store.probe import leave_probe, remove_probe
    from raylora.store.storage import Storage

    connect_to_running()
    storage = Storage(storage_path) if storage_path else None
    nonce = ""
    if storage is not None:
        storage.check_writable()
        nonce = leave_probe(storage)
    try:
        answers = ask_nodes(storage_path, nonce, timeout_s)
    finally:
        if storage is not None:
            remove_probe(storage, nonce)
    return [finding for answer in answers for finding in findings_of(answer, versions_here(), storage_path, nonce)]


def findings_of(facts: NodeFacts, here: Mapping[str, str], storage_path: str, nonce: str) -> list[Finding]:
    """Judge one node's answer by the versions of this process and the nonce that lies in the storage path."""
    if facts.silence:
        return [Finding("bad", f"{facts.node}: {facts.silence}", "look at the node's logs in the Ray dashboard")]
    others = {name: facts.versions.get(name, "none") for name in here if facts.versions.get(name) != here[name]}
    told = ", ".join(f"{name} {version} (here {here[name]})" for name, version in others.items())
    devices = f"{len(facts.gpus)} GPU(s): {'; '.join(facts.gpus)}" if facts.gpus else "no GPU"
    found = [Finding("bad", f"{facts.node}: {told}", "use one environment, or one image, on all nodes")] if told else [
        Finding("ok", f"{facts.node}: the versions of this machine; {devices}")
    ]
    if facts.sighting is not None:
        seen = facts.sighting.found == nonce
        found.append(
            Finding("ok", f"{facts.node}: sees {storage_path}") if seen else
            Finding("bad", f"{facts.node}: does not see {storage_path}: {facts.sighting.found}",
                    "use a folder on a shared mount, or s3://, gs:// or another bucket")
        )
    return found


def _packages() -> list[Finding]:
    findings = []
    for name in _NEEDED:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding("bad", f"{name} is not installed", "run `make install`"))
            continue
        if name == "ray" and tuple(int(part) for part in version.split(".")[:2]) < _RAY_AT_LEAST:
            findings.append(Finding("bad", f"ray {version}", "use 2.60 or newer: older dashboards have known holes"))
        else:
            findings.append(Finding("ok", f"{name} {version}"))
    return findings


def _processor() -> Finding:
    from raylora.engine.model.machine import multiplies_bfloat16

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if multiplies_bfloat16():
        return Finding("ok", f"{cores} CPU(s), bfloat16 multiplied natively: base.dtype auto means bfloat16")
    return Finding("ok", f"{cores} CPU(s) without bfloat16: base.dtype auto means float32, several times slower")


def _gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("ok", "no GPU: members train on CPU")
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Finding("ok", f"{torch.cuda.device_count()} GPU(s): {names}")


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    if free < _LOW_MEMORY_BYTES:
        return Finding("warn", f"{free / 1e9:.1f} GB of memory free", "a CPU worker takes about 2 GB")
    return Finding("ok", f"{free / 1e9:.1f} GB of memory free")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    if free < _LOW_DISK_BYTES:
        return Finding("warn", f"{free / 1e9:.1f} GB of disk free here", "checkpoints and models need some")
    return Finding("ok", f"{free / 1e9:.1f} GB of disk free here")


def _ray_security() -> list[Finding]:
    findings = []
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        findings.append(Finding("warn", "RAY_AUTH_MODE=disabled: anyone who reaches the cluster runs code on it",
                                "unset it, see SECURITY.md"))
    token = Path.home() / ".ray" / "auth_token"
    if token.exists() and token.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        findings.append(Finding("warn", f"{token} can be read by other users", f"chmod 600 {token}"))
    return findings
