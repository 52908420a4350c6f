"""Custom resources against their definitions, as the API server would take them: defaults first, no unknown field."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from raylora.errors import UsageError
from raylora.kuberay.manifests import Document, Problem, load_yaml, name_of

Schemas = Mapping[tuple[str, str], Any]
"""(apiVersion, kind) -> schema."""


@lru_cache
def read_definitions(folder: Path) -> Schemas:
    """Return the schemas of every CustomResourceDefinition in a folder.

    Raises:
        UsageError: there is none.
    """
    found: dict[tuple[str, str], Any] = {}
    for path in sorted(folder.glob("*.yaml")):
        for document in load_yaml(path.read_text(encoding="utf-8"), str(path)):
            if document.get("kind") == "CustomResourceDefinition":
                spec = document["spec"]
                for version in spec["versions"]:
                    key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                    found[key] = _closed(version["schema"]["openAPIV3Schema"])
    if not found:
        raise UsageError(f"{folder}: holds no CustomResourceDefinition",
                         "give a folder with the YAML files of KubeRay's config/crd/bases")
    return found


def check_schema(document: Document, schemas: Schemas) -> Iterator[Problem]:
    """Yield what a definition refuses; nothing for a kind that none of them defines.

    Raises:
        UsageError: jsonschema is not installed.
    """
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        raise UsageError("checking against definitions needs jsonschema", "pip install jsonschema") from None
    group, _, version = str(document.get("apiVersion")).partition("/")
    schema = schemas.get((f"{group}/{version}", document["kind"]))
    if schema is None:
        if group in {known.partition("/")[0] for known, _ in schemas}:
            kinds = sorted({f"{known} {kind}" for known, kind in schemas})
            yield Problem(name_of(document), f"{document.get('apiVersion')} has no kind {document['kind']}",
                          f"known: {', '.join(kinds)}")
        return
    for error in Draft202012Validator(schema).iter_errors(with_defaults(document, schema)):
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        yield Problem(where.removeprefix(".") or name_of(document), error.message[:300], "see KubeRay's API reference")


def with_defaults(value: Any, schema: Any) -> Any:
    """Return a value with what its schema fills in where a field is left out."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        given = {key: with_defaults(inner, known.get(key) or _others(schema)) for key, inner in value.items()}
        missing = {key: copy.deepcopy(inner["default"]) for key, inner in known.items() if "default" in inner}
        return {**{key: with_defaults(inner, known[key]) for key, inner in missing.items()}, **given}
    if isinstance(value, list):
        return [with_defaults(inner, schema.get("items") or {}) for inner in value]
    return value


def _others(schema: Any) -> Any:
    extra = schema.get("additionalProperties")
    return extra if isinstance(extra, dict) else {}


def _closed(schema: Any) -> Any:
    """Return a schema that refuses the fields it does not name, where the API server would drop them in silence."""
    if isinstance(schema, list):
        return [_closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: inner if key in ("default", "enum") else _closed(inner) for key, inner in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed
