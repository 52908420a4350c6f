"""Gangs of real processes over gloo: each rank does its jobs of a run, as a worker would."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def free_address() -> str:
    """Return an address on this machine that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


@dataclass(frozen=True)
class Case:
    """A run, as plain data, and the jobs of every rank."""

    content: dict[str, Any]
    jobs_of_ranks: Sequence[Mapping[str, Sequence[str]]]


Check = Callable[[Any, int], Any]
"""(session, rank) -> what a rank says of itself after its jobs."""


def run_gang(
    cases: Sequence[Case], ranks: int, is_split: bool = True, check: Check | None = None, timeout_s: float = 300,
    partners: int = 1, gpus: int = 0, backend: str = "", before: Callable[[], None] | None = None,
) -> list[list[Any]]:
    """Do the cases one after another on a gang of processes, or on as many workers with bases of their own.

    Args:
        is_split: whether the base is split over the gang.
        partners: how many ranks train the same members; there is a gang where they are several, too.
        gpus: 1 for ranks that compute on the machine's first GPU, all of them.
        backend: what carries their tensors, where it is not what the device would choose.
        before: what every process does first.

    Returns:
        What each rank said of each case: ``found[case][rank]``.
    """
    # Where there is a GPU, what is imported may have asked for it, and then a copy cannot use it.
    context: Any = multiprocessing.get_context("spawn") if gpus else ready_processes()
    said, address = context.Queue(), free_address()
    environment = {**os.environ}  # that of now, not of when the first gang was
    place = {"size": ranks, "address": address, "partners": partners, "is_split": is_split, "backend": backend}
    processes = [
        context.Process(target=_rank, args=(cases, {"rank": number, **place}, check, said, gpus, before, environment))
        for number in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        found: dict[tuple[int, int], Any] = {}
        while len(found) < len(cases) * ranks:
            case, number, result = said.get(timeout=timeout_s)
            assert not isinstance(result, str), f"rank {number}, case {case}: {result}"
            found[case, number] = result
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    return [[found[case, number] for number in range(ranks)] for case in range(len(cases))]


def ready_processes() -> Any:
    """Return how processes are started as copies of one that has imported everything.

    Importing takes a process longer than a small run does. The one that is copied is started once, so what it imports
    is said in this place alone.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "raylora.engine.run.session", "raylora.engine.run.plan_run", "deepspeed",
        "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama",
    ])
    return context


def _rank(
    cases: Sequence[Case], place: dict[str, Any], check: Check | None, said: Any, gpus: int,
    before: Callable[[], None] | None, environment: Mapping[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    import torch

    from raylora.engine.model.gang import GangPlace
    from raylora.engine.run import session as session_module

    torch.set_num_threads(1)
    if before is not None:
        before()
    number = place["rank"]
    in_gang = place["is_split"] or place["partners"] > 1
    if in_gang:  # a process is in one gang all its life; here it does several runs in it
        start = functools.lru_cache(maxsize=1)(session_module.start_deepspeed)
        session_module.start_deepspeed = start  # type: ignore[assignment]
    for index, case in enumerate(cases):
        try:
            found = _run(case, number, GangPlace(**place) if in_gang else None, check, gpus)
        except BaseException:
            said.put((index, number, traceback.format_exc()))
            raise
        said.put((index, number, found))


def _run(case: Case, number: int, place: Any, check: Check | None, gpus: int) -> Any:
    from raylora.engine.run.plan_run import prepare
    from raylora.engine.run.session import TrainingSession
    from raylora.spec import build_spec

    prepared = prepare(build_spec(case.content))
    session = TrainingSession(prepared.spec, prepared.store, 1, gpus, place)
    session.load()
    for job, units in case.jobs_of_ranks[number].items():
        failed = session.run_job(job, units, lambda progress: None, lambda: 0)
        assert not failed, failed
    found = check(session, number) if check is not None else True
    return found
