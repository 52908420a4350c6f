"""A run handed to a cluster: attached to where it goes on, left alone where it is done, taken up where it stopped."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raylora.errors import SpecError, UsageError
from raylora.jobs.naming import job_name, numbered, parted, run_of
from raylora.jobs.reach import Needed
from raylora.jobs.server import Job, JobServer
from raylora.jobs.upload import Upload
from raylora.spec import RunSpec, dump_spec, parse_spec

_STOP_WAIT_S = 60
"""How long Ray waits between asking a job to stop and killing it; without this it is 3 seconds."""
_SECRET = re.compile(r"token(?!izer)|secret|password|api_?key", re.IGNORECASE)


@dataclass(frozen=True)
class Submitted:
    """What became of a submission."""

    submission_id: str
    did: str
    """submitted, resumed, attached, or finished: it was done before."""
    uri: str
    """The run directory, as the cluster sees it."""


def read_runtime_env(path: Path | None) -> dict[str, Any]:
    """Return a runtime environment from a YAML file, or an empty one.

    Raises:
        UsageError: it is no mapping, has a working_dir of its own, or a secret: the dashboard shows it to everybody.
    """
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--runtime-env: {path}: {' '.join(str(error).split())}", "give a YAML file") from None
    if not isinstance(content, dict):
        raise UsageError(f"--runtime-env: {path} is no YAML mapping", "write `env_vars: {...}` and the like")
    if "working_dir" in content:
        raise UsageError(f"--runtime-env: {path}: working_dir is an option", "give --working-dir")
    variables = content.get("env_vars", {})
    if not isinstance(variables, dict):
        raise UsageError(f"--runtime-env: {path}: env_vars is no mapping", "write `env_vars: {NAME: value}`")
    secret = next((name for name in variables if _SECRET.search(str(name))), None)
    if secret is not None:
        raise UsageError(f"--runtime-env: {path}: {secret} looks like a secret, which the dashboard would show",
                         "set it in the environment of the cluster's nodes")
    return content


def submit(
    server: JobServer, spec: RunSpec, upload: Upload, needed: Needed, runtime_env: Mapping[str, Any],
    say: Callable[[str], object], again: bool = False,
) -> Submitted:
    """Hand a run to a cluster, unless it is there already.

    Args:
        say: told in words what goes on.
        again: submit a run that has succeeded, too, as is needed if its directory was deleted.

    Raises:
        UsageError: the cluster lacks what the run needs; nothing is left there.
    """
    name, uri = job_name(spec), f"{spec.storage_path.rstrip('/')}/{spec.run_name()}"
    last = latest(server, name)
    if last is not None and (not last.has_ended or (last.status == "SUCCEEDED" and not again)):
        return Submitted(last.submission_id, "finished" if last.has_ended else "attached", uri)
    say(upload.summary())
    environment = {
        **runtime_env, "working_dir": str(upload.folder),
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S), **runtime_env.get("env_vars", {})},
    }
    say("looking around on the cluster ...")
    server.probe(name, needed, environment)
    number = _number(last) + 1
    submission_id = numbered(name, number)
    entrypoint = f"exec python -m raylora run --spec-yaml {shlex.quote(spec_text(spec))}"
    metadata = {"run": spec.run_name(), "digest": spec.digest(), "directory": uri}
    if not server.submit(submission_id, entrypoint, environment, metadata):
        return Submitted(submission_id, "attached", uri)
    return Submitted(submission_id, "submitted" if last is None else "resumed", uri)


def spec_text(spec: RunSpec) -> str:
    """Return a spec as one line of YAML, without what nobody has set if it reads back to the same spec."""
    text = json.dumps(spec.model_dump(mode="json", exclude_unset=True), ensure_ascii=False)
    try:
        is_same = parse_spec(text).model_dump() == spec.model_dump()
    except SpecError:
        is_same = False
    return text if is_same else dump_spec(spec)


def _number(job: Job | None) -> int:
    found = parted(job.submission_id) if job is not None else None
    return found[1] if found is not None else 0


def latest(server: JobServer, name: str) -> Job | None:
    """Return the last submission of a job's name."""
    found = [job for job, of in _ours(server) if of == name]
    return max(found, key=_number, default=None)


def all_jobs(server: JobServer) -> list[Job]:
    """Return every submission of raylora's, the oldest first."""
    return [job for job, _ in _ours(server)]


def find_job(server: JobServer, what: str) -> Job:
    """Return a submission by its id, or the last one of a run's name.

    Raises:
        UsageError: there is none, or runs of several specs have that name.
    """
    ours = list(_ours(server))
    exact = [job for job, _ in ours if job.submission_id == what]
    names = sorted({name for _, name in ours if what in (name, run_of(name))})
    if not exact and len(names) > 1:
        raise UsageError(f"{what}: several specs have this name: {', '.join(names)}", "give one of these")
    found = exact[0] if exact else latest(server, names[0]) if names else None
    if found is None:
        known = ", ".join(job.submission_id for job, _ in ours[-5:])
        raise UsageError(f"{what}: no such job at {server.address}", f"there are: {known}" if known else "submit it")
    return found


def _ours(server: JobServer) -> Iterator[tuple[Job, str]]:
    for job in server.jobs():
        found = parted(job.submission_id)
        if found is not None:
            yield job, found[0]
