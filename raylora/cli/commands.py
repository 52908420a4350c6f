"""The command line: one verb per thing a person does with a run.

Exit codes: 0 ok, 1 the run failed, 2 usage or configuration, 3 finished with fewer members than asked,
130 and 143 interrupted and resumable.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import raylora
from raylora import logs
from raylora.cli.console import err, out
from raylora.cli.progress import ShownStatus, say_block
from raylora.cli.tables import predictions_table, status_table
from raylora.errors import RayloraError, UsageError
from raylora.records import RunMetrics

DEGRADED = 3

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=raylora.__doc__)



@app.callback()
def _everywhere(
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what happens; RAYLORA_LOG names a level.")] = False,
) -> None:
    try:
        logs.configure(verbose)
    except RayloraError as error:
        err.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(error.exit_code) from None


SpecFile = Annotated[Path, typer.Argument(help="A run spec in YAML; `raylora init` writes one.")]
RunPath = Annotated[str, typer.Argument(help="A run directory.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set ensemble.members=3")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]


def _command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn raylora's errors into one message and their exit code."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RayloraError as error:
            if kwargs.get("as_json"):
                print(json.dumps({"error": error.message, "hint": error.hint, "exit_code": error.exit_code}))
            err.print(f"error: {error}", style="red", markup=False)
            raise typer.Exit(error.exit_code) from None

    return guarded


@app.command()
@_command
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the spec.")] = Path("raylora.yaml"),
    as_json: AsJson = False,
) -> None:
    """Write a commented spec to start from."""
    from importlib.resources import files

    if path.exists():
        raise UsageError(f"{path}: already exists", "choose another name, or delete it")
    path.write_text((files("raylora") / "spec" / "template.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    _say(as_json, {"spec": str(path)}, f"wrote {path}; next: raylora validate {path}")


@app.command()
@_command
def validate(
    spec_file: SpecFile,
    overrides: Overrides = None,
    preview: Annotated[int, typer.Option(help="Show this many tokenized training rows.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check a spec, its data and its base, without starting or writing anything."""
    from raylora.engine.distillation.plan import check_ahead
    from raylora.engine.model.checkpoint import load_tokenizer
    from raylora.engine.run.plan_run import prepare
    from raylora.engine.training.distillation_loss import task_of

    spec = raylora.read_spec(spec_file, overrides or [])
    prepared = prepare(spec)
    check_ahead(spec)
    task = task_of(spec)
    samples = prepared.sets.preview(preview, load_tokenizer(spec.base, task)) if preview else []
    notes = [f"note: {note}" for note in prepared.notes]
    lines = [*prepared.sets.describe(), *samples, *notes, f"{spec_file} is valid; digest {spec.digest()[:12]}"]
    _say(as_json, {"valid": True, "digest": spec.digest(), "sets": prepared.sets.describe(), "preview": samples,
                   "notes": list(prepared.notes)},
         "\n".join(lines))


