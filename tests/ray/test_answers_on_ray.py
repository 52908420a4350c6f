"""Answers on Ray: a run's workers write what a run in this process writes, and a finished run can be asked later."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import assert_bit_equal, members

from raylora.client import evaluate_run, launch, run_local
from raylora.spec import GenerationSpec, RunSpec
from raylora.store.run_store import RunStore

pytestmark = pytest.mark.usefixtures("ray_cluster")


def answers_of(uri: str) -> dict[str, bytes]:
    """Return what is committed of a run's answers, by where it lies."""
    files = Path(uri).glob("answers/*/shards/*/answers.jsonl")
    return {str(file.relative_to(uri)): file.read_bytes() for file in files}


@pytest.mark.slow
def test_a_run_on_ray_answers_as_one_in_process_and_can_be_asked_again(
    make_spec: Callable[..., RunSpec], tiny_model: Callable[[str], str], tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {n}", "completion": "yes" if n % 3 else f"no {n}"} for n in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = make_spec(
        base__source=tiny_model("llama"), adapter__target_modules=["q_proj", "v_proj"],
        task={"kind": "instruction", "max_length": 64, "template": "none"}, optimization={"lr": 0.05, "steps": 4},
        data={"train": {"files": str(tmp_path / "rows.jsonl")}, "train_rows": 40, "validation_rows": 2,
              "test_rows": 70},
        evaluation={"bootstrap_samples": 5, "generation": {"max_new_tokens": 3, "rows": 70}}, placement__workers=2,
    )
    here, there = (spec.model_copy(update={"storage_path": str(tmp_path / where)}) for where in ("local", "ray"))
    uris = [RunStore.for_spec(one).uri for one in (here, there)]
    in_process = run_local(here, lambda status: None)
    on_ray = launch(there).wait(lambda status: None)
    assert on_ray["answers"] == in_process["answers"] and answers_of(uris[0]) == answers_of(uris[1])
    assert_bit_equal(members(uris[0]), members(uris[1]))
    events = RunStore(uris[1]).read_events()
    ended = [record["job"] for record in events if record["event"] == "JobFinished"]
    assert sorted(ended[2:]) == ["answers-000", "answers-001", "answers-002"] and len(answers_of(uris[1])) == 3
    assert "<h2>Answers</h2>" in Path(uris[1], "report.html").read_text()

    fewer = GenerationSpec(max_new_tokens=2, rows=40)
    found: list[dict[str, Any]] = [evaluate_run(uris[0], fewer, local=True), evaluate_run(uris[1], fewer)]
    assert found[0] == found[1] and answers_of(uris[0]) == answers_of(uris[1]) and len(answers_of(uris[1])) == 5
