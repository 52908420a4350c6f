"""All checks of a manifest together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from raylora.kuberay.core_kinds import check_core_kind
from raylora.kuberay.house_rules import ParseEntrypoint, check_house_rules
from raylora.kuberay.manifests import Document, Problem, name_of
from raylora.kuberay.operator_rules import check_operator_rules
from raylora.kuberay.pod_security import check_pod_security
from raylora.kuberay.schema import Schemas, check_schema


def check_manifests(
    documents: Sequence[Document], ray_version: str, parse_entrypoint: ParseEntrypoint, schemas: Schemas | None = None
) -> list[Problem]:
    """Return all that is wrong with manifests, each with the manifest that it is in.

    Args:
        schemas: of custom resources; without them their fields are not looked at, only the rules.

    Raises:
        UsageError: schemas are given, and jsonschema is not installed.
    """
    found = []
    for document in documents:
        problems = list(check_schema(document, schemas)) if schemas is not None else []
        if not problems:  # rules read fields that the schema says are there
            problems = list(chain(
                check_core_kind(document), check_operator_rules(document), check_pod_security(document),
                check_house_rules(document, ray_version, parse_entrypoint),
            ))
        found += [replace(problem, where=_placed(problem, document)) for problem in problems]
    return found


def _placed(problem: Problem, document: Document) -> str:
    name = name_of(document)
    return name if problem.where == name else f"{name}: {problem.where}"
