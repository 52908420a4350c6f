"""A RayJob from a plan: as many pods as it has workers, as large as it says they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raylora.errors import UsageError
from raylora.kuberay.manifests import Document
from raylora.kuberay.quantities import gibibytes
from raylora.placement.estimate import RUNTIME_BYTES
from raylora.placement.plan import Plan
from raylora.placement.rooms import USABLE

SPEC_FOLDER, SPEC_FILE = "/etc/raylora", "spec.yaml"
RUNS = "/runs"
_LABELS = {"app.kubernetes.io/part-of": "raylora"}
SHM_BYTES = 2 * 2**30
"""Ray's object store: specs, plans and numbers travel in it, tensors do not."""
_GANG_SHM_BYTES = 6 * 2**30
"""More where the ranks of a gang exchange gradients and blocks through shared memory."""
_HEAD_CPUS, _HEAD_BYTES = 2, 8 * 2**30
_GPU = "nvidia.com/gpu"


@dataclass(frozen=True)
class PodSize:
    """One kind of worker pod, and how many of it."""

    replicas: int
    cpus: int
    gpus: int
    memory_bytes: int
    """The limit, shared memory included."""
    shm_bytes: int


def pod_size(plan: Plan, workers_per_pod: int) -> PodSize:
    """Return the pods that a plan's workers need.

    A gang stays in one pod if it fits there, since its ranks gather blocks from each other. Workers on GPUs otherwise
    have a pod each; workers on cores share one, since those of a pod read the same pages of the base.

    Args:
        workers_per_pod: how many processes a pod holds at most.
    """
    processes, is_split = plan.workers * plan.ranks, plan.strategy == "shard"
    if plan.gpus_per_worker:
        each = min(plan.ranks, max(1, workers_per_pod))
        whole_base = plan.parts.shared * (plan.ranks if is_split else 1)
        used = each * 2 * RUNTIME_BYTES + 2 * whole_base  # as it is read, and as it goes to the devices
    else:
        each = min(processes, max(1, workers_per_pod))
        used = each * plan.parts.own + (each if is_split else 1) * plan.parts.shared
    shm = _GANG_SHM_BYTES if plan.ranks > 1 else SHM_BYTES
    return PodSize(
        math.ceil(processes / each), each * plan.cpus_per_worker, each * plan.gpus_per_worker,
        math.ceil((used / USABLE + shm) / 2**30) * 2**30, shm,
    )


@dataclass(frozen=True)
class Job:
    """What is rendered, beside the size of its pods."""

    name: str
    """Of the run."""
    spec_text: str
    digest: str
    image: str
    storage: str
    """Where runs lie: ``RUNS``, with a claim, or the URI of an object store."""
    claim: str = ""
    """The volume claim that is mounted at ``RUNS``."""
    secret: str = ""
    """The Kubernetes secret whose keys are put into the environment, such as those of an object store."""
    queue: str = ""
    """Kueue's queue."""
    node_selector: Mapping[str, str] | None = None
    backoff_limit: int = 3
    deadline_s: int = 86400
    overrides: tuple[str, ...] = ()
    """Further changes of keys, as ``--set`` takes them."""


