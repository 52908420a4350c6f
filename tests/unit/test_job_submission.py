"""What is known of a submission before a cluster sees it, and what is said to addresses that are no job server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from raylora.cli import app
from raylora.errors import RayloraError, SpecError, UsageError
from raylora.jobs.naming import job_name, numbered, parted, run_of
from raylora.jobs.reach import Needed, needed_on_cluster
from raylora.jobs.submission import find_job, read_runtime_env, spec_text
from raylora.jobs.upload import survey
from raylora.spec import RunSpec, dump_spec, parse_spec

MakeSpec = Callable[..., RunSpec]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


# --- names ------------------------------------------------------------------------------------------------
def test_the_same_work_has_the_same_name_and_other_work_another(make_spec: MakeSpec) -> None:
    name = job_name(make_spec())
    assert name == job_name(make_spec()) and run_of(name) == "demo"
    assert job_name(make_spec(placement__workers=2)) == name  # who does it is no part of what it is
    others = [make_spec(ensemble__members=3), make_spec(storage_path="/elsewhere"), make_spec(name="other")]
    assert len({name, *map(job_name, others)}) == 4


def test_numbered_names_are_told_from_others() -> None:
    assert parted(numbered("raylora-a-1-0a1b2c3d", 12)) == ("raylora-a-1-0a1b2c3d", 12)
    assert parted("raysubmit_abc") is None and parted(None) is None
    assert parted("raylora-a-0a1b2c3d-probe-x12345678") is None


def test_a_spec_travels_as_one_line_and_is_the_same_spec(make_spec: MakeSpec) -> None:
    spec = make_spec(optimization__lr=0.25)
    text = spec_text(spec)
    assert "\n" not in text and len(text) < len(dump_spec(spec)) and parse_spec(text) == spec


# --- the working directory --------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for name in (
        "spec.yaml", "data/rows.jsonl", "data/raw/big.bin", "runs/demo/weights", "secret.txt", ".venv/lib/x.py",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x" * 10)
    (root / ".rayignore").write_text("/runs/\n*.bin\n")
    (root / ".gitignore").write_text("secret.txt\n")
    return root


def test_an_upload_says_what_is_sent_and_what_stays(folder: Path) -> None:
    upload = survey(folder)
    assert set(upload.files) == {".gitignore", ".rayignore", "data/rows.jsonl", "spec.yaml"}
    assert upload.left_out == (".venv/", "data/raw/", "runs/", "secret.txt")
    assert upload.holds("data") and upload.holds("data/rows.jsonl") and not upload.holds("runs")
    assert "4 file(s)" in upload.summary() and "runs/" in upload.summary()


def test_what_is_sent_is_what_ray_packs(folder: Path, tmp_path: Path) -> None:
    import zipfile

    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    excludes = [*get_runtime_env_default_excludes(), "spec.*"]
    create_package(str(folder), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as packed:
        names = {name for name in packed.namelist() if not name.endswith("/")}
    assert names == set(survey(folder, ["spec.*"]).files) and "spec.yaml" not in names


def test_a_large_upload_is_refused_naming_the_largest(folder: Path) -> None:
    with open(folder / "video.mp4", "wb") as file:
        file.truncate(101 * 2**20)
    with pytest.raises(UsageError, match=r"video.mp4 \(106 MB\)"):
        survey(folder)
    (folder / ".rayignore").write_text("/runs/\n*.mp4\n")
    assert "video.mp4" in survey(folder).left_out


# --- paths ------------------------------------------------------------------------------------------------
def with_data(make_spec: MakeSpec, files: str, **changes: Any) -> RunSpec:
    return make_spec(data__train={"files": files}, base__source="org/model", **{"storage_path": "/runs", **changes})


def test_files_in_the_working_directory_go_with_it(make_spec: MakeSpec, folder: Path) -> None:
    needed = needed_on_cluster(with_data(make_spec, "data/rows.jsonl"), survey(folder))
    assert needed.read == () and needed.written == ("/runs",)


def test_absolute_paths_are_asked_of_the_cluster_and_object_stores_of_nobody(make_spec: MakeSpec, folder: Path) -> None:
    needed = needed_on_cluster(with_data(make_spec, "/data/rows.jsonl", storage_path="s3://lab/runs"), survey(folder))
    assert needed.read == ("/data/rows.jsonl",) and needed.written == ()


@pytest.mark.parametrize(("files", "storage", "expected"), [
    ("../rows.jsonl", "/runs", "outside the working directory"),
    ("data/none.jsonl", "/runs", "is not in the working directory"),
    ("data/raw/big.bin", "/runs", "is left out of what is sent"),
    ("~/rows.jsonl", "/runs", "home of whoever runs it"),
    ("data/rows.jsonl", "runs", "goes with the job"),
    ("data/rows.jsonl", "~/runs", "home of whoever runs it"),
])
def test_paths_that_a_cluster_cannot_see_are_refused_before_anything_is_sent(
    files: str, storage: str, expected: str, make_spec: MakeSpec, folder: Path
) -> None:
    spec = with_data(make_spec, files, storage_path=storage)
    with pytest.raises(SpecError, match=expected):
        needed_on_cluster(spec, survey(folder))
    (folder / "spec.yaml").write_text(dump_spec(spec))
    done = call("submit", str(folder / "spec.yaml"), "--working-dir", str(folder), "--address", "http://127.0.0.1:9")
    assert done.exit_code == 2 and expected in " ".join(done.stderr.split())


# --- runtime environments ---------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "expected"), [
    ("- pip", "is no YAML mapping"), ("a: [", "runtime-env"), ("working_dir: .", "--working-dir"),
    ("env_vars: {HF_TOKEN: hf_abc}", "looks like a secret"), ("env_vars: [A]", "env_vars is no mapping"),
])
def test_runtime_environments_that_would_fail_or_leak_are_refused(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as raised:
        read_runtime_env(path)
    assert expected in str(raised.value) and "hf_abc" not in str(raised.value)


def test_other_runtime_environments_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    path.write_text("env_vars: {TOKENIZERS_PARALLELISM: 'false'}")
    assert read_runtime_env(path) == {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
    assert read_runtime_env(None) == {}


# --- addresses --------------------------------------------------------------------------------------------
@pytest.fixture
def server() -> Iterator[Callable[[dict[str, tuple[int, Any]]], str]]:
    """Return a function that answers paths with (status, JSON) and gives the address; all others are not found."""
    servers: list[HTTPServer] = []

    def serve(answers: dict[str, tuple[int, Any]]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, content = answers.get(self.path, (404, "not found"))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *arguments: Any) -> None:
                """Say nothing."""

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for one in servers:
        one.shutdown()
        one.server_close()


def version(ray: str) -> tuple[int, Any]:
    return 200, {"version": "4", "ray_version": ray, "ray_commit": "", "session_name": ""}


@pytest.mark.parametrize(("answers", "expected"), [
    ({}, "no job server"),
    ({"/api/version": (200, {"hello": 1})}, "no job server"),
    ({"/api/version": (500, "down")}, "no job server"),
    ({"/api/version": version("2.60.0")}, "no job server"),  # the dashboard without its jobs
    ({"/api/version": version("2.59.0"), "/api/jobs/": (200, [])}, "runs Ray 2.59.0"),
    ({"/api/version": (401, "who?")}, "does not take this token"),
    ({"/api/version": (403, "no")}, "does not take this token"),
])
def test_what_is_no_job_server_is_one_message_and_exit_code_2(
    answers: dict[str, tuple[int, Any]], expected: str, server: Callable[..., str]
) -> None:
    done = call("jobs", "status", "--address", server(answers))
    assert done.exit_code == 2 and expected in " ".join(done.stderr.split()), done.output
    assert done.stderr.count("error:") == 1 and "->" in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "http://", "http://127.0.0.1:9",
                                     "http://no-such-host.invalid:8265", "http://127.0.0.1:99999"])
def test_a_wrong_address_is_one_message_and_exit_code_2(address: str) -> None:
    done = call("jobs", "status", "--address", address)
    assert done.exit_code == 2 and done.stderr.count("error:") == 1 and "8265" in done.stderr, done.output


def test_an_empty_server_has_no_jobs(server: Callable[..., str]) -> None:
    import ray

    address = server({"/api/version": version(ray.__version__), "/api/jobs/": (200, [])})
    done = call("jobs", "status", "--address", address)
    assert done.exit_code == 0 and "no jobs of raylora" in done.stdout
    lost = call("jobs", "logs", "demo", "--address", address)
    assert lost.exit_code == 2 and "no such job" in lost.stderr


class Watching:
    """A job server whose jobs never end, and that then goes away."""

    def __init__(self) -> None:
        self.is_there = True

    def __getattr__(self, name: str) -> Callable[..., Any]:
        job = SimpleNamespace(
            submission_id="a-probe", status="PENDING", start_time=1, driver_exit_code=None, message="",
        )

        def answer(*arguments: Any, **options: Any) -> Any:
            if not self.is_there or name == "delete_job":
                raise RuntimeError("Request failed with status code 500: Traceback")
            return {"list_jobs": [job], "get_job_info": job, "get_job_logs": ""}.get(name)

        return answer


def test_a_first_job_that_never_starts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from raylora.jobs import server as module

    monkeypatch.setattr(module, "_PROBE_S", 0)
    monkeypatch.setattr(module, "_REMOVE_S", 0)
    monkeypatch.setattr(module, "_WATCH_S", 0)
    monkeypatch.setattr(module.uuid, "uuid4", lambda: SimpleNamespace(hex="0"))
    server = object.__new__(module.JobServer)
    server.address, server._client = "http://x", Watching()
    with pytest.raises(RayloraError, match=r"did not run there \(PENDING\)"):
        server.probe("a", Needed((), ()), {})
    assert server._remove("a-probe") is False
    with pytest.raises(UsageError, match="no such job"):
        find_job(server, "demo")
    server._client.is_there = False
    with pytest.raises(RayloraError, match="no longer answers as it should"):
        server.logs("a-probe")


# --- the spec as text -------------------------------------------------------------------------------------
def test_a_spec_is_given_once() -> None:
    assert "give a spec file" in call("run").stderr
    assert "given twice" in call("run", "a.yaml", "--spec-yaml", "name: a").stderr
    done = call("run", "--spec-yaml", "nam: a")
    assert done.exit_code == 2 and "--spec-yaml" in done.stderr
