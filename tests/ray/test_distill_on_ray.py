"""A distillation on Ray: the student that a distillation in this process gives, and a coordinator that stays small."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from run_helpers import assert_bit_equal, members, weights

from raylora import client
from raylora.client import _start, distill_run, launch
from raylora.engine.distillation.plan import Distillation, prepare_distillation
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.run_status import RunStatus
from raylora.engine.training.distillation_loss import load_targets, targets_uri
from raylora.spec import DistillSpec, RunSpec
from raylora.store.run_store import RunStore

pytestmark = pytest.mark.usefixtures("ray_cluster")
Trained = Callable[[RunSpec], str]


def shards_of(work: Distillation) -> dict[str, bytes]:
    """Return every file of targets by its name, manifests left out."""
    shards = Path(work.targets.store.uri) / "shards"
    return {file.name: file.read_bytes() for file in shards.glob("*/rows-*")}


def directing() -> list[tuple[str, psutil.Process]]:
    """Return those who compute nothing, found by what Ray calls them: so is what they fork, until that is another."""
    titles = {p: " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])}
    roles = ("Coordinator", "Keeper")
    return [(role, p) for p, title in titles.items() for role in roles if title.startswith(f"ray::{role}")]


def make_targets(work: Distillation, grows_at_most: int) -> list[str]:
    """Make targets on Ray, check that the coordinator stays as small as it starts, and return the run's events."""
    seen: list[int] = []
    has_torch: dict[str, set[bool]] = {}

    def look(_: RunStatus) -> None:
        found = directing()
        seen.append(max((p.memory_info().rss for role, p in found if role == "Coordinator"), default=0))
        for role, process in found:
            with contextlib.suppress(OSError):  # it has just ended
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                has_torch.setdefault(role, set()).add("libtorch" in maps)

    assert work.targets is not None
    facts = _start(work.targets).join(look)
    assert facts == {} and work.targets.is_done
    assert has_torch == {"Coordinator": {False}, "Keeper": {False}}
    held = [size for size in seen if size]
    assert held and held[-1] - held[0] < grows_at_most, held  # it sees the names of shards, and starts workers
    return [record["event"] for record in work.targets.store.read_events()]


def test_a_student_taught_on_ray_equals_one_taught_in_process(
    make_spec: Callable[..., RunSpec], content: dict[str, Any], trained: Trained, tmp_path: Path
) -> None:
    spec = make_spec(placement__workers=2, data__train_rows=200)
    uris = [trained(spec.model_copy(update={"storage_path": str(tmp_path / where)})) for where in ("local", "ray")]
    student = {"base": content["base"], "adapter": {"rank": 2, "target_modules": ["query", "value"]}}
    settings = DistillSpec.model_validate({"student": student, "alone": False, "costs": False})
    in_process = distill_run(uris[0], settings, local=True)

    work = prepare_distillation(uris[1], settings, shard_rows=8)
    assert len(work.targets.shards) == 25
    events = make_targets(work, grows_at_most=40 * 2**20)
    assert events.count("JobFinished") == 25 and events.count("WorkerReady") >= 1  # the second may come too late

    on_ray = distill_run(uris[1], settings)
    left, right = (
        load_targets(RunStore(targets_uri(uri, RunStore(f"{uri}/student").read_spec().distill_from.targets)))
        for uri in uris
    )
    assert left.keys.ids == right.keys.ids and float((left.values - right.values).abs().max()) < 2e-3
    ours, theirs = weights(f"{uris[0]}/student"), weights(f"{uris[1]}/student")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)
    assert on_ray["contenders"]["student"]["eval"]["test"]["accuracy"] == pytest.approx(
        in_process["contenders"]["student"]["eval"]["test"]["accuracy"], abs=0.05)


@pytest.mark.slow
def test_the_same_shards_give_the_same_student_bit_for_bit(
    make_spec: Callable[..., RunSpec], content: dict[str, Any], trained: Trained, tmp_path: Path
) -> None:
    spec = make_spec(placement__workers=2)
    student = {"base": content["base"], "adapter": {"rank": 2, "target_modules": ["query", "value"]}}
    settings = DistillSpec.model_validate({"student": student, "costs": False, "loss": {"kind": "dirichlet"}})
    for where, local in (("local", True), ("ray", False)):
        uri = trained(spec.model_copy(update={"storage_path": str(tmp_path / where)}))
        distill_run(uri, settings, local=local)
    for name in ("student", "student-alone"):
        assert_bit_equal(*(members(str(tmp_path / where / "demo" / name)) for where in ("local", "ray")))


