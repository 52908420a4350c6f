"""Manifests as plain data: read from YAML, and where Ray's pods are in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raylora.errors import UsageError

Document = dict[str, Any]
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The C one reads a definition of a megabyte in a second, the other takes ten."""

CLUSTER_OF = {
    "RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig")
}
"""Kind -> where its cluster is described."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a manifest, where, and what to do."""

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; {self.hint}" if self.hint else "")


@dataclass(frozen=True)
class Pod:
    """A pod template of a manifest."""

    role: str  # head | worker | submitter
    path: str
    """Of its spec, from the manifest's root."""
    labels: dict[str, str]
    spec: Document

    def containers(self) -> Iterator[tuple[str, Document]]:
        """Yield (path, container) of every container."""
        for key in ("initContainers", "containers", "ephemeralContainers"):
            for index, container in enumerate(self.spec.get(key) or []):
                yield f"{self.path}.{key}[{index}]", container

    def ray_container(self) -> Document:
        """Return the container that Ray runs in: the first."""
        return next(iter(self.spec.get("containers") or []), {})


def load_yaml(text: str, where: str) -> list[Any]:
    """Return the documents of a YAML text, without empty ones. Raises: UsageError."""
    try:
        return [document for document in yaml.load_all(text, Loader=_LOADER) if document is not None]
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: is not YAML: {' '.join(str(error).split())}", "correct the file") from None


def read_manifests(path: Path) -> list[Document]:
    """Return the manifests of a file.

    Raises:
        UsageError: it cannot be read, or holds something that is no manifest.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}", "give files with manifests") from None
    documents = load_yaml(text, str(path))
    for document in documents:
        if not isinstance(document, dict) or not isinstance(document.get("metadata"), dict) or "kind" not in document:
            raise UsageError(f"{path}: a document has no kind and metadata", "give Kubernetes manifests")
    if not documents:
        raise UsageError(f"{path}: holds no manifest", "give Kubernetes manifests")
    return documents


def dump_manifests(documents: Sequence[Document]) -> str:
    """Return the manifests as one YAML text."""
    return "---\n".join(
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True) for document in documents
    )


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are, which people can read and change."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def name_of(document: Document) -> str:
    """Return ``Kind/name``, as people say it."""
    return f"{document['kind']}/{document['metadata'].get('name', '?')}"


def cluster_of(document: Document) -> Document | None:
    """Return the description of a manifest's Ray cluster, or None if it has none."""
    found: Any = document
    for key in CLUSTER_OF.get(document["kind"], ("no such",)):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def groups_of(cluster: Document) -> list[Document]:
    """Return a cluster's groups of workers."""
    return [group for group in cluster.get("workerGroupSpecs") or [] if isinstance(group, dict)]


def pods_of(document: Document) -> list[Pod]:
    """Return every pod template of a manifest of Ray."""
    cluster, found = cluster_of(document), []
    if cluster is not None:
        root = ".".join(CLUSTER_OF[document["kind"]])
        found.append(_pod("head", f"{root}.headGroupSpec.template", (cluster.get("headGroupSpec") or {})))
        found += [
            _pod("worker", f"{root}.workerGroupSpecs[{index}].template", group)
            for index, group in enumerate(groups_of(cluster))
        ]
    spec = document.get("spec") or {}
    if document["kind"] == "RayJob" and spec.get("submitterPodTemplate"):
        found.append(_pod("submitter", "spec.submitterPodTemplate", {"template": spec["submitterPodTemplate"]}))
    return found


def _pod(role: str, path: str, group: Document) -> Pod:
    template = group.get("template") or {}
    labels = (template.get("metadata") or {}).get("labels") or {}
    return Pod(role, f"{path}.spec", labels, template.get("spec") or {})