@app.command()
@_command
def plan(spec_file: SpecFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show which worker would train which members, with how much memory, and why."""
    from raylora.engine.run.plan_run import prepare

    prepared = prepare(raylora.read_spec(spec_file, overrides or []))
    found = prepared.plan
    if as_json:
        print(json.dumps({**vars(found), "jobs": found.jobs(), "member_parameters": prepared.member_parameters,
                          "compute": prepared.compute, "total_steps": prepared.total_steps,
                          "notes": list(prepared.notes)}))
        return
    table = Table("job", "units trained in one forward", title=f"{found.strategy}: {found.workers} worker(s)")
    for job, units in found.jobs().items():
        table.add_row(job, ", ".join(units))
    out.print(table)
    for reason in (*found.reasons, *prepared.notes):
        out.print(f"  {reason}")
    out.print(f"  computing in {prepared.compute}")
    out.print(f"  {prepared.member_parameters:,} trainable parameters per member, {prepared.total_steps} steps")


@app.command()
@_command
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
@_command
def run(
    spec_file: SpecFile,
    overrides: Overrides = None,
    local: Annotated[bool, typer.Option(help="Run in this process, without Ray.")] = False,
    dashboard: Annotated[bool, typer.Option(help="Start the Ray dashboard with a local cluster.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help=(
        "Trace three steps of each job into RUN/profile: JOB.json.gz for chrome://tracing or ui.perfetto.dev, "
        "JOB.txt as a table."
    ))] = False,
    as_json: AsJson = False,
) -> None:
    """Train, evaluate and report, and distill if the spec has a distill section; run again to continue."""
    from raylora.spec import ProfileSpec

    spec = raylora.read_spec(spec_file, overrides or [])
    if profile and spec.profile is None:
        spec = spec.model_copy(update={"profile": ProfileSpec()})
    _run(spec, local, dashboard, as_json)


@app.command()
@_command
def resume(
    run_path: RunPath,
    local: Annotated[bool, typer.Option(help="Run in this process, without Ray.")] = False,
    as_json: AsJson = False,
) -> None:
    """Continue a run from its last commits."""
    from raylora.store.run_store import RunStore

    _run(RunStore(run_path).spec_in_place(), local, False, as_json)


@app.command()
@_command
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
@_command
def status(run_path: RunPath, as_json: AsJson = False) -> None:
    """Show the progress of a run, from its directory."""
    from raylora import control
    from raylora.engine.run.run_status import RunStatus, StatusBoard
    from raylora.store.run_store import RunStore

    store = RunStore(run_path)
    store.read_spec()
    state = control.replay(control.from_record(record) for record in store.read_events())
    written = store.read_json("status.json")
    last = RunStatus.from_record(written) if written else StatusBoard(store.read_spec().run_name()).status(state)
    found = replace(last, phase=state.phase, reason=state.reason, failed=dict(state.failed_units))
    students = _students(store)
    if as_json:
        print(json.dumps({**found.record(), "finished": list(state.finished_units()), "students": students}))
        return
    out.print(status_table(found))
    out.print(f"{store.uri}: {state.phase.value}" + (f" ({state.reason})" if state.reason else ""))
    for name, phase in students.items():
        out.print(f"{store.uri}/{name}: {phase}", markup=False)


@app.command()
@_command
def predict(
    run_path: RunPath,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; may be repeated.")] = None,
    file: Annotated[str | None, typer.Option("--file", help="Rows as jsonl, csv, parquet or arrow.")] = None,
    output: Annotated[str | None, typer.Option("--out", help="Write JSON lines here instead of printing.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict new rows, with the uncertainty of each prediction."""
    from raylora.serve.predictor import load_ensemble, read_rows, write_rows

    if bool(text) == bool(file):
        raise UsageError("give either --text or --file")
    rows: Sequence[Any] = text or read_rows(str(file))
    ensemble = load_ensemble(run_path)
    predictions = ensemble.predict(rows)
    if output:
        write_rows(output, predictions)
        _say(as_json, {"out": output, "rows": len(predictions)}, f"wrote {len(predictions)} predictions to {output}")
    elif as_json:
        for prediction in predictions:
            print(json.dumps(prediction.record(), ensure_ascii=False))
    else:
        out.print(predictions_table(predictions))


@app.command()
@_command
def export(
    run_path: RunPath,
    form: Annotated[str, typer.Option("--format", help=(
        "peft-lora: members as folders that PEFT loads. checkpoint: fully fine-tuned members as whole models. "
        "base, base-packed: a prepared base as a checkpoint, dequantized or packed, and its pair."
    ))] = "peft-lora",
    output: Annotated[str | None, typer.Option("--out", help="The output folder; by default RUN/export.")] = None,
    member: Annotated[list[str] | None, typer.Option("--member", help="Only this member; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write members, or the prepared base, in a format that other programs read."""
    from raylora.serve import export_base
    from raylora.serve.export import export_run

    if form in export_base.FORMATS:
        base = export_base.export_base(run_path, form, output)
        pair = f"; its pair, {base.pair_bytes:,} bytes, to {base.pair_folder}" if base.pair_folder else ""
        _say(as_json, vars(base), f"wrote the base, {base.size_bytes:,} bytes, to {base.folder}{pair}")
        return
    exported = export_run(run_path, form, output, member or [])
    if as_json:
        print(json.dumps([vars(item) for item in exported]))
        return
    table = Table("member", "in the run (bytes)", "exported (bytes)", "folder")
    for item in exported:
        table.add_row(item.member, f"{item.size_bytes:,}", f"{item.exported_bytes:,}", item.folder)
    out.print(table)


@app.command()
@_command
def report(run_path: RunPath, as_json: AsJson = False) -> None:
    """Write the report of a finished run again and print its table."""
    from raylora.client import publish_report
    from raylora.engine.distillation.compare import distillations
    from raylora.report.distillation import distillation_table
    from raylora.store.run_store import RunStore

    store = RunStore(run_path)
    store.read_spec()
    publish_report(store)
    _show_result(store, store.read_json("metrics.json"), as_json)
    for record in [] if as_json else distillations(store):
        out.print(distillation_table(record))


@app.command()
@_command
def schema() -> None:
    """Print the JSON schema of a run spec, for editors."""
    from raylora.spec import json_schema

    print(json.dumps(json_schema(), indent=1))


@app.command()
@_command
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: what a run would use, and what would stop it."""
    from raylora.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([vars(finding) for finding in findings]))
    for finding in [] if as_json else findings:
        mark, style = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "bad": ("bad ", "red")}[finding.level]
        out.print(f"[{style}]{mark}[/] {finding.what}" + (f"\n     -> {finding.hint}" if finding.hint else ""))
    if any(finding.level == "bad" for finding in findings):
        raise typer.Exit(UsageError.exit_code)


# --- how a run looks while it goes on ---------------------------------------------------------------------
def _run(spec: Any, local: bool, dashboard: bool, as_json: bool) -> None:
    from raylora.client import launch, run_local
    from raylora.store.run_store import RunStore

    store = RunStore.for_spec(spec)
    err.print(f"run {spec.run_name()} in {store.uri}; checking spec, data and base ...", markup=False)
    if local:
        with ShownStatus() as show:
            metrics = run_local(spec, show)
    else:
        handle = launch(spec, dashboard)
        err.print("checked; starting workers (they import torch and load the base, this takes a while) ...")
        with ShownStatus() as show:
            metrics = handle.wait(show)
    if spec.profile is not None:
        err.print(f"profile: {store.uri}/profile; open *.json.gz in chrome://tracing or https://ui.perfetto.dev",
                  markup=False)
    if spec.distill is None or not as_json:  # one JSON document per command
        _show_result(store, metrics, as_json)
    if spec.distill is not None:
        _distill(store.uri, spec.distill, local, as_json)
    if metrics["run"]["degraded"]:
        raise typer.Exit(DEGRADED)


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


def _show_result(store: Any, metrics: RunMetrics, as_json: bool) -> None:
    from raylora.report.table import console_table

    report_path = f"{store.uri}/report.html"
    if as_json:
        print(json.dumps({"run": store.uri, "metrics": f"{store.uri}/metrics.json", "report": report_path,
                          "phase": metrics["run"]["phase"]}))
        return
    out.print(console_table(metrics))
    out.print(f"report: {report_path}")


def _say(as_json: bool, record: dict[str, Any], text: str) -> None:
    if as_json:
        print(json.dumps(record))
    else:
        out.print(text, markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the console script and ``python -m raylora`` start here."""
    app(args=list(arguments) if arguments is not None else sys.argv[1:], prog_name="raylora")
