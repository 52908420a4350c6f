"""A RayJob from a spec and its plan; ``raylora cluster`` as people use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from raylora.cli import app
from raylora.cli.cluster import parse_entrypoint
from raylora.kuberay.manifests import pods_of
from raylora.kuberay.quantities import amount
from raylora.kuberay.render import SHM_BYTES, PodSize, pod_size
from raylora.kuberay.schema import read_definitions
from raylora.placement.estimate import RUNTIME_BYTES, Parts
from raylora.placement.plan import Plan
from raylora.spec import parse_spec

_ROOT = Path(__file__).resolve().parents[2]
_CRDS = _ROOT.parent / "shared" / "kuberay-crds"
_SPEC = str(_ROOT / "examples" / "quickstart.yaml")
_GB = 10**9


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["cluster", *arguments])


def rendered(*arguments: str, spec: str = _SPEC) -> tuple[dict[str, Any], dict[str, Any]]:
    done = call("render", spec, *arguments)
    assert done.exit_code == 0, done.output
    config, job = yaml.safe_load_all(done.stdout)
    return config, job


def plan(workers: int, gpus: int = 1, ranks: int = 1, cpus: int = 4, strategy: str = "replicate", **parts: int) -> Plan:
    return Plan(workers, cpus, gpus, (), Parts(**parts), (), strategy, ranks)


# --- sizes follow from the plan ---------------------------------------------------------------------------
def test_workers_on_gpus_have_a_pod_each() -> None:
    size = pod_size(plan(5, base=10 * _GB), 8)
    assert (size.replicas, size.cpus, size.gpus) == (5, 4, 1)
    assert size.memory_bytes * 0.8 >= 20 * _GB + 2 * RUNTIME_BYTES and size.shm_bytes == SHM_BYTES


def test_a_gang_has_one_pod_with_room_for_the_whole_base() -> None:
    size = pod_size(plan(2, ranks=4, strategy="shard", base=10 * _GB), 8)
    assert (size.replicas, size.cpus, size.gpus) == (2, 16, 4)
    assert size.memory_bytes > 80 * _GB and size.shm_bytes > SHM_BYTES


def test_a_gang_larger_than_a_node_is_parted() -> None:
    size = pod_size(plan(1, ranks=16, strategy="shard", base=_GB), 8)
    assert (size.replicas, size.gpus) == (2, 8)


def test_partners_of_one_base_need_room_for_it_once() -> None:
    partners = pod_size(plan(1, ranks=2, strategy="replicate", base=10 * _GB), 8)
    assert partners.gpus == 2 and partners.memory_bytes < 40 * _GB


def test_workers_on_cores_share_a_pod_and_the_pages_of_its_base() -> None:
    size = pod_size(plan(4, gpus=0, cpus=2, base=3 * _GB, runtime=_GB), 2)
    assert size == PodSize(2, 4, 0, size.memory_bytes, SHM_BYTES)
    assert 5 * _GB / 0.8 <= size.memory_bytes - SHM_BYTES < 5 * _GB / 0.8 + 2**30
    alone = pod_size(plan(1, gpus=0, cpus=2, base=3 * _GB, runtime=_GB), 2)
    assert alone.replicas == 1 and alone.memory_bytes < size.memory_bytes


# --- raylora cluster render -------------------------------------------------------------------------------
def test_a_job_for_gpus_has_a_pod_per_member_and_resumes_on_a_shared_volume() -> None:
    config, job = rendered("--gpus", "8", "--gpu-type", "H100", "--image", "registry:5000/me/raylora:2.60.0")
    spec = parse_spec(config["data"]["spec.yaml"])
    assert job["metadata"]["name"] == "train-quickstart"
    assert job["metadata"]["annotations"]["raylora/digest"] == spec.digest()
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == spec.ensemble.members
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] and resources["limits"]["nvidia.com/gpu"] == "1"
    shm = group["template"]["spec"]["volumes"][0]["emptyDir"]["sizeLimit"]
    assert int(group["rayStartParams"]["object-store-memory"]) < (amount(shm) or 0)
    parameters = parse_entrypoint(job["spec"]["entrypoint"].split())
    assert parameters["overrides"] == ["storage_path=/runs"] and job["spec"]["backoffLimit"] > 0
    head = pods_of(job)[0].spec
    folder = next(m["mountPath"] for m in head["containers"][0]["volumeMounts"] if m["name"] == "spec")
    assert str(parameters["spec_file"]) == f"{folder}/spec.yaml"
    assert {c["image"] for pod in pods_of(job) for _, c in pod.containers()} == {"registry:5000/me/raylora:2.60.0"}


def test_members_that_are_more_than_the_gpus_are_packed() -> None:
    _, job = rendered("--gpus", "2", "--gpu-type", "l4")
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2


def test_a_job_for_cores_asks_for_no_gpu() -> None:
    _, job = rendered("--nodes", "2", "--cpus", "4", "--memory", "16GB")
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["replicas"] == 2 and group["groupName"] == "workers"
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["cpu"] == "4" and "nvidia.com/gpu" not in limits
    assert (amount(limits["memory"]) or 0) <= 16 * _GB


def test_a_job_may_keep_its_runs_in_an_object_store_and_wait_in_a_queue() -> None:
    _, job = rendered("--gpus", "4", "--gpu-memory", "96GB", "--storage", "s3://lab/runs", "--secret", "keys",
                      "--queue", "team", "--node-selector", "pool=gpu", "--set", "name=other")
    assert "storage_path=s3://lab/runs" in job["spec"]["entrypoint"] and job["spec"]["suspend"] is True
    assert job["metadata"]["name"] == "train-other"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    for pod in pods_of(job):
        assert not any("persistentVolumeClaim" in volume for volume in pod.spec.get("volumes", []))
        assert pod.role == "submitter" or pod.ray_container()["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert pods_of(job)[1].spec["nodeSelector"] == {"pool": "gpu"}


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--gpus", "8"], "needs --gpu-type"),
    (["--gpus", "8", "--gpu-type", "H10"], "did you mean 'H100'?"),
    (["--gpus", "8", "--gpu-memory", "much"], "--gpu-memory: 'much' is no size"),
    (["--memory", "32"], "--memory: '32' is no size"),
    (["--gpus", "8", "--gpu-type", "H100", "--image", "raylora"], "has no tag"),
    (["--gpus", "8", "--gpu-type", "H100", "--image", "raylora:2.1.0"], "installed with Ray"),
    (["--storage", "/scratch"], "is no object store"),
    (["--node-selector", "gpu"], "KEY=VALUE"),
    (["--memory", "1GB"], "one member needs"),
    (["--set", "data.train={files: rows.jsonl}", "--set", "data.train_rows=null"], "rows.jsonl: is a local path"),
    (["--set", "base.source=/models/bert"], "/models/bert: is a local path"),
])
def test_what_cannot_be_rendered_is_one_message_and_exit_code_2(arguments: list[str], expected: str) -> None:
    done = call("render", _SPEC, *arguments)
    assert done.exit_code == 2, done.output
    assert expected in " ".join(done.stderr.split()) and not done.stdout


def test_paths_on_the_volume_claim_are_reachable(tmp_path: Path) -> None:
    _, job = rendered("--set", "data.train={files: /runs/data/rows.jsonl}", "--set", "name=own")
    assert job["metadata"]["name"] == "train-own"


# --- raylora cluster check --------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [["--gpus", "8", "--gpu-type", "H100"], ["--storage", "s3://lab/runs"], []])
def test_what_is_rendered_fits_the_definitions(options: list[str], tmp_path: Path) -> None:
    if not _CRDS.is_dir():
        pytest.skip(f"the CRDs of KubeRay are not in {_CRDS}")
    assert ("ray.io/v1", "RayJob") in read_definitions(_CRDS)
    done = call("render", _SPEC, *options)
    (tmp_path / "job.yaml").write_text(done.stdout)
    checked = call("check", str(tmp_path / "job.yaml"), "--crds", str(_CRDS))
    assert checked.exit_code == 0, checked.output


def test_check_names_file_manifest_and_place(tmp_path: Path) -> None:
    good = call("render", _SPEC)
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.stdout.replace("backoffLimit: 3", "backoffLimit: -3"))
    done = call("check", str(_ROOT / "cluster" / "overlays" / "cpu"), str(bad))
    assert done.exit_code == 2
    assert f"{bad}: RayJob/train-quickstart: spec.backoffLimit: is negative" in done.stdout
    as_json = call("check", str(bad), "--json")
    assert as_json.exit_code == 2 and len(json.loads(as_json.stdout)["problems"]) == 1


@pytest.mark.parametrize(("content", "expected"), [
    (None, "cannot be read"), ("", "holds no manifest"), ("a: [", "is not YAML"), ("a: 1", "no kind and metadata"),
])
def test_what_is_no_manifest_is_refused(content: str | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    done = call("check", str(path))
    assert done.exit_code == 2 and expected in " ".join(done.stderr.split())


def test_a_folder_without_definitions_is_refused(tmp_path: Path) -> None:
    done = call("check", str(_ROOT / "cluster" / "overlays" / "cpu"), "--crds", str(tmp_path))
    assert done.exit_code == 2 and "holds no CustomResourceDefinition" in " ".join(done.stderr.split())
