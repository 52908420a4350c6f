"""The few kinds of Kubernetes' own that stand beside Ray's: their fields, and what they have to say."""

from __future__ import annotations

from collections.abc import Iterator

from raylora.kuberay.manifests import Document, Problem

_METADATA = {"name", "namespace", "labels", "annotations"}
_FIELDS: dict[str, tuple[str, set[str], set[str]]] = {
    "ServiceAccount": ("v1", {"automountServiceAccountToken", "imagePullSecrets"}, set()),
    "ConfigMap": ("v1", {"data", "binaryData", "immutable"}, set()),
    "PersistentVolumeClaim": ("v1", set(), {"accessModes", "resources", "storageClassName", "volumeMode",
                                           "volumeName", "selector"}),
    "NetworkPolicy": ("networking.k8s.io/v1", set(), {"podSelector", "policyTypes", "ingress", "egress"}),
    "PodMonitor": ("monitoring.coreos.com/v1", set(), {"selector", "podMetricsEndpoints", "namespaceSelector",
                                                      "jobLabel"}),
}
"""Kind -> apiVersion, fields beside metadata and spec, fields of its spec."""
_NEEDED = {"PersistentVolumeClaim": ("accessModes", "resources"), "NetworkPolicy": ("podSelector",),
           "PodMonitor": ("selector", "podMetricsEndpoints")}
_RAY = {"RayJob", "RayCluster", "RayService"}


def check_core_kind(document: Document) -> Iterator[Problem]:
    """Yield what is wrong with a manifest by its kind; Ray's are looked into elsewhere."""
    kind = document["kind"]
    for key in sorted(document["metadata"].keys() - _METADATA):
        yield Problem(f"metadata.{key}", "is not for people to set", "leave it out")
    if kind in _RAY:
        if document.get("apiVersion") != "ray.io/v1":
            yield Problem("apiVersion", f"{document.get('apiVersion')} is not what is checked here", "use ray.io/v1")
        return
    if kind not in _FIELDS:
        yield Problem("kind", f"{kind} is not known here", f"known: {', '.join(sorted({*_FIELDS, *_RAY}))}")
        return
    version, beside, in_spec = _FIELDS[kind]
    if document.get("apiVersion") != version:
        yield Problem("apiVersion", f"{document.get('apiVersion')}: {kind} is of {version}", f"use {version}")
    allowed = {"apiVersion", "kind", "metadata", *beside, *(["spec"] if in_spec else [])}
    for key in sorted(document.keys() - allowed):
        yield Problem(key, f"{kind} has no such field", f"known: {', '.join(sorted(allowed))}")
    spec = document.get("spec") or {}
    for key in sorted(spec.keys() - in_spec):
        yield Problem(f"spec.{key}", f"{kind} has no such field", f"known: {', '.join(sorted(in_spec))}")
    for key in _NEEDED.get(kind, ()):
        if key not in spec:
            yield Problem(f"spec.{key}", "is missing", "add it")
