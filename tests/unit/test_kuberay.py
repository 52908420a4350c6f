"""Manifests for KubeRay: all that lie in ``cluster/`` are valid, and the checks catch what is not."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raylora.cli.cluster import parse_entrypoint
from raylora.errors import UsageError
from raylora.kuberay.checking import check_manifests
from raylora.kuberay.kustomize import render_kustomization
from raylora.kuberay.manifests import Document, pods_of
from raylora.kuberay.quantities import amount, gibibytes
from raylora.kuberay.schema import Schemas, read_definitions, with_defaults

_ROOT = Path(__file__).resolve().parents[2]
_CRDS = _ROOT.parent / "shared" / "kuberay-crds"
_OVERLAYS = sorted(path.name for path in (_ROOT / "cluster" / "overlays").iterdir())
_PINS = dict(
    line.split(" ")[0].split("==") for line in (_ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)
Change = Callable[[Document], object]


@pytest.fixture(scope="session")
def schemas() -> Schemas:
    if not _CRDS.is_dir():
        pytest.skip(f"the CRDs of KubeRay are not in {_CRDS}")
    return read_definitions(_CRDS)


def overlay(name: str) -> list[Document]:
    return render_kustomization(_ROOT / "cluster" / "overlays" / name)


def says(documents: list[Document], schemas: Schemas | None = None) -> list[str]:
    return [str(one) for one in check_manifests(documents, _PINS["ray"], parse_entrypoint, schemas)]


def test_there_is_an_overlay_for_every_way_to_run_it() -> None:
    assert {"dev", "cpu", "gpu", "gpu-autoscaling", "kueue"} <= set(_OVERLAYS)


@pytest.mark.parametrize("name", _OVERLAYS)
def test_an_overlay_keeps_every_rule(name: str) -> None:
    assert says(overlay(name)) == []


@pytest.mark.parametrize("name", _OVERLAYS)
def test_an_overlay_fits_the_definitions_of_kuberay(name: str, schemas: Schemas) -> None:
    assert says(overlay(name), schemas) == []


@pytest.mark.parametrize("name", _OVERLAYS)
def test_an_overlay_is_what_kubectl_renders(name: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(_ROOT / "cluster" / "overlays" / name)],
        capture_output=True, text=True, timeout=60, check=True,
    )

    def by_name(documents: list[Any]) -> list[Any]:
        return sorted(documents, key=lambda one: (one["kind"], one["metadata"]["name"]))

    assert by_name(list(yaml.safe_load_all(done.stdout))) == by_name(overlay(name))


@pytest.mark.parametrize("name", _OVERLAYS)
def test_an_overlay_refers_only_to_what_it_holds(name: str) -> None:
    documents = overlay(name)
    held = {(one["kind"], one["metadata"]["name"]) for one in documents}
    policy = next(one for one in documents if one["kind"] == "NetworkPolicy")
    chosen = policy["spec"]["podSelector"]["matchLabels"].items()
    pods = [pod for one in documents for pod in pods_of(one)]
    assert {pod.role for pod in pods} >= {"head", "worker"}
    for pod in pods:
        assert ("ServiceAccount", pod.spec["serviceAccountName"]) in held
        assert chosen <= pod.labels.items()
        for volume in pod.spec.get("volumes", []):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or ("PersistentVolumeClaim", claim) in held


# --- seeded mistakes --------------------------------------------------------------------------------------
def head(job: Document) -> Document:
    return job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


def group(job: Document) -> Document:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def worker(job: Document) -> Document:
    return group(job)["template"]["spec"]


def ray(job: Document) -> Document:
    return worker(job)["containers"][0]


def autoscaling(job: Document, **options: Any) -> None:
    secure = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    job["spec"]["rayClusterSpec"] |= {
        "enableInTreeAutoscaling": True, "autoscalerOptions": {"version": "v2", "securityContext": secure, **options},
    }
    head(job)["automountServiceAccountToken"] = True


_MISTAKES: dict[str, tuple[Change, str]] = {
    "name too long": (lambda j: j["metadata"].update(name="a" * 48), "48 characters"),
    "name no label": (lambda j: j["metadata"].update(name="Train_1"), "no name for a service"),
    "ttl without shutdown": (lambda j: j["spec"].update(shutdownAfterJobFinishes=False), "ttlSecondsAfterFinished"),
    "deletion rules and shutdown": (
        lambda j: j["spec"].update(deletionStrategy={"deletionRules": [
            {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 5}}]}),
        "exclude each other"),
    "half a deletion policy": (
        lambda j: j["spec"].update(deletionStrategy={"onSuccess": {"policy": "DeleteCluster"}}), "both onSuccess"),
    "no cluster": (lambda j: j["spec"].pop("rayClusterSpec"), "either rayClusterSpec"),
    "unknown mode": (lambda j: j["spec"].update(submissionMode="K8sJob"), "is none"),
    "negative retries": (lambda j: j["spec"].update(backoffLimit=-1), "negative"),
    "no deadline at all": (lambda j: j["spec"].update(activeDeadlineSeconds=0), "not positive"),
    "suspended, and kept": (
        lambda j: (j["spec"].pop("ttlSecondsAfterFinished"), j["spec"].update(
            shutdownAfterJobFinishes=False, suspend=True)), "spec.suspend"),
    "quota never given back": (
        lambda j: (j["spec"].pop("ttlSecondsAfterFinished"), j["spec"].update(shutdownAfterJobFinishes=False),
                   j["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "q"})), "quota"),
    "submitter starts forever": (
        lambda j: j["spec"]["submitterPodTemplate"]["spec"].update(restartPolicy="Always"), "pod of a Job"),
    "environment is no mapping": (lambda j: j["spec"].update(runtimeEnvYAML="- pip"), "no YAML mapping"),
    "tokens before they were": (
        lambda j: j["spec"]["rayClusterSpec"].update(rayVersion="2.51.0"), "understood since 2.52"),
    "another Ray in the image": (lambda j: ray(j).update(image="raylora:2.59.0"), "not tagged"),
    "image without a tag": (lambda j: ray(j).update(image="registry:5000/raylora"), "not tagged"),
    "another Ray in the manifest": (
        lambda j: j["spec"]["rayClusterSpec"].update(rayVersion="2.61.0"), "installed with Ray"),
    "no token": (lambda j: j["spec"]["rayClusterSpec"].pop("authOptions"), "runs code on it"),
    "members on the head": (
        lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"].update(rayStartParams={}), "train on the head"),
    "more replicas than most": (lambda j: group(j).update(replicas=9), "not within"),
    "two groups of a name": (
        lambda j: j["spec"]["rayClusterSpec"]["workerGroupSpecs"].append(copy.deepcopy(group(j))), "two groups"),
    "GPUs requested, not limited": (
        lambda j: ray(j)["resources"]["limits"].pop("nvidia.com/gpu"), "requests 1 GPUs"),
    "GPUs not tolerated": (lambda j: worker(j).pop("tolerations"), "keep other pods off"),
    "autoscaler v2 restarts": (
        lambda j: (autoscaling(j), worker(j).update(restartPolicy="Always")), "replaces pods itself"),
    "autoscaler without a token": (
        lambda j: (autoscaling(j), head(j).update(automountServiceAccountToken=False)), "by that token"),
    "autoscaler with privileges": (lambda j: autoscaling(j, securityContext={}), "may gain privileges"),
    "options of no autoscaler": (
        lambda j: j["spec"]["rayClusterSpec"].update(autoscalerOptions={"version": "v2"}), "nothing scales"),
    "root": (lambda j: worker(j)["securityContext"].update(runAsNonRoot=False), "may run as root"),
    "user 0": (lambda j: worker(j)["securityContext"].update(runAsUser=0), "user 0"),
    "no seccomp": (lambda j: worker(j)["securityContext"].pop("seccompProfile"), "no seccomp"),
    "escalation": (lambda j: ray(j)["securityContext"].pop("allowPrivilegeEscalation"), "may gain privileges"),
    "privileged": (lambda j: ray(j)["securityContext"].update(privileged=True), "is privileged"),
    "capabilities kept": (lambda j: ray(j)["securityContext"].update(capabilities={}), "keeps capabilities"),
    "capability added": (
        lambda j: ray(j)["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]), "adds capabilities"),
    "the host's disk": (
        lambda j: worker(j)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "hostPath volumes"),
    "the host's network": (lambda j: worker(j).update(hostNetwork=True), "host's namespaces"),
    "a port of the host": (lambda j: ray(j)["ports"][0].update(hostPort=8080), "of the host"),
    "mount without a volume": (
        lambda j: ray(j)["volumeMounts"].append({"name": "lost", "mountPath": "/x"}), "no volume lost"),
    "shared memory as large as all": (
        lambda j: worker(j)["volumes"][0]["emptyDir"].update(sizeLimit="32Gi"), "more than half"),
    "no memory limit": (lambda j: ray(j)["resources"]["limits"].pop("memory"), "no memory limit"),
    "misspelt command": (lambda j: j["spec"].update(entrypoint="raylora rum spec.yaml"), "no command of raylora"),
    "misspelt option": (
        lambda j: j["spec"].update(entrypoint="raylora run spec.yaml --sett a=b"), "no command of raylora"),
    "another program": (lambda j: j["spec"].update(entrypoint="python train.py"), "is not raylora"),
    "runs on a pod's own disk": (
        lambda j: j["spec"].update(entrypoint="raylora run spec.yaml"), "lost with the old one's disk"),
    "runs beside the claim": (
        lambda j: j["spec"].update(entrypoint="raylora run s.yaml --set storage_path=/cache"), "no volume claim"),
    "old version of the resource": (lambda j: j.update(apiVersion="ray.io/v1alpha1"), "use ray.io/v1"),
}
_MISTAKES_IN_FIELDS: dict[str, tuple[Change, str]] = {
    "unknown field": (lambda j: j["spec"].update(shutdownAfterJobFinished=True), "shutdownAfterJobFinished"),
    "unknown field of a pod": (lambda j: worker(j).update(toleration=[]), "toleration"),
    "a number for a text": (lambda j: group(j).update(rayStartParams={"num-gpus": 1}), "not of type 'string'"),
    "a text for a number": (lambda j: group(j).update(replicas="4"), "not of type 'integer'"),
    "group without a name": (lambda j: group(j).pop("groupName"), "groupName"),
    "head without a template": (
        lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"].pop("template"), "template"),
    "unknown policy": (
        lambda j: j["spec"].update(deletionStrategy={"onSuccess": {"policy": "DeleteAll"}}), "DeleteAll"),
    "unknown token mode": (
        lambda j: j["spec"]["rayClusterSpec"].update(authOptions={"mode": "tokens"}), "tokens"),
    "no such resource": (lambda j: j.update(apiVersion="ray.io/v2"), "has no kind RayJob"),
}


def mutated(change: Change) -> list[Document]:
    documents = copy.deepcopy(overlay("gpu"))
    change(next(one for one in documents if one["kind"] == "RayJob"))
    return documents


@pytest.mark.parametrize("mistake", _MISTAKES)
def test_a_mistake_is_caught(mistake: str) -> None:
    change, expected = _MISTAKES[mistake]
    found = says(mutated(change))
    assert any(expected in one for one in found), found
    assert all(one.startswith("RayJob/") for one in found)


@pytest.mark.parametrize("mistake", _MISTAKES_IN_FIELDS)
def test_a_mistake_in_a_field_is_caught_by_the_definitions(mistake: str, schemas: Schemas) -> None:
    change, expected = _MISTAKES_IN_FIELDS[mistake]
    found = says(mutated(change), schemas)
    assert any(expected in one for one in found), found


@pytest.mark.parametrize(("kind", "change", "expected"), [
    ("PersistentVolumeClaim", lambda c: c["spec"].pop("accessModes"), "is missing"),
    ("PersistentVolumeClaim", lambda c: c["spec"].update(accessMode="x"), "no such field"),
    ("NetworkPolicy", lambda c: c.update(apiVersion="v1"), "is of networking.k8s.io/v1"),
    ("ServiceAccount", lambda c: c.update(spec={}), "no such field"),
    ("PodMonitor", lambda c: c.update(kind="PodMonitors"), "not known here"),
    ("ServiceAccount", lambda c: c["metadata"].update(uid="1"), "not for people to set"),
])
def test_a_mistake_beside_ray_is_caught(kind: str, change: Change, expected: str) -> None:
    documents = copy.deepcopy(overlay("gpu"))
    change(next(one for one in documents if one["kind"] == kind))
    assert any(expected in one for one in says(documents))


def test_defaults_are_filled_in_before_fields_are_checked(schemas: Schemas) -> None:
    job = next(one for one in overlay("gpu") if one["kind"] == "RayJob")
    group(job).pop("minReplicas")
    assert says([job], schemas) == []  # required, and filled in
    filled = with_defaults(job, schemas["ray.io/v1", "RayJob"])
    assert group(filled)["minReplicas"] == 0 and group(filled)["numOfHosts"] == 1


# --- kustomize --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "expected"), [
    ("resources: [a.yaml]\nnamePrefix: x-\n", "namePrefix is not known here"),
    ("resources: [b.yaml]\n", "cannot be read"),
    ("resources: [a.yaml]\npatches: [{target: {kind: RayJob}, patch: '[{op: replace, path: /spec/x, value: 1}]'}]\n",
     "fits nothing in RayJob"),
    ("resources: [a.yaml]\npatches: [{target: {kind: RayJob}, patch: '[{op: move, path: /spec/x}]'}]\n",
     "fits nothing in RayJob"),
    ("resources: [a.yaml]\npatches: [{target: {labelSelector: x}, patch: '[]'}]\n", "use kind and name"),
    ("resources: [a.yaml]\npatches: [{target: {kind: Secret}, patch: '{data: {}}'}]\n", "depend on its lists' keys"),
])
def test_what_would_be_rendered_differently_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text(text)
    (tmp_path / "a.yaml").write_text(
        "{apiVersion: ray.io/v1, kind: RayJob, metadata: {name: a}, spec: {}}\n---\n"
        "{apiVersion: v1, kind: Secret, metadata: {name: b}}\n"
    )
    with pytest.raises(UsageError, match=re.escape(expected)):
        render_kustomization(tmp_path)


# --- versions and the image -------------------------------------------------------------------------------
def test_the_dockerfile_pins_what_the_constraints_pin_and_is_not_root() -> None:
    text = (_ROOT / "cluster" / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE))
    assert arguments["RAY_VERSION"] == _PINS["ray"] and arguments["TORCH_VERSION"] == _PINS["torch"]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-\S+", arguments["BASE"])
    assert set(re.findall(r"-t \S+:(\S+)", text)) == {_PINS["ray"]}
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] == "1000:1000"
    installs = re.findall(r"pip install (.*)", text)
    assert installs and all("-c constraints.txt" in one or "--no-deps" in one for one in installs)


def test_the_image_is_made_of_files_that_are_there_and_sent_to_the_builder() -> None:
    text = (_ROOT / "cluster" / "Dockerfile").read_text()
    sent = (_ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [name for line in re.findall(r"^COPY (?!--from)(.*)", text, re.MULTILINE) for name in line.split()[:-1]]
    assert copied
    for name in copied:
        assert (_ROOT / name).exists() and f"!{name}" in sent, name


def test_every_manifest_says_the_version_of_the_constraints() -> None:
    files = [path for path in (_ROOT / "cluster").rglob("*") if path.is_file()]
    found = [version for path in files for version in re.findall(r"raylora(?:-cuda)?:(\d[\d.]*)", path.read_text())]
    assert len(found) > 5 and set(found) == {_PINS["ray"]}


# --- small parts ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "expected"), [("12Gi", 12 * 2**30), ("500m", 0.5), ("2", 2.0), ("1.5G", 1.5e9)])
def test_quantities_are_read(text: str, expected: float) -> None:
    assert amount(text) == expected


def test_quantities_are_written_so_that_they_hold_what_is_asked() -> None:
    assert gibibytes(1) == "1Gi" and gibibytes(2**30 + 1) == "2Gi" and amount("much") is None


@pytest.mark.parametrize(("command", "key", "value"), [
    ("raylora run a.yaml --set x=1 --json", "overrides", ["x=1"]),
    ("python -m raylora distill runs/a --student s.yaml", "run_path", "runs/a"),
    ("raylora cluster check a.yaml", "ray_version", ""),
])
def test_entrypoints_are_parsed_as_the_command_line_does(command: str, key: str, value: object) -> None:
    assert parse_entrypoint(command.split())[key] == value


@pytest.mark.parametrize("command", ["", "raylora", "raylora run", "raylora run a --help", "ray job list"])
def test_what_the_command_line_would_not_run_is_no_entrypoint(command: str) -> None:
    with pytest.raises(UsageError):
        parse_entrypoint(command.split())
