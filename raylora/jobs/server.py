"""A cluster's job server: reached or refused with one message, and asked for what jobs need."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import shlex
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from raylora.errors import RayloraError, UsageError
from raylora.jobs.reach import Needed

_CONNECT_S = 5.0
_POLL_S = 0.5
_PROBE_S = 180.0
_STOP_S = 90.0
_REMOVE_S = 10.0
_WATCH_S = 1.5
_TRIES = 4
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_PROBE = """import json, os, sys
needed = json.loads(sys.argv[1])
said = {"python": sys.version.split()[0], "raylora": None}
try:
    import raylora
    said["raylora"] = raylora.__version__
except ImportError as error:
    said["why"] = str(error)
said["missing"] = [path for path in needed["read"] if not os.path.exists(path)]
there = [next((f for f in (path, os.path.dirname(path)) if os.path.isdir(f)), None) for path in needed["written"]]
said["closed"] = [path for path, f in zip(needed["written"], there) if f is None or not os.access(f, os.W_OK | os.X_OK)]
print("raylora-probe " + json.dumps(said))
"""
"""Looks around where a job's driver runs; it must not need raylora."""


@dataclass(frozen=True)
class Job:
    """One submission."""

    submission_id: str
    status: str
    started_at: float
    exit_code: int | None
    message: str

    @property
    def has_ended(self) -> bool:
        """Whether it is over."""
        return self.status in _ENDED


