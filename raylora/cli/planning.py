"""The command that shows a plan, for this machine or for others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

import raylora
from raylora.cli.app import AsJson, InProcess, Overrides, SpecFile, app, command
from raylora.display.console import out
from raylora.errors import UsageError
from raylora.placement.estimate import Parts
from raylora.placement.plan import Plan


@app.command()
@command
def plan(
    spec_file: SpecFile,
    overrides: Overrides = None,
    local: InProcess = False,
    cluster: Annotated[str, typer.Option(help=(
        "Plan for other machines: 4x80GB (GPUs of a node), 2x4x80GB (nodes of them), or a YAML file of nodes. "
        "Needs neither the cluster nor the base's weights."
    ))] = "",
    tflops: Annotated[float | None, typer.Option(min=0.001, help=(
        "With --cluster: what a worker reaches, in 10^12 operations per second; says how fast the plan would be."
    ))] = None,
    as_json: AsJson = False,
) -> None:
    """Show which worker would train which members, with how much memory, and why."""
    from raylora.engine.run.plan_run import local_inventory, prepare

    spec = raylora.read_spec(spec_file, overrides or [])
    if cluster:
        if local:
            raise UsageError("--local and --cluster: one process is no cluster", "give one of them")
        _plan_ahead(spec, cluster, tflops, as_json)
        return
    if tflops is not None:
        raise UsageError("--tflops: is for planning ahead", "give --cluster, too")
    prepared = prepare(spec, local_inventory(in_process=local), look=True)
    found = prepared.plan
    if as_json:
        print(json.dumps({**vars(found), "parts": found.parts.by_name(), "worker_bytes": found.worker_bytes,
                          "jobs": prepared.jobs, "member_parameters": prepared.member_parameters,
                          "compute": prepared.compute, "total_steps": prepared.total_steps,
                          "notes": list(prepared.notes)}))
        return
    _show_plan(found, prepared.jobs, prepared.notes)
    out.print(f"  computing in {prepared.compute}")
    out.print(f"  {prepared.member_parameters:,} trainable parameters per member, {prepared.total_steps} steps")


def _plan_ahead(spec: Any, cluster: str, tflops: float | None, as_json: bool) -> None:
    from raylora.engine.run.plan_ahead import plan_ahead
    from raylora.placement.cluster import read_cluster

    ahead = plan_ahead(spec, read_cluster(cluster), tflops)
    found = ahead.plan
    if as_json:
        print(json.dumps({**vars(found), "parts": found.parts.by_name(), "worker_bytes": found.worker_bytes,
                          "jobs": found.jobs(), "member_parameters": ahead.member_parameters,
                          "tokens_per_micro_batch": ahead.batch.tokens, "notes": list(ahead.notes)}))
        return
    _show_plan(found, found.jobs(), ahead.notes)
    out.print(f"  {ahead.member_parameters:,} trainable parameters per member, {ahead.batch.tokens:,} tokens of one "
              "in a forward")


def _show_plan(found: Plan, jobs: Mapping[str, Sequence[str]], notes: Sequence[str]) -> None:
    out.print(found.summary(), markup=False)
    table = Table("job", "units trained in one forward")
    for job, units in jobs.items():
        table.add_row(job, ", ".join(units))
    out.print(table)
    out.print(_parts_table(found.parts))
    for reason in (*found.reasons, *notes):
        out.print(f"  {reason}", markup=False)


def _parts_table(parts: Parts) -> Table:
    """Return what a worker's memory goes to, without the parts that take nothing."""
    table = Table("memory of a worker", "GB")
    for name, size_bytes in parts.by_name().items():
        if size_bytes:
            table.add_row(name, f"{size_bytes / 1e9:.2f}")
    table.add_row("all", f"{parts.total / 1e9:.2f}")
    return table
