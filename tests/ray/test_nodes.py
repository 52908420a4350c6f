"""Runs on clusters of several nodes, which come and go while they train."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import assert_bit_equal, members

from raylora.client import run_local
from raylora.data.catalog.assets import cache_folder
from raylora.spec import RunSpec, dump_spec

MakeSpec = Callable[..., RunSpec]
_ROOT = Path(__file__).resolve().parents[2]


def scenario(name: str, spec: RunSpec, folder: Path, cwd: Path = _ROOT) -> Any:
    """Run a scenario of ``nodes.py`` in a process of its own and return what it says."""
    file = folder / "spec.yaml"
    file.write_text(dump_spec(spec))
    home = folder / "home"
    home.mkdir()
    environment = {
        **os.environ, "HOME": str(home), "RAYLORA_CACHE": str(cache_folder()), "PYTHONPATH": str(_ROOT),
        "PYTHONWARNINGS": "ignore", "RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "6",
    }
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("nodes.py")), name, str(file)],
        env=environment, capture_output=True, text=True, timeout=500, check=False, cwd=cwd,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


@pytest.mark.slow
def test_a_run_grows_from_no_node_to_three_loses_one_and_ends_bit_equal(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(
        ensemble__members=3, optimization__steps=1000, checkpointing__every_steps=50,
        placement={
            "workers": 3, "min_workers": 1, "cpus_per_worker": 1, "members_per_worker": 1, "gpus_per_worker": 0,
        },
    )
    found = scenario("grow", spec, tmp_path)
    assert found["phase"] == "succeeded"
    assert any("CPU': 1.0" in line for line in found["demand"]), found["demand"]
    assert sorted(found["started"].values()) == ["busy", "starting", "starting"]
    assert len(found["on_three"]) == 3
    assert "released" in found["seen"], "whoever has nothing left to do lets its node go"
    events = [json.loads(line) for line in (Path(found["run"]) / "events.jsonl").read_text().splitlines()]
    lost = [event for event in events if event["event"] == "WorkerLost"]
    assert len(lost) == 1 and lost[0]["by_machine"]
    two = spec.placement.model_copy(update={"workers": 2, "min_workers": None})
    run_local(spec.model_copy(update={"storage_path": str(tmp_path / "local"), "placement": two}))
    assert_bit_equal(members(found["run"]), members(str(tmp_path / "local" / "demo")))


@pytest.mark.slow
def test_a_gang_on_two_nodes_survives_the_loss_of_one(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(
        ensemble__members=2, base__quantization="nf4", optimization__steps=200, checkpointing__every_steps=20,
        placement={"strategy": "shard", "ranks": 2, "cpus_per_worker": 1, "members_per_worker": 1},
    )
    found = scenario("gang", spec, tmp_path)
    assert found["phase"] == "succeeded" and found["ranks"] == 2
    alone = {"workers": 2, "cpus_per_worker": 1, "members_per_worker": 1}
    run_local(make_spec(storage_path=str(tmp_path / "local"), placement=alone))
    assert_bit_equal(members(found["run"]), members(str(tmp_path / "local" / "demo")))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_coordinator_that_dies_is_started_again_and_its_worker_goes_on_with_the_base_that_it_has(
    make_spec: MakeSpec, tmp_path: Path, ranks: int
) -> None:
    gang = {"strategy": "shard", "ranks": 2, "cpus_per_worker": 1, "members_per_worker": 1}
    spec = make_spec(
        optimization__steps=1000 // ranks, checkpointing__every_steps=20, base__quantization="nf4",
        placement=gang if ranks == 2 else {"workers": 1, "cpus_per_worker": 1},
    )
    found = scenario("coordinator", spec, tmp_path)
    assert found["phase"] == "succeeded" and found["starts"] == 2
    assert found["before"] == found["after"] and len(found["after"]) == ranks and found["after"][0][1] is not None
    assert found["left"] == []
    timings = [json.loads(path.read_text()) for path in (Path(found["run"]) / "timing").glob("*.json")]
    assert sorted(one["pid"] for one in timings) == sorted(pid for pid, _ in found["before"])
    assert all(0 < one["resumed_at_step"] < 1000 // ranks for one in timings)
    events = [json.loads(line) for line in (Path(found["run"]) / "events.jsonl").read_text().splitlines()]
    assert not [event for event in events if event["event"] == "WorkerLost"]
    alone = {"workers": ranks, "cpus_per_worker": 1, "members_per_worker": 2 // ranks}
    run_local(make_spec(storage_path=str(tmp_path / "local"), placement=alone))
    assert_bit_equal(members(found["run"]), members(str(tmp_path / "local" / "demo")))


@pytest.mark.slow
def test_a_node_that_has_neither_data_nor_model_fetches_the_model_once_for_all_its_workers(
    make_spec: MakeSpec, tiny_model: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home-of-the-driver"
    shutil.copytree(tiny_model("bert"), home / "mini")
    rows = [{"text": f"film {n} is {'dull' if n % 2 else 'a joy'}", "label": n % 2} for n in range(60)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = make_spec(  # these paths lead where whoever opens them was started
        base__source="/proc/self/cwd/mini", data__train={"files": "/proc/self/cwd/rows.jsonl"},
        base__quantization={"kind": "rtn", "bits": 4, "group_size": 32}, data__train_rows=30, data__validation_rows=10,
        data__test_rows=10, placement={"workers": 2, "cpus_per_worker": 1, "members_per_worker": 1},
        optimization__steps=400,
    )
    found = scenario("strangers", spec, tmp_path, home)
    assert found["phase"] == "succeeded" and found["processes"] == 2
    fetched = [text for text in found["news"] if "fetched" in text]
    assert len(fetched) == 1 and fetched[0].endswith(": /proc/self/cwd/mini"), found["news"]
    (copy,) = found["copies"]
    assert copy.endswith("/mini/model.safetensors")
    (published,) = (tmp_path / "runs/_inputs").iterdir()
    assert (published / "files/model.safetensors").read_bytes() == (home / "mini/model.safetensors").read_bytes()
    monkeypatch.chdir(home)
    run_local(spec.model_copy(update={"storage_path": str(tmp_path / "local")}))
    assert_bit_equal(members(found["run"]), members(str(tmp_path / "local" / "demo")))
    config = "members/member-000/adapter_config.json"
    assert (tmp_path / "runs/demo" / config).read_text() == (tmp_path / "local/demo" / config).read_text()
    assert not (tmp_path / "local/_inputs").exists(), "nobody asked for it"
