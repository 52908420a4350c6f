"""The command that says what there is to set: explain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raylora.cli.app import AsJson, app, command
from raylora.display.console import out

if TYPE_CHECKING:
    from raylora.spec.keys import Key
    from raylora.spec.kinds import Kind
    from raylora.spec.lookup import Topic


@app.command()
@command
def explain(
    key: Annotated[str, typer.Argument(help=(
        "A key such as optimization.lr, a section, a kind such as adapter.peft or task.regression, or dora."
    ))] = "",
    as_json: AsJson = False,
) -> None:
    """Say what a key or a kind of a spec is, what it may be and its default; without KEY, list the sections."""
    from raylora.spec.lookup import look_up

    if not key:
        _explain_all(as_json)
        return
    topics = look_up(key)
    if as_json:
        print(json.dumps([topic.record() for topic in topics], ensure_ascii=False))
        return
    for number, topic in enumerate(topics):
        if number:
            out.print()
        _explain_one(topic)


def _explain_all(as_json: bool) -> None:
    from raylora import registry
    from raylora.spec.kinds import SEAMS, WHERE
    from raylora.spec.lookup import sections

    if as_json:
        kinds = {seam: {"key": WHERE[seam], "says": says, "kinds": registry.kinds(seam),
                        "aliases": sorted(registry.ALIASES.get(seam, {}))} for seam, says in SEAMS.items()}
        print(json.dumps({"sections": [key.record() for key in sections()], "seams": kinds}))
        return
    table = Table("section", "what it is", box=None, padding=(0, 2, 0, 0))
    for key in sections():
        table.add_row(key.path, _said(key.says))
    out.print(table)
    out.print()
    table = Table("key", "kinds", box=None, padding=(0, 2, 0, 0))
    for seam in SEAMS:
        names = [*registry.kinds(seam), *sorted(registry.ALIASES.get(seam, {}))]
        table.add_row(WHERE[seam], ", ".join(names))
    out.print(table)
    out.print("\nnext: raylora explain optimization, raylora explain optimization.lr, raylora explain adapter.lora")


def _explain_one(topic: Topic) -> None:
    if topic.alias:
        _explain_alias(topic)
    if topic.kind is not None:
        _explain_kind(topic.kind)
    if topic.key is None:
        return
    key = topic.key
    of_kind = f", of kind {topic.of_kind}" if topic.of_kind else ""
    out.print(f"{key.path}{of_kind}", style="bold", markup=False)
    _indented(_said(key.says), f"may be: {_accepts(key)}", f"default: {_default(key)}")
    if topic.kinds:
        _indented(f"kinds: {', '.join(topic.kinds)}")
    if topic.aliases:
        _indented(f"short names: {', '.join(topic.aliases)}")
    if topic.below:
        _keys(topic.below)


def _explain_alias(topic: Topic) -> None:
    from raylora import registry
    from raylora.spec.kinds import written_out

    assert topic.kind is not None
    alias = registry.ALIASES[topic.kind.seam][topic.alias]
    out.print(f"{topic.kind.seam} {topic.alias}: {alias.says}", style="bold", markup=False)
    _indented(f"stands for: {written_out(alias)}")
    if alias.names:
        _indented("beside it: " + ", ".join(f"{key} (options.{inner})" for key, inner in alias.names.items()))
    out.print()


def _explain_kind(kind: Kind) -> None:
    out.print(f"{kind.seam} {kind.name}", style="bold", markup=False)
    _indented(_said(kind.title), "", _said(kind.says))
    if kind.papers:
        _indented("papers: " + ", ".join(f"https://arxiv.org/abs/{number}" for number in kind.papers))
    _keys(kind.keys)
    if kind.methods:
        table = Table("method", "options", box=None, padding=(0, 2, 0, 0))
        for method, options in kind.methods.items():
            table.add_row(method, ", ".join(options))
        out.print()
        out.print(Padding(table, (0, 0, 0, 2), expand=False))
    if kind.columns is not None:
        label = [f"label: {kind.columns.label}"] if kind.columns.label else []
        optional = [f"optional: {', '.join(kind.columns.optional)}"] if kind.columns.optional else []
        out.print()
        _indented("; ".join([f"columns: {', '.join(kind.columns.required)}", *optional, *label]),
                  f"a row: {json.dumps(kind.row)}", f"a first spec: raylora init --task {kind.name}")


def _keys(keys: Sequence[Key]) -> None:
    table = Table("key", "may be", "default", "what it is", box=None, padding=(0, 2, 0, 0))
    for key in keys:
        table.add_row(*(Text(text) for text in (key.path, _accepts(key), _default(key), _said(key.says))))
    out.print()
    out.print(Padding(table, (0, 0, 0, 2), expand=False))


def _indented(*lines: str) -> None:
    for line in lines:
        out.print(Padding(Text(line), (0, 0, 0, 2), expand=False))


def _accepts(key: Key) -> str:
    unit = f", in {key.unit}" if key.unit else ""
    same = f", with the keys of {key.below}" if key.section and key.below and not key.below.startswith(key.path) else ""
    return key.accepts + unit + same


def _default(key: Key) -> str:
    return "required" if key.default is None else key.default


def _said(text: str) -> str:
    return text.replace("``", "`")
