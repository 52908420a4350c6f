"""Files of targets: facts in JSON, numbers in safetensors with a checksum among the facts; nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from raylora.errors import StoreError

FORMAT = 1
DAMAGED = "delete these targets and make them again"
INCOMPLETE = "the targets are not complete: make them again"


def pack_facts(kind: str, facts: Mapping[str, Any]) -> bytes:
    """Return facts as JSON that says of which kind and format they are."""
    return json.dumps({"format": FORMAT, "kind": kind, **facts}).encode()


def sha256(content: bytes) -> str:
    """Return the checksum that :func:`checked` compares."""
    return hashlib.sha256(content).hexdigest()


def read_facts(content: bytes | None, name: str, *kinds: str) -> dict[str, Any]:
    """Return a JSON file of facts. Raises: StoreError if it is missing, damaged or says another format or kind."""
    if content is None:
        raise StoreError(f"{name} is missing", INCOMPLETE)
    try:
        facts = json.loads(content)
        found = (facts["format"], facts["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{name} is damaged: {error}", DAMAGED) from error
    if found not in [(FORMAT, kind) for kind in kinds]:
        wanted = " or ".join(kinds)
        raise StoreError(f"{name} holds {found[1]} targets of format {found[0]}, not {wanted} of {FORMAT}", DAMAGED)
    return facts


def checked(content: bytes | None, name: str, checksum: str) -> bytes:
    """Return a file's content. Raises: StoreError if it is missing or not what was written."""
    if content is None:
        raise StoreError(f"{name} is missing", INCOMPLETE)
    if sha256(content) != checksum:
        raise StoreError(f"{name} is damaged: its checksum differs", DAMAGED)
    return content
