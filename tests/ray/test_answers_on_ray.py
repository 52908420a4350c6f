"""Answers on Ray: a run's workers write what a run in this process writes, and a finished run can be asked later."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from run_helpers import assert_bit_equal, members

from raylora import control
from raylora.client import evaluate_run, launch, run_local
from raylora.engine.run.plan_run import Prepared
from raylora.engine.run.work import TrainingAssignment
from raylora.spec import GenerationSpec, RunSpec
from raylora.store.run_store import RunStore

pytestmark = pytest.mark.usefixtures("ray_cluster")


def answers_of(uri: str) -> dict[str, bytes]:
    """Return what is committed of a run's answers, by where it lies."""
    files = Path(uri).glob("answers/*/shards/*/answers.jsonl")
    return {str(file.relative_to(uri)): file.read_bytes() for file in files}


@dataclass(frozen=True)
class Meeting:
    """A run's work, of which nobody answers before two workers are there to do it."""

    folder: str

    def make_session(self, *place: Any) -> Any:
        session = TrainingAssignment().make_session(*place)
        run_job, end = session.run_job, time.monotonic() + 120

        def met(job: str, *rest: Any) -> dict[str, str]:
            Path(self.folder, str(os.getpid())).touch()
            while job.startswith("answers") and len(os.listdir(self.folder)) < 2 and time.monotonic() < end:
                time.sleep(0.1)
            return run_job(job, *rest)

        session.run_job = met  # type: ignore[method-assign]
        return session


@pytest.mark.slow
def test_a_run_on_ray_answers_as_one_in_process_and_can_be_asked_again(
    make_spec: Callable[..., RunSpec], tiny_model: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"Say {n}", "completion": "yes" if n % 3 else f"no {n}"} for n in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = make_spec(
        base__source=tiny_model("llama"), adapter__target_modules=["q_proj", "v_proj"],
        task={"kind": "instruction", "max_length": 64, "template": "none"}, optimization={"lr": 0.05, "steps": 4},
        data={"train": {"files": str(tmp_path / "rows.jsonl")}, "train_rows": 40, "validation_rows": 2,
              "test_rows": 70},
        evaluation={"bootstrap_samples": 5, "generation": {"max_new_tokens": 3, "rows": 70}},
        placement={"workers": "auto", "cpus_per_worker": 1, "members_per_worker": 2},  # one pack, and two cores
    )
    here, there = (spec.model_copy(update={"storage_path": str(tmp_path / where)}) for where in ("local", "ray"))
    uris = [RunStore.for_spec(one).uri for one in (here, there)]
    in_process = run_local(here, lambda status: None)
    (tmp_path / "met").mkdir()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have this file
    with monkeypatch.context() as patch:
        patch.setattr(Prepared, "assignment", Meeting(str(tmp_path / "met")))
        on_ray = launch(there).wait(lambda status: None)
    assert on_ray["answers"] == in_process["answers"] and answers_of(uris[0]) == answers_of(uris[1])
    assert_bit_equal(members(uris[0]), members(uris[1]))
    events = RunStore(uris[1]).read_events()
    ended = [record["job"] for record in events if record["event"] == "JobFinished"]
    assert ended[0] == "job-00" and sorted(ended[1:]) == ["answers-000", "answers-001", "answers-002"]
    assert len(answers_of(uris[1])) == 3
    names = [record.get("worker") or record.get("job") for record in events]
    assert names.index("worker-1") > names.index("job-00")  # it was not there while the others trained
    state = control.replay(control.from_record(record) for record in events)
    assert {state.jobs[name].worker for name in ended[1:]} == {"worker-0", "worker-1"}
    pids = {json.loads(file.read_text())["pid"] for file in Path(uris[1]).glob("answers/*/shards/*/writing.json")}
    assert len(pids) == 2 and on_ray["timing"]["answer_tokens"] == in_process["timing"]["answer_tokens"] > 0
    assert "<h2>Answers</h2>" in Path(uris[1], "report.html").read_text()

    fewer = GenerationSpec(max_new_tokens=2, rows=40)
    found: list[dict[str, Any]] = [evaluate_run(uris[0], fewer, local=True), evaluate_run(uris[1], fewer)]
    assert found[0] == found[1] and answers_of(uris[0]) == answers_of(uris[1]) and len(answers_of(uris[1])) == 5
