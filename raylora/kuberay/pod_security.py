"""The restricted level of Kubernetes' pod security standards, which a namespace may enforce on every pod."""

from __future__ import annotations

from collections.abc import Iterator

from raylora.kuberay.manifests import Document, Pod, Problem, cluster_of, pods_of

_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}
_PROFILES = ("RuntimeDefault", "Localhost")


def check_pod_security(document: Document) -> Iterator[Problem]:
    """Yield what the restricted level would refuse in a manifest's pods."""
    for pod in pods_of(document):
        yield from _pod_problems(pod)
        for path, container in pod.containers():
            yield from _container_problems(path, container, pod.spec.get("securityContext") or {})
    autoscaler = _autoscaler_of(document)
    if autoscaler is not None:
        head = pods_of(document)[0].spec.get("securityContext") or {}
        yield from _container_problems("autoscalerOptions", autoscaler, head)


def _autoscaler_of(document: Document) -> Document | None:
    """Return the options of the container that the operator puts beside the head, if it does."""
    cluster = cluster_of(document) or {}
    return (cluster.get("autoscalerOptions") or {}) if cluster.get("enableInTreeAutoscaling") else None


def _pod_problems(pod: Pod) -> Iterator[Problem]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield Problem(f"{pod.path}.{key}", "the host's namespaces are not for pods", "leave it out")
    if (pod.spec.get("securityContext") or {}).get("sysctls"):
        yield Problem(f"{pod.path}.securityContext.sysctls", "changes the kernel's settings", "leave it out")
    for index, volume in enumerate(pod.spec.get("volumes") or []):
        for kind in sorted(volume.keys() - {"name"} - _VOLUMES):
            yield Problem(f"{pod.path}.volumes[{index}]", f"{kind} volumes are not allowed",
                          f"use one of {', '.join(sorted(_VOLUMES))}")


def _container_problems(path: str, container: Document, of_pod: Document) -> Iterator[Problem]:
    own = container.get("securityContext") or {}
    here = f"{path}.securityContext"
    both = {**of_pod, **own}
    if both.get("runAsNonRoot") is not True:
        yield Problem(here, "may run as root", "set runAsNonRoot: true for the pod")
    if both.get("runAsUser") == 0:
        yield Problem(here, "runs as user 0, which is root", "set runAsUser: 1000")
    if (both.get("seccompProfile") or {}).get("type") not in _PROFILES:
        yield Problem(here, "has no seccomp profile", "set seccompProfile: {type: RuntimeDefault} for the pod")
    if own.get("privileged"):
        yield Problem(here, "is privileged", "leave it out")
    if own.get("allowPrivilegeEscalation") is not False:
        yield Problem(here, "may gain privileges", "set allowPrivilegeEscalation: false")
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield Problem(here, "keeps capabilities", "set capabilities: {drop: [ALL]}")
    if set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield Problem(here, "adds capabilities", "leave them out")
    if own.get("procMount", "Default") != "Default":
        yield Problem(here, "unmasks /proc", "leave procMount out")
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield Problem(f"{path}.ports", f"takes port {port['hostPort']} of the host", "leave hostPort out")
