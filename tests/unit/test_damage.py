"""Damaged and missing members: refused by name wherever a run is used, and trained again as they were."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import run, stop_at
from sweeps import sweep
from typer.testing import CliRunner

from raylora.cli import app
from raylora.client import repair_run
from raylora.engine.distillation.plan import prepare_distillation
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.engine.run.roster import read_roster
from raylora.engine.run.verify import verify_run
from raylora.errors import Interrupted, RunDirectoryError, StoreError
from raylora.progress import Activity
from raylora.serve.export import export_run
from raylora.serve.predictor import load_ensemble
from raylora.spec import DistillSpec
from raylora.store.commit import MANIFEST, identity_of
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
TEXTS = ["A film to remember.", "Dull from start to end."]
THREE = {
    "ensemble__members": 3, "adapter__dropout": 0.1,
    "baselines": {"mc_dropout": {"passes": 2, "dropout": 0.1}, "checkpoints": 2, "last_layer": 1},
    "optimization": {"lr": 0.005, "epochs": 2, "micro_batch": 8},
}
UNSEALED = {"events.jsonl", "MANIFEST.json", "report.html", "baseline_costs.json", "inputs.json"}
"""Not of what a run found: its log and seal, what is made of it, what it cost, where this machine has its models."""


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def flip_weights(uri: str, name: str = "member-001") -> None:
    flip(Path(uri) / "members" / name / "adapter_model.safetensors")


def lose_file(uri: str) -> None:
    (Path(uri) / "members/member-001/adapter_model.safetensors").unlink()


def lose_folder(uri: str) -> None:
    shutil.rmtree(Path(uri) / "members/member-001")


def swap_members(uri: str) -> None:
    """Put another member, whole in itself, in the place of member 1."""
    lose_folder(uri)
    shutil.copytree(Path(uri) / "members/member-002", Path(uri) / "members/member-001")


def digests(uri: str) -> dict[str, str]:
    """Return a hash of every file that a run has committed; of a manifest, whoever committed it."""
    folders = ("members", "baselines", "predictions", "snapshots")

    def digest(path: Path) -> str:
        content = path.read_bytes()
        return identity_of(content)["sha256"] if path.name == MANIFEST else hashlib.sha256(content).hexdigest()

    return {
        str(path.relative_to(uri)): digest(path)
        for folder in folders for path in sorted((Path(uri) / folder).rglob("*")) if path.is_file()
    }


def scores(uri: str) -> dict[str, Any]:
    """Return what the metrics of a run say but for its times."""
    metrics = json.loads((Path(uri) / "metrics.json").read_text())
    return {key: metrics[key] for key in ("members", "ensemble", "baselines", "gains", "training", "sets")}


@pytest.fixture
def three(make_spec: Make, trained: Callable[[Any], str]) -> str:
    """Return where a finished run of three members and every baseline lies, which kept no checkpoints."""
    return trained(make_spec(**THREE, checkpointing={"keep_final": False}))


DAMAGES = {
    "a flipped bit": (flip_weights, "member-001 is damaged: adapter_model.safetensors differs from its checksum"),
    "a lost file": (lose_file, "member-001 is damaged: adapter_model.safetensors is missing"),
    "a lost folder": (lose_folder, "member-001 is missing"),
    "another member in its place": (swap_members, "member-001 is not what the run committed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whoever_uses_a_run_refuses_a_damaged_member_by_name(three: str, tmp_path: Path, damage: str) -> None:
    harm, words = DAMAGES[damage]
    harm(three)
    student = DistillSpec.model_validate({"student": {"base": RunStore(three).read_spec().base.model_dump()}})
    uses: dict[str, Callable[[], object]] = {
        "load": lambda: load_ensemble(three),
        "export": lambda: export_run(three, out=str(tmp_path / "out")),
        "export of the member": lambda: export_run(three, out=str(tmp_path / "out"), members=["member-001"]),
        "distill": lambda: prepare_distillation(three, student),
        "resume": lambda: prepare(RunStore(three).spec_in_place()),
    }
    for use, do in uses.items():
        with pytest.raises(StoreError) as caught:
            do()
        assert words.removeprefix("member-001 ") in caught.value.message and "member-001" in caught.value.message, use
        assert f"`raylora repair {three}` trains" in caught.value.hint, use
    assert not (tmp_path / "out").exists()
    export_run(three, out=str(tmp_path / "one"), members=["member-000"])  # whoever names a whole member gets it
    for command in (["predict", three, "--text", TEXTS[0]], ["report", three], ["export", three], ["verify", three]):
        done = call(*command)
        assert done.exit_code == 1 and "member-001" in done.output and "raylora repair" in done.output, command
    status = call("status", three)
    assert status.exit_code == 0 and "damaged" in status.output and words.split(":")[0] in status.output
    assert list(json.loads(call("status", three, "--json").stdout)["lost"]) == ["member-001"]


def test_whoever_allows_it_goes_on_and_every_record_says_with_how_many(three: str, tmp_path: Path) -> None:
    whole = load_ensemble(three).predict(TEXTS)
    flip_weights(three)
    records = [one.record() for one in load_ensemble(three, allow_missing=True).predict(TEXTS)]
    assert [(one["members"], one["members_asked"]) for one in records] == [(2, 3), (2, 3)]
    assert len(records[0]["member_probabilities"]) == 2
    kept = [whole[0].record()["member_probabilities"][index] for index in (0, 2)]
    raw = load_ensemble(three, calibrated=False, allow_missing=True).predict(TEXTS)
    assert raw[0].record()["probabilities"] == records[0]["probabilities"]  # no temperature was fitted for these two
    assert whole[0].calibrated and not records[0]["calibrated"] and kept != records[0]["member_probabilities"]
    said = call("predict", three, "--text", TEXTS[0], "--allow-missing")
    assert said.exit_code == 0 and "2 of 3 members" in " ".join(said.output.split())
    assert call("report", three, "--allow-missing").exit_code == 0
    done = call("export", three, "--allow-missing", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0 and sorted(p.name for p in (tmp_path / "out").iterdir()) == ["member-000", "member-002"]


def test_with_no_member_left_nothing_is_allowed(three: str) -> None:
    for name in ("member-000", "member-001", "member-002"):
        flip_weights(three, name)
    with pytest.raises(StoreError, match="member-000 is damaged.*member-001 is damaged.*member-002") as caught:
        load_ensemble(three, allow_missing=True)
    assert "trains them again" in caught.value.hint and "allow" not in caught.value.hint


def test_members_that_are_not_finished_are_named_too(make_spec: Make) -> None:
    spec = make_spec(ensemble__members=3, placement__members_per_worker=1)
    seen: list[int] = []

    def stop_in_the_second_job(progress: Any) -> None:
        seen.append(progress.done)
        if seen.count(1) == 2:
            stop_at()(progress)

    with pytest.raises(Interrupted):
        run(spec, stop_in_the_second_job)
    uri = RunStore.for_spec(spec).uri
    with pytest.raises(RunDirectoryError, match="member-001 is not trained yet.*member-002") as caught:
        load_ensemble(uri)
    assert "raylora resume" in caught.value.hint and "1 of 3: --allow-missing" in caught.value.hint
    assert load_ensemble(uri, allow_missing=True).predict(TEXTS)[0].record()["members"] == 1


# --- verify ----------------------------------------------------------------------------------------------
def test_verify_finds_one_turned_bit_in_any_file_that_was_committed(three: str) -> None:
    assert not [part for part in verify_run(three) if part.problem]
    root = Path(three)
    committed = [path for path in sorted(root.rglob("*")) if path.is_file()]
    committed = [path for path in committed if path.name not in UNSEALED or path.parent != root]
    unsealed = ("plots", "timing", "tensorboard", "lock", "tokenized")  # the last says where rows are kept
    looked_at = [path for path in committed if path.parts[len(root.parts)] not in unsealed]
    assert {path.name for path in looked_at} >= {"metrics.json", "data.json", "predictions.safetensors", "member.json"}
    for path in looked_at:
        if path.name == "spec.yaml":
            continue  # a spec that cannot be read is an error of its own
        before = path.read_bytes()
        flip(path)
        found = {part.place for part in verify_run(three) if part.problem}
        assert len(found) == 1 and str(path.relative_to(root)).startswith(found.pop()), path
        path.write_bytes(before)


def test_verify_counts_what_is_whole_and_names_what_is_gone(three: str) -> None:
    good = call("verify", three, "--json")
    assert good.exit_code == 0 and json.loads(good.stdout)["damaged"] == {}
    assert "parts are whole" in call("verify", three).output
    shutil.rmtree(Path(three) / "baselines" / "mc-dropout")
    shutil.rmtree(Path(three) / "predictions" / "member-002")
    (Path(three) / "metrics.json").unlink()
    bad = call("verify", three, "--json")
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["damaged"] == dict.fromkeys(
        ("metrics.json", "baselines/mc-dropout", "predictions/member-002"), "is missing"
    )


def test_a_run_without_a_readable_seal_is_judged_by_its_log(three: str) -> None:
    flip(Path(three) / "events.jsonl")
    (Path(three) / "MANIFEST.json").write_text("{")
    assert {part.place for part in verify_run(three) if part.problem} >= {"MANIFEST.json"}
    flip(Path(three) / "events.jsonl")
    lose_folder(three)
    with pytest.raises(StoreError, match="member-001 is missing"):
        load_ensemble(three)


# --- repair ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage", sweep(DAMAGES, ["a flipped bit"]))
def test_repair_makes_what_was_lost_again_bit_for_bit_and_touches_nothing_else(three: str, damage: str) -> None:
    before, said = digests(three), scores(three)
    others = {path: path.stat().st_mtime_ns for path in (Path(three) / "members/member-000").iterdir()}
    DAMAGES[damage][0](three)
    done = call("repair", three, "--local")
    assert done.exit_code == 0 and "made again, bit for bit as it was" in " ".join(done.output.split()), done.output
    assert digests(three) == before and scores(three) == said
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert not [part for part in verify_run(three) if part.problem]
    assert not RunStore(three).storage.list("checkpoints")


@pytest.mark.slow
def test_a_member_whose_last_state_was_kept_is_made_again_without_training(
    make_spec: Make, trained: Callable[[Any], str]
) -> None:
    uri = trained(make_spec(**THREE))
    assert RunStore(uri).checkpoint_steps("member-001") == [10]
    before = digests(uri)
    lose_folder(uri)
    steps: list[int] = []
    prepared = prepare(RunStore(uri).spec_in_place(), repair=True)
    run_in_process(prepared, lambda status: steps.extend(
        job.progress.done for job in status.jobs.values()
        if job.progress is not None and job.progress.activity is Activity.TRAINING
    ))
    assert not steps and digests(uri) == before


LOSSES = {
    "every member": ["members/member-000", "members/member-001", "members/member-002"],
    "predictions alone": ["predictions/member-001"],
    "a baseline": ["baselines/mc-dropout", "baselines/last-layer-000"],
    "checkpoints of member 0": ["predictions/checkpoints"],
    "the metrics": ["metrics.json"],
}


@pytest.mark.parametrize("loss", sweep(LOSSES, ["predictions alone"]))
def test_repair_makes_any_part_again(three: str, loss: str) -> None:
    before, said = digests(three), scores(three)
    for place in LOSSES[loss]:
        path = Path(three) / place
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = repair_run(three, local=True)
    assert done.lost and all(done.equal.values())
    assert digests(three) == before and scores(three) == said
    assert not repair_run(three, local=True).lost


def test_a_repair_that_is_interrupted_goes_on_to_the_same_end(three: str) -> None:
    before = digests(three)
    lose_folder(three)
    steps: list[int] = []

    def interrupted(status: Any) -> None:
        for job in status.jobs.values():
            if job.progress is not None and job.progress.done == 3 and not steps:
                steps.append(3)
                stop_at()(job.progress)

    with pytest.raises(Interrupted):
        run_in_process(prepare(RunStore(three).spec_in_place(), repair=True), interrupted)
    assert steps and read_roster(RunStore(three)).unfinished
    run(RunStore(three).spec_in_place())
    assert digests(three) == before


def test_repair_refuses_other_data_and_changes_nothing(make_spec: Make, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"film {n} was {'good' if n % 2 else 'bad'}", "label": n % 2}) for n in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows))
    spec = make_spec(data={"train": {"files": str(file)}, "validation_rows": 8, "test_rows": 8})
    run(spec)
    uri = RunStore.for_spec(spec).uri
    lose_folder(uri)
    before = digests(uri)
    file.write_text("\n".join(rows[:-1]))
    with pytest.raises(RunDirectoryError, match="the data has changed"):
        repair_run(uri, local=True)
    assert digests(uri) == before


def test_a_run_that_was_content_with_fewer_members_predicts_and_says_so(
    make_spec: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_local_run import one_goes_wrong

    spec = make_spec(ensemble={"members": 3, "min_members": 2})
    with monkeypatch.context() as patch:
        one_goes_wrong(patch)
        run(spec)
    uri = RunStore.for_spec(spec).uri
    record = load_ensemble(uri).predict(TEXTS)[0].record()
    assert (record["members"], record["members_asked"]) == (2, 3)
    assert not [part for part in verify_run(uri) if part.problem]
    lose_folder(uri) if (Path(uri) / "members/member-001").exists() else shutil.rmtree(
        Path(uri) / "members/member-002"
    )
    with pytest.raises(StoreError, match="member-002 is missing"):
        load_ensemble(uri)
