"""The commands for runs as jobs of a cluster: submit; jobs status, logs and stop."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import raylora
from raylora.cli.app import AsJson, Overrides, SpecFile, app, command, say
from raylora.display.console import err, out
from raylora.errors import RunDirectoryError

if TYPE_CHECKING:
    from raylora.jobs.server import Job, JobServer

_STOPPED, _DETACHED = 143, 130
Address = Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help=(
    "The dashboard of the cluster, such as http://127.0.0.1:8265."
))]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A submission id, or a run's name.")]

jobs = typer.Typer(no_args_is_help=True, help="Runs as jobs of a cluster: status, logs, stop.")
app.add_typer(jobs, name="jobs")


@app.command()
@command
def submit(
    spec_file: SpecFile,
    address: Address,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show what the job prints; exit as it does.")] = False,
    runtime_env: Annotated[Path | None, typer.Option(help="A YAML file with Ray's runtime environment.")] = None,
    working_dir: Annotated[Path, typer.Option(help=(
        "The folder that is sent with it, without what .rayignore names."
    ))] = Path("."),
    again: Annotated[bool, typer.Option("--again", help="Submit it although it has succeeded.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a spec as a job of a cluster. Submitted again it attaches, goes on where it stopped, or says it is done."""
    from raylora.jobs.reach import needed_on_cluster
    from raylora.jobs.submission import read_runtime_env
    from raylora.jobs.submission import submit as hand_over
    from raylora.jobs.upload import survey

    spec = raylora.read_spec(spec_file, overrides or [])
    environment = read_runtime_env(runtime_env)
    upload = survey(working_dir, environment.get("excludes") or ())
    needed = needed_on_cluster(spec, upload)
    server = _connect(address)
    done = hand_over(server, spec, upload, needed, environment, _note, again)
    _note(_TOLD[done.did].format(id=done.submission_id, uri=done.uri))
    if follow and done.did != "finished":
        _follow(server, done.submission_id, as_json)
        return
    say(as_json, asdict(done), done.submission_id)


_TOLD = {
    "submitted": "submitted {id}; the run is in {uri}. `raylora jobs logs {id} --follow` shows it",
    "resumed": "submitted {id}, which goes on with the run in {uri}",
    "attached": "{id} is there already and not over; nothing was submitted",
    "finished": "{id} has succeeded; the run is in {uri}. --again submits it once more",
}


@jobs.command()
@command
def status(
    address: Address, job: Annotated[str, typer.Argument(metavar="[JOB]")] = "", as_json: AsJson = False
) -> None:
    """Show raylora's jobs on a cluster, or one of them by its id or its run's name."""
    from raylora.jobs.submission import all_jobs, find_job

    server = _connect(address)
    found = [find_job(server, job)] if job else all_jobs(server)
    if as_json:
        print(json.dumps([asdict(one) for one in found]))
        return
    table = Table("job", "status", "started", "exit code")
    for one in found:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.started_at)) if one.started_at else ""
        table.add_row(one.submission_id, one.status, started, "" if one.exit_code is None else str(one.exit_code))
    out.print(table if found else f"no jobs of raylora at {address}")


@jobs.command()
@command
def logs(
    job: JobId, address: Address,
    follow: Annotated[bool, typer.Option("--follow", help="Until it ends; exit as it does.")] = False,
) -> None:
    """Print what a job has printed."""
    from raylora.jobs.submission import find_job

    server = _connect(address)
    found = find_job(server, job)
    if follow:
        _follow(server, found.submission_id, False)
        return
    sys.stdout.write(server.logs(found.submission_id))


@jobs.command()
@command
def stop(job: JobId, address: Address, as_json: AsJson = False) -> None:
    """Stop a job: its run commits, and goes on when it is submitted again."""
    from raylora.jobs.submission import find_job

    server = _connect(address)
    found = find_job(server, job)
    if found.has_ended:
        raise RunDirectoryError(f"{found.submission_id} is over already: {found.status}",
                                f"`raylora jobs logs {found.submission_id}` shows what it said")
    ended = server.stop(found.submission_id)
    became = f": {ended.status}; submit the spec again to go on" if ended.has_ended else " does not stop yet"
    say(as_json, asdict(ended), f"{ended.submission_id}{became}")


def _connect(address: str) -> JobServer:
    """Return the job server; Ray's own lines about uploads and sockets say nothing that is not said here."""
    from raylora.jobs.server import JobServer

    logging.getLogger("ray._private.runtime_env.working_dir").setLevel(logging.ERROR)
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    return JobServer(address)


def _note(text: str) -> None:
    err.print(text, markup=False, soft_wrap=True)


def _follow(server: JobServer, submission_id: str, as_json: bool) -> None:
    """Show a job until it ends, and exit as it did; whoever interrupts this leaves the job alone."""
    stream = sys.stderr if as_json else sys.stdout
    try:
        job = server.follow(submission_id, lambda text: print(text, end="", file=stream, flush=True))
    except KeyboardInterrupt:
        _note(f"{submission_id} goes on; `raylora jobs stop {submission_id}` stops it")
        raise typer.Exit(_DETACHED) from None
    _note(f"{submission_id}: {job.status}")
    if as_json:
        print(json.dumps(asdict(job)))
    raise typer.Exit(_exit_code(job))


def _exit_code(job: Job) -> int:
    if job.status == "SUCCEEDED":
        return 0
    return _STOPPED if job.status == "STOPPED" else (job.exit_code or 1)
