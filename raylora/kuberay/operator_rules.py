"""What KubeRay's operator refuses, or acts on wrongly, although the definitions of its resources allow it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from raylora.kuberay.manifests import Document, Problem, cluster_of, groups_of, name_of, pods_of

_LONGEST_NAME = {"RayJob": 47, "RayService": 47, "RayCluster": 53}
"""The operator adds to them what it calls services and pods."""
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_TOKENS_SINCE = (2, 52)
_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_QUEUE = "kueue.x-k8s.io/queue-name"
_GPU = "nvidia.com/gpu"


def check_operator_rules(document: Document) -> Iterator[Problem]:
    """Yield what the operator would refuse in a manifest of Ray."""
    kind, name = document["kind"], str(document["metadata"].get("name", ""))
    if kind not in _LONGEST_NAME:
        return
    if len(name) > _LONGEST_NAME[kind]:
        yield Problem("metadata.name", f"{len(name)} characters, and {kind} takes {_LONGEST_NAME[kind]}", "shorten it")
    if not _NAME.fullmatch(name):
        yield Problem("metadata.name", f"{name!r} is no name for a service", "use a-z, 0-9 and -, a letter first")
    if kind == "RayJob":
        yield from _job(document)
    cluster = cluster_of(document)
    if cluster is not None:
        yield from _versions(cluster)
        yield from _groups(cluster)
        yield from _autoscaling(cluster, document)
        yield from _devices(document)


def _job(document: Document) -> Iterator[Problem]:
    spec = document.get("spec") or {}
    shuts_down = bool(spec.get("shutdownAfterJobFinishes"))
    mode = spec.get("submissionMode", "K8sJobMode")
    if bool(spec.get("rayClusterSpec")) == bool(spec.get("clusterSelector")):
        yield Problem(name_of(document), "needs either rayClusterSpec or clusterSelector", "give exactly one")
    if mode not in _MODES:
        yield Problem("spec.submissionMode", f"{mode!r} is none", f"use one of {', '.join(_MODES)}")
    if mode != "InteractiveMode" and not spec.get("entrypoint"):
        yield Problem("spec.entrypoint", "is missing", "say what is to be run")
    if (spec.get("ttlSecondsAfterFinished") or 0) > 0 and not shuts_down:
        yield Problem("spec.ttlSecondsAfterFinished", "needs shutdownAfterJobFinishes: true", "set it")
    if (spec.get("deletionStrategy") or {}).get("deletionRules") and shuts_down:
        yield Problem("spec.deletionStrategy", "rules and shutdownAfterJobFinishes exclude each other", "keep one")
    yield from _deletion(spec.get("deletionStrategy"))
    if spec.get("suspend") and not shuts_down:
        yield Problem("spec.suspend", "needs shutdownAfterJobFinishes: true", "set it")
    if spec.get("suspend") and spec.get("clusterSelector"):
        yield Problem("spec.suspend", "is not for a job on a cluster of others", "leave clusterSelector out")
    if (spec.get("backoffLimit") or 0) < 0:
        yield Problem("spec.backoffLimit", "is negative", "use 0 or more")
    if spec.get("backoffLimit") and (spec.get("clusterSelector") or mode == "InteractiveMode"):
        yield Problem("spec.backoffLimit", "a retry is a new cluster, and this job has none of its own", "leave it out")
    if "activeDeadlineSeconds" in spec and (spec["activeDeadlineSeconds"] or 0) <= 0:
        yield Problem("spec.activeDeadlineSeconds", "is not positive", "give seconds, or leave it out")
    queue = (document["metadata"].get("labels") or {}).get(_QUEUE)
    if queue is not None and not shuts_down:
        yield Problem(f"metadata.labels.{_QUEUE}", "quota is given back by shutdownAfterJobFinishes: true", "set it")
    submitter = ((spec.get("submitterPodTemplate") or {}).get("spec") or {}).get("restartPolicy", "Never")
    if submitter not in ("Never", "OnFailure"):
        yield Problem("spec.submitterPodTemplate.spec.restartPolicy", f"{submitter}: it is the pod of a Job",
                      "set Never or OnFailure")
    yield from _runtime_env(spec)


def _deletion(strategy: Document | None) -> Iterator[Problem]:
    """The two rules that the definition says in a language of its own."""
    if strategy is None:
        return
    legacy = [key for key in ("onSuccess", "onFailure") if key in strategy]
    rules = strategy.get("deletionRules")
    if legacy and rules:
        yield Problem("spec.deletionStrategy", f"{legacy[0]} and deletionRules exclude each other", "keep the rules")
    if not rules and len(legacy) != 2:
        yield Problem("spec.deletionStrategy", "has neither rules nor both onSuccess and onFailure",
                      "give deletionRules")


def _runtime_env(spec: Document) -> Iterator[Problem]:
    text = spec.get("runtimeEnvYAML")
    if text is None:
        return
    try:
        is_mapping = isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        is_mapping = False
    if not is_mapping:
        yield Problem("spec.runtimeEnvYAML", "is no YAML mapping", "write `env_vars: {...}` and the like")


def _versions(cluster: Document) -> Iterator[Problem]:
    version = str(cluster.get("rayVersion", ""))
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if (cluster.get("authOptions") or {}).get("mode") == "token" and numbers < _TOKENS_SINCE:
        yield Problem("rayVersion", f"{version or 'none'}: tokens are understood since 2.52", "use a newer Ray")


def _groups(cluster: Document) -> Iterator[Problem]:
    names = [group.get("groupName") for group in groups_of(cluster)]
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        yield Problem("workerGroupSpecs", f"two groups are called {name}", "rename one")
    for index, group in enumerate(groups_of(cluster)):
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        replicas = group.get("replicas", least)
        if not all(isinstance(number, int) for number in (least, most, replicas)):
            continue  # the definition says so
        if not least <= replicas <= most:
            yield Problem(f"workerGroupSpecs[{index}]", f"{replicas} replicas are not within {least} to {most}",
                          "set minReplicas <= replicas <= maxReplicas")


def _autoscaling(cluster: Document, document: Document) -> Iterator[Problem]:
    on = bool(cluster.get("enableInTreeAutoscaling"))
    if cluster.get("autoscalerOptions") and not on:
        yield Problem("autoscalerOptions", "nothing scales", "set enableInTreeAutoscaling: true, or leave them out")
    if not on:
        return
    if (cluster.get("autoscalerOptions") or {}).get("version") == "v2":
        for pod in pods_of(document):
            if pod.role != "submitter" and pod.spec.get("restartPolicy", "Never") != "Never":
                yield Problem(f"{pod.path}.restartPolicy", "autoscaler v2 replaces pods itself", "set Never")
    head = next((pod for pod in pods_of(document) if pod.role == "head"), None)
    if head is not None and head.spec.get("automountServiceAccountToken") is False:
        yield Problem(f"{head.path}.automountServiceAccountToken", "the autoscaler asks the API for pods by that token",
                      "set it to true")


def _devices(document: Document) -> Iterator[Problem]:
    for pod in pods_of(document):
        for path, container in pod.containers():
            resources = container.get("resources") or {}
            asked, limit = ((resources.get(key) or {}).get(_GPU) for key in ("requests", "limits"))
            if asked is not None and str(asked) != str(limit):
                yield Problem(f"{path}.resources", f"requests {asked} GPUs, and the limit is {limit}",
                              f"set limits.{_GPU} to what is requested")
            tolerated = [toleration.get("key") for toleration in pod.spec.get("tolerations") or []]
            if limit is not None and _GPU not in tolerated:
                yield Problem(f"{pod.path}.tolerations", "nodes with GPUs keep other pods off",
                              f"tolerate {_GPU}: Exists")
