"""What a run's jobs are called: the same spec gives the same name, by which a second submission finds the first."""

from __future__ import annotations

import hashlib
import json
import re

from raylora.spec import RunSpec

_NUMBERED = re.compile(r"(raylora-.+)-(\d+)")


def job_name(spec: RunSpec) -> str:
    """Return what all submissions of a run are called, without their number.

    It has the run's name and a hash of the digest, of where the run lies and of the students that are asked for: what
    differs in these is other work.
    """
    distill = spec.distill.model_dump(mode="json") if spec.distill is not None else None
    told = json.dumps([spec.digest(), spec.storage_path, distill], sort_keys=True)
    return f"raylora-{spec.run_name()}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def numbered(name: str, number: int) -> str:
    """Return the submission id of an attempt; the first is 1."""
    return f"{name}-{number}"


def parted(submission_id: str | None) -> tuple[str, int] | None:
    """Return name and number of a submission id; None for one that was not made here."""
    match = _NUMBERED.fullmatch(submission_id or "")
    return (match[1], int(match[2])) if match else None


def run_of(name: str) -> str:
    """Return the run's name that a job's name begins with."""
    return name.removeprefix("raylora-").rpartition("-")[0]
