"""Gangs of real processes over gloo: each rank does its jobs of a run, as a worker would."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Mapping, Sequence
from typing import Any


def free_address() -> str:
    """Return an address on this machine that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


def rank(
    content: dict[str, Any], place: tuple[int, int, str] | None, jobs: Mapping[str, Sequence[str]], said: Any,
    check: Any = None,
) -> None:
    """Do the jobs of one rank and say how it went; without a place, as a worker with a base of its own."""
    import torch

    from raylora.engine.model.gang import GangPlace
    from raylora.engine.run.plan_run import prepare
    from raylora.engine.run.session import TrainingSession
    from raylora.spec import build_spec

    number = place[0] if place else 0
    try:
        torch.set_num_threads(1)
        prepared = prepare(build_spec(content))
        session = TrainingSession(prepared.spec, prepared.store, 1, 0, GangPlace(*place) if place else None)
        session.load()
        found: dict[str, Any] = {}
        for job, units in jobs.items():
            found[job] = session.run_job(job, units, lambda progress: None, lambda: 0)
        if check is not None:
            found["check"] = check(session)
        if session.gang is not None:
            session.gang.leave()
        said.put((number, found))
    except BaseException:
        said.put((number, traceback.format_exc()))
        raise


def run_gang(
    content: dict[str, Any], jobs_of_ranks: Sequence[Mapping[str, Sequence[str]]], is_split: bool = True,
    check: Any = None, timeout_s: float = 240,
) -> dict[int, Any]:
    """Run jobs on a gang with as many ranks (or on one worker after the other) and return what each rank said."""
    context = multiprocessing.get_context("spawn")
    said, address = context.Queue(), free_address()
    size = len(jobs_of_ranks)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    ranks = [
        context.Process(target=rank, args=(content, (number, size, address) if is_split else None, jobs, said, check))
        for number, jobs in enumerate(jobs_of_ranks)
    ]
    found: dict[int, Any] = {}
    try:
        for number, process in enumerate(ranks):
            process.start()
            if not is_split:
                found[number] = said.get(timeout=timeout_s)[1]
        if is_split:
            found = dict(said.get(timeout=timeout_s) for _ in ranks)
        for process in ranks:
            process.join(60)
    finally:
        for process in ranks:
            process.kill()
    return found
