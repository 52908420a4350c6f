"""The commands that ask a language model's ensemble: the prompts of `predict`, and `chat`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from raylora.cli.app import AllowMissing, AsJson, RunPath, app, command, say, show_answers
from raylora.cli.tables import answer_tables
from raylora.display.console import err, out
from raylora.display.progress import ShownStatus
from raylora.errors import DataError, UsageError

if TYPE_CHECKING:
    from raylora.engine.generation.answers import Answer, Token
    from raylora.serve.inputs import OnBadRow

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Of an answer, at most.")]
Temperature = Annotated[float, typer.Option("--temperature", help=(
    "Of the members' mixture; 0 takes the most probable token each time."
))]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the most probable tokens that have this share.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="A text that ends an answer; may be repeated.")]
Seed = Annotated[int, typer.Option("--seed", help="Decides what is drawn.")]
_STRONG_NATS = 0.5
"""The disagreement from which on a token has the strongest shade."""
_LINE_EVERY_S = 10.0
_HELP = "/members: what each member would have said. /new: forget the chat. /quit, or the end of input: leave."


def answer_prompts(
    run: str, prompts: Sequence[str], file: str | None, output: str | None, settings: dict[str, Any],
    columns: dict[str, str], delimiter: str | None, on_bad_row: OnBadRow, metrics: Sequence[str], allow_missing: bool,
    as_json: bool, plain: bool = False,
) -> None:
    """Answer prompts given at the command line or in a file, and print them or write them as JSON lines."""
    from raylora.ensemble.answer_metrics import check_metrics
    from raylora.serve.answer_files import describe_file, read_prompts, references_of, write_answers
    from raylora.serve.predictor import load_ensemble

    check_metrics(metrics)
    if metrics and (file is None or output is None or settings["each_member"]):
        raise UsageError("--metric compares the answers to a file, one for each row",
                         "give --file and --out, and leave --each-member out")
    ensemble = load_ensemble(run, allow_missing=allow_missing, plain=plain)
    rows: list[dict[str, Any]] = [{"id": str(n), "prompt": text, "text": text} for n, text in enumerate(prompts)]
    if file is not None:
        read = read_prompts(ensemble, file, columns, delimiter, on_bad_row)
        rows = list(read.rows)
        for place in read.left_out[:5]:
            err.print(f"left out: {place}", markup=False)
        if read.left_out:
            err.print(f"{len(read.left_out):,} row(s) left out, {len(rows):,} to answer", markup=False)
    references = references_of(ensemble, rows) if metrics else []
    if output:
        done = write_answers(ensemble, rows, output, settings, _Progress())
        said = f"wrote {len(rows):,} answers to {output}" + (f", {done:,} of them from before" if done else "")
        described = describe_file(output, references, metrics, ensemble.spec.evaluation) if metrics else None
        say(as_json, {"out": output, "rows": len(rows), "from_before": done, "described": described}, said)
        if described and not as_json:
            for table in answer_tables(described):
                out.print(table)
        return
    for row, answers in zip(rows, ensemble.answers(rows, **settings), strict=True):
        for answer in answers:
            if as_json:
                print(json.dumps(answer.record(), ensure_ascii=False))
            else:
                _print_answer(str(row.get("prompt", row["id"])), answer)


@app.command()
@command
def chat(
    run_path: RunPath,
    system: Annotated[str, typer.Option("--system", help="What the model is told before the chat.")] = "",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    allow_missing: AllowMissing = False,
) -> None:
    """Chat with a finished ensemble; the darker a word stands out, the more its members disagree about it."""
    from raylora.serve.predictor import load_ensemble

    err.print(f"loading {run_path} ...", markup=False)
    ensemble = load_ensemble(run_path, allow_missing=allow_missing)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed,
    }
    if ensemble.task.spec.kind != "instruction":
        raise DataError(f"a {ensemble.task.spec.kind} run does not know chats",
                        "use `raylora predict RUN --prompt TEXT`, which goes on with a text")
    out.print(_legend())
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    begun = len(messages)
    for line in _lines():
        if line == "/quit":
            return
        if line == "/new":
            messages = messages[:begun]
        elif line == "/members" and len(messages) > begun:
            asked = messages[:-1]
            for own in ensemble.generate([asked], each_member=True, **settings)[0]:
                out.print(Text(f"member {own.member}: ", style="bold") + Text(own.text))
        elif line.startswith("/"):
            out.print(_HELP, markup=False)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                said = _stream(ensemble.stream(messages, **settings))
            except DataError as error:  # too long, or a text that ends turns: the chat goes on without it
                err.print(f"error: {error}", style="red", markup=False)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": said or " "})


@app.command()
@command
def evaluate(
    run_path: RunPath,
    metric: Annotated[list[str] | None, typer.Option("--metric", help=(
        "exact_match (the default), f1, contains, number, choice; may be repeated. By the first an answer is right."
    ))] = None,
    normalize: Annotated[str, typer.Option("--normalize", help=(
        "What is alike before answers are compared: squad (no case, punctuation, articles), space, or none."
    ))] = "squad",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer, at most.")] = 64,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Of each evaluation set, at most.")] = 200,
    local: Annotated[bool | None, typer.Option("--local/--ray", help=(
        "In this process or on Ray; by default on the cluster that RAY_ADDRESS names, if any."
    ))] = None,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
) -> None:
    """Let a finished ensemble answer its evaluation sets, compare with the references, and write the report anew.

    Answers are committed as they come: the same command goes on where it stopped. A spec with evaluation.generation
    has this done as a part of its run.
    """
    from raylora.client import evaluate_run
    from raylora.ensemble.answer_metrics import NORMALIZATIONS, check_metrics
    from raylora.spec import GenerationSpec

    metrics = metric or ["exact_match"]
    check_metrics(metrics)
    if normalize not in NORMALIZATIONS:
        raise UsageError(f"unknown --normalize {normalize!r}", f"use {', '.join(NORMALIZATIONS)}")
    settings = GenerationSpec.model_validate({
        "metrics": list(dict.fromkeys(metrics)), "normalize": normalize, "max_new_tokens": max_new_tokens, "rows": rows,
    })
    with ShownStatus() as show:
        found = evaluate_run(run_path, settings, local, show, allow_missing)
    if as_json:
        print(json.dumps(found["sets"] | {"run": run_path}))
        return
    show_answers(found)
    out.print(f"report: {run_path}/report.html", markup=False)


def _lines() -> Iterable[str]:
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ").strip()


def _stream(pieces: Iterable[Any]) -> str:
    """Print an answer's pieces as they come, shaded, and return all of it."""
    text, held = "", []
    for piece in pieces:
        held.append(piece.token)
        if piece.text:
            out.print(Text(piece.text, style=shade(held)), end="", soft_wrap=True)
            text, held = text + piece.text, []
    out.print()
    return text