def render_job(job: Job, size: PodSize) -> list[Document]:
    """Return a ConfigMap with the spec and a RayJob that runs it, and goes on with it at each retry.

    Raises:
        UsageError: the image has no tag, which is where Ray's version stands.
    """
    version = version_of(job.image)
    name = f"train-{job.name}"
    labels = {**_LABELS, **({"kueue.x-k8s.io/queue-name": job.queue} if job.queue else {})}
    config = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": dict(_LABELS)},
        "data": {SPEC_FILE: job.spec_text},
    }
    ray_job = {
        "apiVersion": "ray.io/v1", "kind": "RayJob",
        "metadata": {"name": name, "labels": labels, "annotations": {"raylora/digest": job.digest}},
        "spec": {
            "entrypoint": " ".join([
                f"raylora run {SPEC_FOLDER}/{SPEC_FILE} --set storage_path={job.storage}",
                *(f"--set {override}" for override in job.overrides),
            ]),
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": 3600,
            "backoffLimit": job.backoff_limit, "activeDeadlineSeconds": job.deadline_s,
            **({"suspend": True} if job.queue else {}),
            "rayClusterSpec": {
                "rayVersion": version, "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"}, "template": _head(job, name),
                },
                "workerGroupSpecs": [{
                    "groupName": "gpu" if size.gpus else "workers", "replicas": size.replicas,
                    "minReplicas": size.replicas, "maxReplicas": size.replicas,
                    "rayStartParams": {"object-store-memory": str(size.shm_bytes * 9 // 10)},
                    "template": _worker(job, name, size),
                }],
            },
            "submitterPodTemplate": _template(_container(job, "ray-job-submitter", 1, 2**30, {}), [], "Never"),
        },
    }
    return [config, ray_job]


def version_of(image: str) -> str:
    """Return an image's tag, which is Ray's version. Raises: UsageError."""
    tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
    if not tag:
        raise UsageError(f"--image: {image} has no tag", "name it NAME:VERSION, with the version of Ray that is in it")
    return tag


def _head(job: Job, name: str) -> Document:
    mounts = {"shm": "/dev/shm", "ray": "/tmp/ray", "cache": "/cache", "spec": SPEC_FOLDER}
    container = _container(job, "ray-head", _HEAD_CPUS, _HEAD_BYTES, mounts)
    container["env"].append({"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "60"})
    ports = {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
    container["ports"] = [{"name": key, "containerPort": port} for key, port in ports.items()]
    volumes = [*_volumes(job, SHM_BYTES), {"name": "spec", "configMap": {"name": name}}]
    return _template(container, volumes)


def _worker(job: Job, name: str, size: PodSize) -> Document:
    mounts = {"shm": "/dev/shm", "ray": "/tmp/ray", "cache": "/cache"}
    container = _container(job, "ray-worker", size.cpus, size.memory_bytes, mounts)
    container["ports"] = [{"name": "metrics", "containerPort": 8080}]
    template = _template(container, _volumes(job, size.shm_bytes))
    template["spec"]["terminationGracePeriodSeconds"] = 60
    if size.gpus:
        for part in container["resources"].values():
            part[_GPU] = str(size.gpus)
        template["spec"]["tolerations"] = [{"key": _GPU, "operator": "Exists", "effect": "NoSchedule"}]
    if job.node_selector:
        template["spec"]["nodeSelector"] = dict(job.node_selector)
    return template


def _container(job: Job, name: str, cpus: int, memory_bytes: int, mounts: Mapping[str, str]) -> Document:
    resources = {"cpu": str(cpus), "memory": gibibytes(memory_bytes)}
    container: dict[str, Any] = {
        "name": name, "image": job.image, "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if mounts:
        container["env"] = [{"name": "RAYLORA_CACHE", "value": "/cache"}]
        found = {**mounts, **({"runs": RUNS} if job.claim else {})}
        container["volumeMounts"] = [{"name": volume, "mountPath": path} for volume, path in found.items()]
        if job.secret:
            container["envFrom"] = [{"secretRef": {"name": job.secret}}]
    return container


def _volumes(job: Job, shm_bytes: int) -> list[Document]:
    volumes: list[Document] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": gibibytes(shm_bytes)}},
        {"name": "ray", "emptyDir": {"sizeLimit": "20Gi"}}, {"name": "cache", "emptyDir": {"sizeLimit": "60Gi"}},
    ]
    if job.claim:
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": job.claim}})
    return volumes


def _template(container: Document, volumes: list[Document], restart: str = "") -> Document:
    nobody = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000,
              "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "metadata": {"labels": dict(_LABELS)},
        "spec": {
            **({"restartPolicy": restart} if restart else {}), "serviceAccountName": "raylora",
            "automountServiceAccountToken": False, "securityContext": nobody, "containers": [container],
            **({"volumes": volumes} if volumes else {}),
        },
    }