class JobServer:
    """What answers at an address."""

    def __init__(self, address: str) -> None:
        """Connect.

        Raises:
            UsageError: nothing answers there, or no job server, or it wants another token, or runs another Ray.
        """
        self.address = address.rstrip("/")
        _check_answers(self.address)
        try:
            self._client = JobSubmissionClient(self.address)
            self._client.list_jobs()
        except AuthenticationError:
            raise UsageError(
                f"{self.address}: the cluster does not take this token, or there is none",
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the token of the cluster",
            ) from None
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(
                f"{self.address}: answers, but is no job server of Ray ({str(error).splitlines()[0][:120]})",
                "give the dashboard's address (port 8265) of a cluster that is installed as ray[default]",
            ) from None
        there, here = self._client._server_ray_version, importlib.metadata.version("ray")
        if there != here:
            raise UsageError(
                f"{self.address}: the cluster runs Ray {there}, and raylora is installed here with {here}",
                f"install ray=={there} here, or use an image with Ray {here}",
            )

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        """Say in one message that the cluster went while it was asked something. Raises: RayloraError."""
        try:
            yield
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            raise RayloraError(f"{self.address}: no longer answers as it should: {str(error).splitlines()[0][:200]}",
                               "see whether the cluster is there, and ask again") from None

    def jobs(self) -> list[Job]:
        """Return all submissions, the oldest first."""
        with self._asked():
            found = [_job_of(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started_at)

    def job(self, submission_id: str) -> Job:
        """Return how a submission is."""
        with self._asked():
            return _job_of(self._client.get_job_info(submission_id))

    def submit(
        self, submission_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> bool:
        """Submit a job; return False if there is one of that id, which somebody else submitted meanwhile.

        Raises:
            UsageError: the server does not take it.
        """
        try:
            self._client.submit_job(
                entrypoint=entrypoint, submission_id=submission_id, runtime_env=dict(runtime_env), metadata=metadata
            )
        except (RuntimeError, ValueError, TypeError) as error:
            if any(job.submission_id == submission_id for job in self.jobs()):
                return False
            lines = str(error).strip().splitlines()
            raise UsageError(f"{self.address}: the job is not taken: {lines[-1][:300]}",
                             "check the runtime environment") from None
        return True

    def probe(self, name: str, needed: Needed, runtime_env: dict[str, Any]) -> None:
        """Look around on the cluster by a job of a few seconds, of which nothing is left.

        Raises:
            UsageError: raylora is not installed there, or paths are not there.
            RayloraError: no job starts there.
        """
        probe_id = f"{name}-probe-x{uuid.uuid4().hex[:8]}"
        paths = json.dumps({"read": needed.read, "written": needed.written})
        self.submit(probe_id, f"python -c {shlex.quote(_PROBE)} {shlex.quote(paths)}", runtime_env, {})
        left = ""
        try:
            job = self.wait(probe_id, _PROBE_S)
            logs = self.logs(probe_id)
        finally:
            if not self._remove(probe_id):
                left = f"; it does not stop either: `ray job stop {probe_id}`, later `ray job delete {probe_id}`"
        said = next((line for line in reversed(logs.splitlines()) if line.startswith("raylora-probe ")), None)
        if said is None:
            why = (logs.strip() or job.message or job.status).splitlines()[-1][:300]
            raise RayloraError(f"{self.address}: a first job did not run there ({job.status}): {why}{left}",
                               "check the runtime environment, and that its PATH has python")
        _judge(self.address, json.loads(said.removeprefix("raylora-probe ")))

    def _remove(self, submission_id: str) -> bool:
        """Delete a job, stopped if need be; return whether it is gone.

        Ray's own watch over a job takes a second to notice that it has ended. If the job is deleted before, the watch
        writes it down again, as failed.
        """
        with self._asked():
            if not self.job(submission_id).has_ended:
                self._client.stop_job(submission_id)
                self.wait(submission_id, _REMOVE_S)
        for _ in range(_TRIES):
            time.sleep(_WATCH_S)
            if submission_id not in [job.submission_id for job in self.jobs()]:
                return True
            with contextlib.suppress(RuntimeError):  # it has not ended
                self._client.delete_job(submission_id)
        return False

    def wait(self, submission_id: str, limit_s: float | None = None) -> Job:
        """Return a submission when it has ended, or after so long."""
        deadline = time.monotonic() + limit_s if limit_s is not None else None
        while not (job := self.job(submission_id)).has_ended and (deadline is None or time.monotonic() < deadline):
            time.sleep(_POLL_S)
        return job

    def stop(self, submission_id: str) -> Job:
        """Ask a job to stop, which commits, and return it when it has."""
        with self._asked():
            self._client.stop_job(submission_id)
        return self.wait(submission_id, _STOP_S)

    def logs(self, submission_id: str) -> str:
        """Return all that a job has printed."""
        with self._asked():
            return self._client.get_job_logs(submission_id)

    def follow(self, submission_id: str, say: Callable[[str], object]) -> Job:
        """Pass on what a job prints until it ends, and return it."""

        async def tail() -> None:
            async for lines in self._client.tail_job_logs(submission_id):
                say(lines)

        while self.job(submission_id).status == "PENDING":
            time.sleep(_POLL_S)
        with self._asked():
            asyncio.run(tail())
        return self.wait(submission_id, _STOP_S)


def _job_of(details: Any) -> Job:
    return Job(
        details.submission_id, str(getattr(details.status, "value", details.status)),
        (details.start_time or 0) / 1000, details.driver_exit_code, details.message or "",
    )


def _check_answers(address: str) -> None:
    """Refuse an address that nothing listens at, within seconds."""
    parts = urlsplit(address)
    hint = (
        "give the dashboard's, such as http://127.0.0.1:8265 "
        "(on Kubernetes: kubectl port-forward svc/NAME-head-svc 8265)"
    )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--address: {address!r} is no http address", hint)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), _CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise UsageError(f"{address}: nothing answers there ({error})", hint) from None


def _judge(address: str, said: dict[str, Any]) -> None:
    """Refuse a cluster on which the run would fail. Raises: UsageError."""
    problems: Sequence[tuple[bool, str, str]] = (
        (said["raylora"] is None, f"raylora is not installed in the cluster's image ({said.get('why')})",
         "use an image that has it (cluster/Dockerfile), or a working directory with raylora's sources"),
        (bool(said["missing"]), f"{', '.join(said['missing'])}: is not there on the cluster's head",
         "copy it there, from where every node gets it, or into the working directory and give a relative path"),
        (bool(said["closed"]), f"storage_path: {', '.join(said['closed'])}: the cluster's head has neither it nor the "
         "folder above it, or may not write there", "give a folder that every node of the cluster shares"),
    )
    for is_so, what, hint in problems:
        if is_so:
            raise UsageError(f"{address}: {what}", hint)
