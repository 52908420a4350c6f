"""A rank that dies while a block is gathered: the others notice, and a new gang goes on from the commits, bit-equal."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from gangs import Case, free_address, run_gang
from run_helpers import assert_bit_equal, members

from raylora.engine.run.plan_run import prepare
from raylora.spec import build_spec
from raylora.store.run_store import RunStore

RANKS = 2


def case_in(folder: Path, content: dict[str, Any]) -> Case:
    """Return a run of four members of an nf4 base that commits every two steps, begun, and dealt out to two ranks."""
    own = json.loads(json.dumps(content))
    own["storage_path"] = str(folder)
    own["base"]["quantization"] = "nf4"
    own["ensemble"]["members"] = 4
    own["optimization"]["steps"] = 8
    own["checkpointing"] = {"every_steps": 2}
    prepared = prepare(build_spec(own))
    prepared.begin()
    units = [unit.name for unit in prepared.units]
    return Case(own, [{f"job-{rank:02d}": units[rank::RANKS]} for rank in range(RANKS)])


def dies_in_a_gather(case: Case, rank: int, address: str, doomed: int, said: Any) -> None:
    """Do a rank's job; the doomed one kills itself within the first gather after its second commit.

    It has sent its part of the block then and waits for the other's, which will wait for more than was sent.
    """
    import torch
    from deepspeed.runtime.zero import partition_parameters

    from raylora.engine.model.gang import GangPlace
    from raylora.engine.run.session import TrainingSession

    torch.set_num_threads(1)
    prepared = prepare(build_spec(case.content))
    session = TrainingSession(prepared.spec, prepared.store, 1, 0, GangPlace(rank, RANKS, address, timeout_s=120))
    session.load()
    ((job, units),) = case.jobs_of_ranks[rank].items()
    gather = partition_parameters._dist_allgather_fn

    def gather_and_die(*arguments: Any, **options: Any) -> Any:
        handle = gather(*arguments, **options)
        if len(session.store.storage.list(f"checkpoints/{units[0]}")) >= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return handle

    if rank == doomed:
        partition_parameters._dist_allgather_fn = gather_and_die
    try:
        session.run_job(job, units, lambda progress: None, lambda: 0)
    except RuntimeError as error:
        said.put(type(error).__name__)
        os._exit(3)  # as a worker that is killed by its coordinator: nothing waits for a peer that is gone


@pytest.mark.slow
@pytest.mark.parametrize("doomed", [0, 1])
def test_a_rank_that_is_killed_within_a_gather_ends_its_gang_and_the_next_one_goes_on(
    doomed: int, content: dict[str, Any], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    said, address = context.Queue(), free_address()
    case = case_in(tmp_path / "killed", content)
    ranks = [
        context.Process(target=dies_in_a_gather, args=(case, rank, address, doomed, said)) for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    try:
        ranks[doomed].join(240)
        died_at = time.monotonic()
        ranks[1 - doomed].join(90)
        noticed_s = time.monotonic() - died_at
    finally:
        for process in ranks:
            process.kill()
    assert ranks[doomed].exitcode == -signal.SIGKILL
    assert ranks[1 - doomed].exitcode == 3, "the other rank raised instead of waiting for its timeout of 120 s"
    assert noticed_s < 60
    store = RunStore.for_spec(build_spec(case.content))
    steps = [store.checkpoint_steps(f"member-{number:03d}") for number in range(4)]
    assert all(found and found[-1] < 8 for found in steps), steps
    assert not store.storage.list("members")

    alone = case_in(tmp_path / "alone", content)
    run_gang([case], RANKS)
    run_gang([alone], RANKS, is_split=False)
    assert_bit_equal(members(store.uri), members(RunStore.for_spec(build_spec(alone.content)).uri))
