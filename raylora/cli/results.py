"""The commands that use what runs have left: predict, export, report, verify, repair."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table

from raylora.cli.answering import MaxNewTokens, Seed, Stop, Temperature, TopP, answer_prompts
from raylora.cli.app import AllowMissing, AsJson, RunPath, app, command, say, show_result
from raylora.cli.tables import predictions_table
from raylora.display.console import err, out
from raylora.display.progress import ShownStatus
from raylora.errors import StoreError, UsageError, suggest

if TYPE_CHECKING:
    from raylora.serve.inputs import OnBadRow


@app.command()
@command
def predict(
    run_path: RunPath,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; may be repeated.")] = None,
    file: Annotated[str | None, typer.Option("--file", help="Rows as jsonl, csv, parquet or arrow.")] = None,
    output: Annotated[str | None, typer.Option("--out", help="Write JSON lines here instead of printing.")] = None,
    columns: Annotated[list[str] | None, typer.Option("--columns", help=(
        "What the file calls a column: --columns text=review; may be repeated. By default as the training set does."
    ))] = None,
    delimiter: Annotated[str | None, typer.Option("--delimiter", help="Between the fields of a csv file.")] = None,
    on_bad_row: Annotated[str, typer.Option("--on-bad-row", help=(
        "error, or skip: leave out rows that do not fit."
    ))] = "error",
    raw: Annotated[bool, typer.Option("--raw", help=(
        "Probabilities as the members give them, without the temperature fitted on the validation split."
    ))] = False,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help=(
        "For a language model: a text to answer, or to go on with; may be repeated."
    ))] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    each_member: Annotated[bool, typer.Option("--each-member", help="Every member writes its own answer.")] = False,
    agreement: Annotated[bool, typer.Option("--agreement", help=(
        "Say what share of the members gives the same answer by itself."
    ))] = False,
    metric: Annotated[list[str] | None, typer.Option("--metric", help=(
        "Compare answers with those in the file: exact_match, f1, contains, number, choice; may be repeated."
    ))] = None,
    plain: Annotated[bool, typer.Option("--plain", help=(
        "The plain mean of all members, although the run selected or weighted them."
    ))] = False,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
) -> None:
    """Predict new rows, or answer prompts, with the uncertainty of each prediction.

    A language model's answers to a file are written one after another: the same command goes on where it stopped.
    """
    from raylora.serve.inputs import inputs_of_texts, read_inputs, write_records
    from raylora.serve.predictor import load_ensemble, writes

    if sum(map(bool, (text, file, prompt))) != 1:
        raise UsageError("give either --text, --prompt or --file")
    if on_bad_row not in ("error", "skip"):
        raise UsageError(f"--on-bad-row: {on_bad_row!r} is neither error nor skip", "use one of the two")
    if prompt or file and writes(run_path):
        settings = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "stop": stop or [],
            "seed": seed, "each_member": each_member, "agreement": agreement,
        }
        answer_prompts(
            run_path, prompt or [], file, output, settings, _renaming(columns or []), delimiter,
            cast("OnBadRow", on_bad_row), metric or [], allow_missing, as_json, plain,
        )
        return
    inputs = inputs_of_texts(run_path, text) if text else read_inputs(
        run_path, str(file), _renaming(columns or []), delimiter, cast("OnBadRow", on_bad_row)
    )
    for place in inputs.left_out[:_TOLD]:
        err.print(f"left out: {place}", markup=False)
    if inputs.left_out:
        err.print(f"{len(inputs.left_out):,} row(s) left out, {len(inputs.rows):,} predicted", markup=False)
    ensemble = load_ensemble(run_path, calibrated=not raw, allow_missing=allow_missing, plain=plain)
    predictions = ensemble.predict(inputs.rows)
    if output:
        write_records(output, inputs.records(predictions))
        say(as_json, {"out": output, "rows": len(predictions)}, f"wrote {len(predictions)} predictions to {output}")
    elif as_json:
        for record in inputs.records(predictions):
            print(json.dumps(record, ensure_ascii=False, default=str))
    else:
        out.print(predictions_table(predictions, inputs.texts(), inputs.answers(predictions)))


@app.command()
@command
def export(
    run_path: RunPath,
    form: Annotated[str, typer.Option("--format", help=(
        "peft-lora: members as folders that PEFT loads. checkpoint: fully fine-tuned members as whole models. "
        "base, base-packed: a prepared base as a checkpoint, dequantized or packed, and its pair."
    ))] = "peft-lora",
    output: Annotated[str | None, typer.Option("--out", help="The output folder; by default RUN/export.")] = None,
    member: Annotated[list[str] | None, typer.Option("--member", help="Only this member; may be repeated.")] = None,
    base_name: Annotated[str, typer.Option("--base-name", help=(
        "What adapters call their base, a hub id or a folder that PEFT loads; by default its hub id or folder's name."
    ))] = "",
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
) -> None:
    """Write members, or the prepared base, in a format that other programs read."""
    from raylora.serve import export_base
    from raylora.serve.export import FORMATS, export_run

    known = (*FORMATS, *export_base.FORMATS)
    if form not in known:
        raise UsageError(f"--format: unknown format {form!r}", suggest(form, known))
    if form in export_base.FORMATS:
        base = export_base.export_base(run_path, form, output)
        pair = f"; its pair, {base.pair_bytes:,} bytes, to {base.pair_folder}" if base.pair_folder else ""
        say(as_json, vars(base), f"wrote the base, {base.size_bytes:,} bytes, to {base.folder}{pair}")
        return
    exported = export_run(run_path, form, output, member or [], allow_missing, base_name)
    if as_json:
        print(json.dumps([vars(item) for item in exported]))
        return
    table = Table("member", "in the run (bytes)", "exported (bytes)", "folder")
    for item in exported:
        table.add_row(item.member, f"{item.size_bytes:,}", f"{item.exported_bytes:,}", item.folder)
    out.print(table)


@app.command()
@command
def compress(
    run_path: RunPath,
    budget: Annotated[float, typer.Option(help="The share of a member's bytes that is left, such as 0.1.")] = 0.1,
    output: Annotated[str | None, typer.Option("--out", help=(
        "The run directory that is written; by default RUN-compressed."
    ))] = None,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
) -> None:
    """Write a run with its members in a fraction of their bytes, and show what that costs (Delta-CoMe)."""
    from raylora.cli.tables import compression_tables
    from raylora.serve.compress import compress_run

    done = compress_run(run_path, budget, output, allow_missing)
    if as_json:
        print(json.dumps(asdict(done)))
        return
    for table in compression_tables(done):
        out.print(table)
    out.print(f"wrote {done.folder}, which predict, evaluate, export and report take as they take a run", markup=False)


@app.command()
@command
def report(run_path: RunPath, allow_missing: AllowMissing = False, as_json: AsJson = False) -> None:
    """Write the report of a finished run again and print its table."""
    from raylora.client import publish_report
    from raylora.engine.distillation.compare import distillations
    from raylora.engine.run.roster import check_whole
    from raylora.report.distillation import distillation_table
    from raylora.store.run_store import RunStore

    store = RunStore(run_path)
    store.read_spec()
    check_whole(store, allow_missing)
    publish_report(store)
    show_result(store, store.read_json("metrics.json"), as_json)
    for record in [] if as_json else distillations(store):
        out.print(distillation_table(record))


@app.command()
@command
def verify(run_path: RunPath, as_json: AsJson = False) -> None:
    """Read all that a run has committed and compare it with its checksums."""
    from raylora.engine.run.verify import verify_run

    parts = verify_run(run_path)
    broken = [part for part in parts if part.problem]
    if as_json:
        print(json.dumps({"run": run_path, "parts": len(parts), "damaged": {p.place: p.problem for p in broken}}))
    for part in [] if as_json else broken:
        out.print(f"{part.place} {part.problem}", style="red", markup=False)
    if broken and as_json:
        raise typer.Exit(StoreError.exit_code)
    if broken:
        raise StoreError(
            f"{run_path}: {len(broken)} of {len(parts)} parts are not whole",
            f"`raylora repair {run_path}` trains again what is lost",
        )
    if not as_json:
        out.print(f"{run_path}: all {len(parts)} parts are whole", markup=False)


@app.command()
@command
def repair(
    run_path: RunPath,
    local: Annotated[bool, typer.Option(help="Run in this process, without Ray.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train again what a run has lost to damage: the same seeds and data give the same members."""
    from raylora.client import repair_run

    err.print(f"checking {run_path}, its data and its base ...", markup=False)
    with ShownStatus() as show:
        done = repair_run(run_path, local, show)
    if as_json:
        print(json.dumps({"run": run_path, "lost": dict(done.lost), "equal": dict(done.equal)}))
        return
    for name, why in done.lost.items():
        out.print(f"{why}; made again{_LIKENESS[done.equal.get(name)]}", markup=False)
    if not done.lost:
        out.print(f"{run_path}: nothing is lost, nothing was changed", markup=False)


_TOLD = 5
"""Rows left out that are named one by one."""
_LIKENESS = {True: ", bit for bit as it was", False: ", but its last bits differ from before", None: ""}


def _renaming(columns: list[str]) -> dict[str, str]:
    pairs = [column.partition("=") for column in columns]
    wrong = [column for column, (ours, _, theirs) in zip(columns, pairs, strict=True) if not ours or not theirs]
    if wrong:
        raise UsageError(f"--columns: {wrong[0]!r} is not of the form text=review")
    return {ours: theirs for ours, _, theirs in pairs}
