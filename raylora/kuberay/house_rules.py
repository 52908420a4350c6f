"""What raylora asks of a manifest: one Ray everywhere, a token, idle heads, and runs that a retry finds again."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from raylora.errors import RayloraError
from raylora.kuberay.manifests import CLUSTER_OF, Document, Pod, Problem, cluster_of, pods_of
from raylora.kuberay.quantities import amount

ParseEntrypoint = Callable[[list[str]], Mapping[str, Any]]
"""From the words of a command to its parameters. Raises: UsageError."""
_STORAGE = "storage_path="


def check_house_rules(
    document: Document, ray_version: str, parse_entrypoint: ParseEntrypoint
) -> Iterator[Problem]:
    """Yield what raylora's clusters need beyond what Kubernetes and the operator ask for."""
    cluster = cluster_of(document)
    for pod in pods_of(document):
        yield from _image(pod, ray_version)
        yield from _volumes(pod)
        yield from _memory(pod)
    if cluster is not None:
        root = ".".join(CLUSTER_OF[document["kind"]])
        if cluster.get("rayVersion") != ray_version:
            yield Problem(f"{root}.rayVersion", f"{cluster.get('rayVersion')}, and raylora is installed with Ray "
                          f"{ray_version}", f'set "{ray_version}"')
        if (cluster.get("authOptions") or {}).get("mode") != "token":
            yield Problem(f"{root}.authOptions", "whoever reaches the head runs code on it", "set {mode: token}")
        head = (cluster.get("headGroupSpec") or {}).get("rayStartParams") or {}
        if head.get("num-cpus") != "0":
            yield Problem(f"{root}.headGroupSpec.rayStartParams", "members would train on the head",
                          'set num-cpus: "0"')
    if document["kind"] == "RayJob":
        yield from _entrypoint(document, parse_entrypoint)


def _image(pod: Pod, ray_version: str) -> Iterator[Problem]:
    for path, container in pod.containers():
        name = str(container.get("image", "")).partition("@")[0]
        tag = name.rpartition("/")[2].partition(":")[2]
        if tag != ray_version:
            yield Problem(f"{path}.image", f"{name or 'none'} is not tagged with Ray's version, {ray_version}",
                          f"use an image NAME:{ray_version}")


def _volumes(pod: Pod) -> Iterator[Problem]:
    known = {volume.get("name") for volume in pod.spec.get("volumes") or []}
    for path, container in pod.containers():
        for mount in container.get("volumeMounts") or []:
            if mount.get("name") not in known:
                yield Problem(f"{path}.volumeMounts", f"there is no volume {mount.get('name')}", "add it to volumes")


def _memory(pod: Pod) -> Iterator[Problem]:
    """Shared memory counts as the container's: it has to fit beside what processes need."""
    limits = (pod.ray_container().get("resources") or {}).get("limits") or {}
    memory = amount(limits.get("memory", ""))
    if memory is None:
        yield Problem(pod.path, "has no memory limit: Ray would take the node's memory for its own",
                      "set resources.limits.memory")
        return
    for volume in pod.spec.get("volumes") or []:
        source = volume.get("emptyDir") or {}
        if source.get("medium") != "Memory":
            continue
        size = amount(source.get("sizeLimit", ""))
        if size is None or size > memory / 2:
            yield Problem(f"{pod.path}.volumes", f"{volume['name']} may take more than half of the memory limit",
                          "set sizeLimit to at most half of resources.limits.memory")


def _entrypoint(document: Document, parse_entrypoint: ParseEntrypoint) -> Iterator[Problem]:
    spec = document.get("spec") or {}
    where = "spec.entrypoint"
    try:
        words = shlex.split(str(spec.get("entrypoint", "")))
        parameters = parse_entrypoint(words)
    except (RayloraError, ValueError) as error:
        yield Problem(where, f"is no command of raylora: {str(error).splitlines()[0]}", "see raylora --help")
        return
    if not spec.get("backoffLimit"):
        return
    found = [one.removeprefix(_STORAGE) for one in parameters.get("overrides") or () if one.startswith(_STORAGE)]
    storage = found[-1] if found else None
    if storage is None:
        yield Problem(where, "a retry is a new cluster, and runs would be lost with the old one's disk",
                      "add --set storage_path=, a mounted volume or an object store")
    elif "://" not in storage:
        for pod in pods_of(document):
            if pod.role != "submitter" and not _is_shared(pod, storage):
                yield Problem(f"{pod.path}.volumes", f"{storage}, where the runs lie, is on no volume claim",
                              "mount one there in the head and in all workers")


def _is_shared(pod: Pod, path: str) -> bool:
    claims = {volume.get("name") for volume in pod.spec.get("volumes") or [] if "persistentVolumeClaim" in volume}
    mounts = [mount for mount in pod.ray_container().get("volumeMounts") or [] if mount.get("name") in claims]
    return any(f"{path}/".startswith(f"{str(mount.get('mountPath')).rstrip('/')}/") for mount in mounts)