def shade(tokens: Sequence[Token]) -> str:
    """Return the style of some text by how much the members disagree about its tokens."""
    share = min(1.0, max((token.mutual_information or 0.0 for token in tokens), default=0.0) / _STRONG_NATS)
    if share < 0.05:
        return ""
    return f"black on rgb(255,{round(235 - 130 * share)},{round(190 - 190 * share)})"


def _legend() -> Text:
    shades = [Text(f" {nats:.1f} ", style=f"black on rgb(255,{round(235 - 260 * nats)},{round(190 - 380 * nats)})")
              for nats in (0.1, 0.2, 0.3, 0.4, 0.5)]
    return Text.assemble("disagreement of the members, nats: ", *shades, f"\n{_HELP}")


def _print_answer(prompt: str, answer: Answer) -> None:
    name = "" if answer.member is None else f"member {answer.member}: "
    out.print(Text(f"{prompt}", style="dim"))
    out.print(Text(name, style="bold") + Text(answer.text))
    sums = answer.sums()
    row = {"NLL": sums["nll"], "per token": sums["mean_nll"], "entropy per token": sums["mean_entropy"]}
    if "mean_mutual_information" in sums:
        row["disagreement per token"] = sums["mean_mutual_information"]
    if answer.agreement is not None:
        row["members that agree"] = answer.agreement
    table = Table(*row, box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_row(*(f"{value:.3g}" for value in row.values()))
    out.print(table)


class _Progress:
    """Says how many prompts are answered and when the rest will be: on one line, or now and then."""

    def __init__(self) -> None:
        self._first, self._started, self._told = -1, 0.0, 0.0

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if self._first < 0:
            self._first, self._started = done, now
        if done < of and now - self._told < (0.5 if err.is_terminal else _LINE_EVERY_S):
            return
        self._told = now
        here, spent = done - self._first, now - self._started
        rest = f", about {_minutes(spent / here * (of - done))} left" if here and done < of else ""
        rest = f" in {_minutes(spent)}" if done == of else rest
        err.print(f"{done:,} of {of:,} prompts answered{rest}", markup=False,
                  end="\r" if err.is_terminal and done < of else "\n")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
