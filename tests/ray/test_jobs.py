"""The ways in that people use: the command line on a running cluster, and ``ray job submit``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raylora.spec import RunSpec, dump_spec

_ROOT = Path(__file__).resolve().parents[2]
_BIN = Path(sys.executable).parent


@pytest.fixture
def spec_file(make_spec: Callable[..., RunSpec], tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(dump_spec(make_spec()))
    return path


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=_ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=400, check=False
    )


def test_ray_job_submit_runs_the_quickstart_job(ray_cluster: str, spec_file: Path, tmp_path: Path) -> None:
    done = run([
        str(_BIN / "ray"), "job", "submit", "--address", ray_cluster, "--working-dir", ".", "--",
        sys.executable, "jobs/quickstart.py", str(spec_file), "--json",
    ])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    metrics = json.loads((tmp_path / "runs" / "demo" / "metrics.json").read_text())
    assert metrics["run"]["members_done"] == 2
    assert (tmp_path / "runs" / "demo" / "report.html").exists()


@pytest.mark.slow
def test_raylora_run_uses_the_cluster_of_ray_address_and_prints_where_the_run_is(
    ray_cluster: str, spec_file: Path, tmp_path: Path
) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    done = run([str(_BIN / "raylora"), "run", str(spec_file), "--json"], RAY_ADDRESS=address)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    metrics = json.loads(Path(found["metrics"]).read_text())
    assert found["run"] == str(tmp_path / "runs" / "demo") and found["phase"] == "succeeded"
    for member in metrics["members"]:
        assert set(member["eval"]["test"]) >= {"accuracy", "nll", "brier", "ece"}
    assert set(metrics["ensemble"]["eval"]["test"]) >= {"accuracy", "nll", "brier", "ece"}
    assert metrics["timing"]["train_s"] > 0 and metrics["memory"]["base_bytes"] > 0


def test_the_doctor_asks_every_node(ray_cluster: str, tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    command = [str(_BIN / "raylora"), "doctor", "--cluster", "--storage-path", str(tmp_path / "runs"), "--json"]
    done = run(command, RAY_ADDRESS=address)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert [one["level"] for one in found] == ["ok", "ok"] and "sees" in found[1]["what"]
    assert not any((tmp_path / "runs").rglob("probe-*")), "nothing is left behind"
