"""The commands that ask a language model's ensemble: the prompts of `predict`, and `chat`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from raylora.cli.app import AllowMissing, RunPath, app, command, say
from raylora.display.console import err, out
from raylora.errors import DataError

if TYPE_CHECKING:
    from raylora.serve.answers import Answer, Token
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
    columns: dict[str, str], delimiter: str | None, on_bad_row: OnBadRow, allow_missing: bool, as_json: bool,
) -> None:
    """Answer prompts given at the command line or in a file, and print them or write them as JSON lines."""
    from raylora.serve.answer_files import read_prompts, write_answers
    from raylora.serve.predictor import load_ensemble

    ensemble = load_ensemble(run, allow_missing=allow_missing)
    rows: list[dict[str, Any]] = [{"id": str(n), "prompt": text, "text": text} for n, text in enumerate(prompts)]
    if file is not None:
        read = read_prompts(ensemble, file, columns, delimiter, on_bad_row)
        rows = list(read.rows)
        for place in read.left_out[:5]:
            err.print(f"left out: {place}", markup=False)
        if read.left_out:
            err.print(f"{len(read.left_out):,} row(s) left out, {len(rows):,} to answer", markup=False)
    if output:
        done = write_answers(ensemble, rows, output, settings, _progress())
        said = f"wrote {len(rows):,} answers to {output}" + (f", {done:,} of them from before" if done else "")
        say(as_json, {"out": output, "rows": len(rows), "from_before": done}, said)
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


def _progress() -> Callable[[int, int], None]:
    """Return what says how many prompts are answered and when the rest will be: on one line, or now and then."""
    started, last, first = time.monotonic(), 0.0, -1

    def tell(done: int, of: int) -> None:
        nonlocal last, first
        now = time.monotonic()
        if first < 0:
            first = done
        if done < of and now - last < (0.5 if err.is_terminal else _LINE_EVERY_S):
            return
        last = now
        left = (now - started) / (done - first) * (of - done) if done > first else None
        rest = "" if left is None else f", about {_minutes(left)} left"
        rest = rest if done < of else f" in {_minutes(now - started)}"
        err.print(f"{done:,} of {of:,} prompts answered{rest}", markup=False,
                  end="\r" if err.is_terminal and done < of else "\n")

    return tell


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
