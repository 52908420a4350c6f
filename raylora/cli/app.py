"""What every command shares: the application, its options, and how errors and results are said.

Exit codes: 0 ok, 1 the run failed or is damaged, 2 usage or configuration, 3 finished with fewer members than asked,
130 and 143 interrupted and resumable.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

import raylora
from raylora import logs
from raylora.display.console import err, out
from raylora.errors import RayloraError
from raylora.records import RunMetrics

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
SpecFileOrNone = Annotated[Path | None, typer.Argument(help="A run spec in YAML; `raylora init` writes one.")]
SpecYaml = Annotated[str, typer.Option("--spec-yaml", help="The run spec as YAML text, in place of a file.")]
RunPath = Annotated[str, typer.Argument(help="A run directory.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set ensemble.members=3")]
AllowMissing = Annotated[bool, typer.Option("--allow-missing", help=(
    "Go on without members that are damaged, missing or not finished."
))]
InProcess = Annotated[bool, typer.Option("--local", help="As `raylora run --local` would: one process, without Ray.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]


def command(function: Callable[..., Any]) -> Callable[..., Any]:
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


def say(as_json: bool, record: dict[str, Any], text: str) -> None:
    """Print a result: its record for programs, its text for people."""
    if as_json:
        print(json.dumps(record))
    else:
        out.print(text, markup=False)


def show_result(store: Any, metrics: RunMetrics, as_json: bool) -> None:
    """Print the table of a finished run and where its report is."""
    from raylora.report.advice import advice
    from raylora.report.table import console_table

    report_path = f"{store.uri}/report.html"
    if as_json:
        print(json.dumps({"run": store.uri, "metrics": f"{store.uri}/metrics.json", "report": report_path,
                          "phase": metrics["run"]["phase"]}))
        return
    out.print(console_table(metrics))
    if metrics.get("answers"):
        show_answers(metrics["answers"])
    for sentence in advice(metrics):
        out.print(f"note: {sentence}", markup=False)
    out.print(f"report: {report_path}")


def show_answers(found: Any) -> None:
    """Print what the ensemble's answers to each set are worth."""
    from raylora.cli.tables import answer_tables

    for name, one in found["sets"].items():
        out.print(f"{name}: {one['ensemble']['answers']:,} answers", style="bold", markup=False)
        for table in answer_tables(one["ensemble"]):
            out.print(table)
