"""The part of kustomize that ``cluster/`` uses, so that overlays can be checked where there is no kubectl.

Resources, components and patches (JSON 6902, merges, deletions). Anything else in a kustomization is refused, since
leaving it out would render something that kubectl does not.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from raylora.errors import UsageError
from raylora.kuberay.manifests import Document, load_yaml, read_manifests

_KEYS = {"apiVersion", "kind", "resources", "components", "patches"}
_RAY = "ray.io/"


def render_kustomization(folder: Path) -> list[Document]:
    """Return the manifests of a kustomization, as ``kubectl kustomize`` would print them, in order of appearance.

    Raises:
        UsageError: a file is missing, a patch fits nothing, or a feature is used that is not known here.
    """
    return _rendered(folder, [])


def _rendered(folder: Path, before: list[Document]) -> list[Document]:
    """Return ``before``, which a component changes, and what the folder adds."""
    path = folder / "kustomization.yaml"
    try:
        content = load_yaml(path.read_text(encoding="utf-8"), str(path))[0]
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file", "give a folder with a kustomization.yaml") from None
    unknown = sorted(content.keys() - _KEYS)
    if unknown:
        raise UsageError(f"{path}: {unknown[0]} is not known here", "use `kubectl kustomize`")
    documents = list(before)
    for name in content.get("resources", []):
        there = folder / name
        documents += _rendered(there, []) if there.is_dir() else copy.deepcopy(read_manifests(there))
    for name in content.get("components", []):
        documents = _rendered(folder / name, documents)
    for patch in content.get("patches", []):
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text(encoding="utf-8")
        documents = _patched(documents, patch.get("target", {}), load_yaml(text, str(path))[0], str(path))
    return documents


def _patched(documents: list[Document], target: Document, patch: Any, where: str) -> list[Document]:
    """Return the documents with those that the target names changed; one that fits none is no error, as in kubectl."""
    unknown = sorted(target.keys() - {"kind", "name"})
    if unknown or not target:
        raise UsageError(f"{where}: a target {target} is not known here", "use kind and name")
    found = []
    for document in documents:
        if all(target[key] == (document["kind"] if key == "kind" else document["metadata"]["name"]) for key in target):
            changed = _changed(document, patch, where)
            found += [changed] if changed is not None else []
        else:
            found.append(document)
    return found


def _changed(document: Document, patch: Any, where: str) -> Document | None:
    """Return the patched document, or None if the patch deletes it."""
    if isinstance(patch, list):
        return _json_patched(document, patch, where)
    if patch.get("$patch") == "delete":
        return None
    if not str(document.get("apiVersion")).startswith(_RAY):
        raise UsageError(f"{where}: merges into {document['kind']} depend on its lists' keys, which are not known here",
                         "use a JSON 6902 patch")
    return _merged(document, patch)


def _merged(old: Any, new: Any) -> Any:
    """Return a JSON merge (RFC 7386): lists are replaced, which is how kubectl merges custom resources."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    kept = {key: value for key, value in old.items() if key not in new}
    return {**kept, **{key: _merged(old.get(key), value) for key, value in new.items() if value is not None}}


def _json_patched(document: Document, operations: list[Document], where: str) -> Document:
    changed = copy.deepcopy(document)
    for operation in operations:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        try:
            node: Any = changed
            for part in parents:
                node = node[int(part)] if isinstance(node, list) else node[part]
            _apply(node, last, operation)
        except (KeyError, IndexError, ValueError, TypeError):
            raise UsageError(f"{where}: {operation['op']} {operation['path']} fits nothing in {document['kind']}",
                             "correct the path") from None
    return changed


def _apply(node: Any, last: str, operation: Document) -> None:
    """Carry out one operation. Raises: KeyError, IndexError, ValueError."""
    verb, value = operation["op"], copy.deepcopy(operation.get("value"))
    if verb not in ("add", "replace", "remove"):
        raise ValueError(verb)
    if isinstance(node, list):
        index = len(node) if last == "-" else int(last)
        if verb == "add":
            node.insert(index, value)
        elif verb == "replace":
            node[index] = value
        else:
            del node[index]
    elif verb == "remove":
        del node[last]
    elif verb == "replace" and last not in node:
        raise KeyError(last)
    else:
        node[last] = value