@pytest.mark.slow  # what is particular to it, its large targets, is the same code in process
def test_a_language_model_taught_on_ray_equals_one_taught_in_process(
    make_spec: Callable[..., RunSpec], tiny_model: Callable[[str], str], trained: Trained, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = make_spec(
        base__source=tiny_model("llama"), adapter__target_modules=["q_proj", "v_proj"],
        task={"kind": "language_modeling", "max_length": 16}, optimization__steps=3, evaluation__bootstrap_samples=0,
        data__train_rows=50, data__validation_rows=4, data__test_rows=4, placement__workers=2,
    )
    settings = DistillSpec.model_validate({
        "student": {
            "base": {"source": tiny_model("gpt2"), "dtype": "float32", "quantization": "none"},
            "adapter": {"rank": 2, "target_modules": "all-linear"},
        },
        "loss": {"kind": "topk_kl", "top_k": 16_384}, "alone": False, "costs": False,
    })
    uris = [str(tmp_path / where / "demo") for where in ("local", "ray")]
    trained(spec.model_copy(update={"storage_path": str(tmp_path / "local")}))
    launch(spec.model_copy(update={"storage_path": str(tmp_path / "ray")})).wait()
    in_process, on_ray = (prepare_distillation(uri, settings, shard_rows=16) for uri in uris)
    run_in_process(in_process.targets)
    events = make_targets(on_ray, grows_at_most=30 * 2**20)
    assert events.count("JobFinished") == len(on_ray.targets.shards) >= 4
    assert on_ray.targets.store.read_json("targets.json")["size_bytes"] > 60 * 2**20  # passed on, they would show
    ours, theirs = shards_of(in_process), shards_of(on_ray)
    assert ours == theirs and len(ours) == 2 * len(on_ray.targets.shards)

    record, same = distill_run(uris[1], settings), distill_run(uris[0], settings, local=True)
    assert record["contenders"] == same["contenders"]
    assert_bit_equal(*(members(f"{uri}/student") for uri in uris))

    monkeypatch.setattr(client, "_carry_out", lambda *work: pytest.fail("something was done again"))
    assert distill_run(uris[1], settings) == record


@pytest.mark.slow
def test_answers_made_on_ray_and_a_teacher_beside_its_student_give_the_student_of_one_process(
    make_spec: Callable[..., RunSpec], tiny_model: Callable[[str], str], trained: Trained, tmp_path: Path
) -> None:
    lines = [{"prompt": f"Is {n} odd?", "completion": "yes" if n % 2 else "no"} for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "asks.jsonl").write_text("".join(json.dumps({"prompt": f"Is {n} odd?"}) + "\n" for n in range(40, 60)))
    spec = make_spec(
        base__source=tiny_model("llama"), adapter={"kind": "lora", "rank": 8, "target_modules": "all-linear"},
        task={"kind": "instruction", "max_length": 64}, evaluation__bootstrap_samples=0,
        data={"train": {"files": str(tmp_path / "chats.jsonl")}, "validation_rows": 4, "test_rows": 6},
        optimization={"lr": 0.02, "steps": 60, "micro_batch": 6, "warmup": 0.0}, placement__workers=2,
    )
    settings = DistillSpec.model_validate({
        "student": {
            "base": {"source": tiny_model("llama"), "dtype": "float32", "quantization": "none"}, "members": 2,
            "adapter": {"rank": 4, "target_modules": "all-linear"},
            "optimization": {"lr": 0.01, "steps": 5, "micro_batch": 3},
        },
        "loss": {"kind": "gkd", "on_policy": 0.5, "max_new_tokens": 5}, "answers": {"max_new_tokens": 6},
        "transfer": {"files": str(tmp_path / "asks.jsonl")}, "alone": False, "costs": False,
    })
    uris = [trained(spec.model_copy(update={"storage_path": str(tmp_path / where)})) for where in ("local", "ray")]
    in_process, on_ray = distill_run(uris[0], settings, local=True), distill_run(uris[1], settings)
    assert on_ray["targets"]["answers"] == in_process["targets"]["answers"] > 30 and on_ray["targets"]["rows"] == 50
    assert_bit_equal(*(members(f"{uri}/student") for uri in uris))
