"""``python -m raylora.spec.reference FOLDER`` writes the reference: every key and every kind, as Markdown.

The pages are made from the models, the registry and their docstrings alone; a test holds the committed ones against it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from raylora import registry
from raylora.spec.keys import NAME, SECTION_DEFAULT, Key, keys_of
from raylora.spec.kinds import SEAMS, WHERE, Kind, kind_of, written_out
from raylora.spec.run import RunSpec

PAGES = {
    "adapters.md": ("Adapters", ("adapter",)),
    "quantization.md": ("Quantization and compensation", ("quantization", "compensation")),
    "losses.md": ("Losses", ("loss",)),
    "tasks.md": ("Tasks", ("task",)),
    "trackers.md": ("Trackers", ("tracker",)),
}
"""Pages of kinds: their titles and the seams on them."""
_PAGE_OF = {seam: page for page, (_, seams) in PAGES.items() for seam in seams}
_MADE = "<!-- Made by `make docs` from the models and their docstrings: change those, not this file. -->\n\n"


def pages() -> dict[str, str]:
    """Return the reference: file name -> Markdown."""
    found = {"README.md": _index(), "run.md": _run_page()}
    found |= {page: _kinds_page(title, seams) for page, (title, seams) in PAGES.items()}
    return {page: _MADE + text for page, text in found.items()}


def write(folder: Path) -> list[Path]:
    """Write the reference into a folder and return its files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for page, text in made.items():
        (folder / page).write_text(text, encoding="utf-8")
    return [folder / page for page in made]


def _index() -> str:
    sections = "\n".join(
        f"| [`{key.path}`](run.md#{_anchor(key.path)}) | {_linked(_cell(key.says))} |" for key in keys_of(RunSpec)
        if "." not in key.path and key.section is not None
    )
    seams = "\n".join(
        f"| [{seam}]({_PAGE_OF[seam]}) | `{WHERE[seam]}` | {says} | {_names(registry.kinds(seam))} |"
        for seam, says in SEAMS.items()
    )
    return f"""# Reference

Every key of a spec and every kind. `raylora explain KEY` prints the same, such as `raylora explain optimization.lr`,
`raylora explain adapter.peft` or `raylora explain dora`; `raylora schema` is for editors.

## Sections of a run spec

| section | what it is |
|---|---|
{sections}

## Kinds

| what | key | what it is | kinds |
|---|---|---|---|
{seams}

Adapters have [further names](adapters.md#short-names), such as `dora` and `vera`.
"""


def _run_page() -> str:
    keys = list(keys_of(RunSpec))
    top = [key for key in keys if "." not in key.path]
    parts = ["# The run spec\n", "A key that is not given stands at its default; an unknown key is an error.\n"]
    parts.append(_table(top))
    below = [key for key in keys if "." in key.path]
    for head, group in groupby(below, key=lambda key: key.path.partition(".")[0]):
        says = next(key.says for key in top if key.path == head)
        parts += [f"## {head}\n", f"{_linked(says)}\n", _table(list(group))]
    return "\n".join(parts)


def _kinds_page(title: str, seams: Sequence[str]) -> str:
    parts = [f"# {title}\n"]
    for seam in seams:
        parts.append(f"{'## ' + seam.capitalize() + chr(10) * 2 if len(seams) > 1 else ''}{SEAMS[seam]} "
                     f"Chosen by `{WHERE[seam]}`; the kind's name alone will do where no key is required.\n")
        for name in registry.kinds(seam):
            parts.append(_kind_section(kind_of(seam, name), "###" if len(seams) > 1 else "##"))
        if registry.ALIASES.get(seam):
            parts.append(_alias_section(seam))
    return "\n".join(parts)


def _kind_section(kind: Kind, mark: str) -> str:
    parts = [f"{mark} {kind.name}\n", f"{_linked(kind.title)}\n", f"{_linked(kind.says)}\n"]
    parts.append(_table(kind.keys))
    if kind.methods:
        rows = "\n".join(f"| `{name}` | {_names(options)} |" for name, options in kind.methods.items())
        parts.append(f"| method | options that may be given |\n|---|---|\n{rows}\n")
    if kind.columns is not None:
        label = f"`{kind.columns.label}` is the label." if kind.columns.label else "The text is its own label."
        columns = [_names(kind.columns.required)] if kind.columns.required else []
        columns += [f"optional: {_names(kind.columns.optional)}"] if kind.columns.optional else []
        parts.append(f"Columns: {'; '.join(columns)}. {label} A row, and a first spec "
                     f"(`raylora init --task {kind.name}`):\n\n```json\n{json.dumps(kind.row)}\n```\n\n"
                     f"```yaml\n{kind.spec}```\n")
    return "\n".join(parts)


def _alias_section(seam: str) -> str:
    rows = "\n".join(
        f"| `{name}` | {_linked(alias.says)} | `{written_out(alias)}` | "
        f"{', '.join(f'`{key}` (`options.{inner}`)' for key, inner in alias.names.items())} |"
        for name, alias in sorted(registry.ALIASES[seam].items())
    )
    return f"""## Short names

A name stands for a kind with settings; the recorded spec holds those. Keys of the kind may be added, and so may those
of the last column.

| name | method | stands for | keys of its own |
|---|---|---|---|
{rows}
"""


def _table(keys: Iterable[Key]) -> str:
    rows = "\n".join(
        f"| `{key.path}` | {_accepts(key)} | {_default(key)} | {_linked(_cell(key.says))} |" for key in keys
    )
    return f"| key | what it may be | default | what it is |\n|---|---|---|---|\n{rows}\n"


def _accepts(key: Key) -> str:
    words = _cell(key.accepts) + (f", in {key.unit}" if key.unit else "")
    if key.seam:
        page = f"[{key.seam}]({_PAGE_OF[key.seam]})"
        return words.replace(f"a kind of {key.seam}", f"a kind of {page}")
    if key.section is not None and not key.below.startswith(key.path):
        return f"{words}, with the keys of `{key.below}`"
    return words


def _default(key: Key) -> str:
    if key.default is None:
        return "**required**"
    return key.default if key.default == SECTION_DEFAULT else f"`{_cell(key.default)}`"


def _names(columns: Iterable[str]) -> str:
    return ", ".join(f"`{column}`" for column in columns)


def _linked(text: str) -> str:
    text = text.replace("``", "`")
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _anchor(path: str) -> str:
    return path.replace(f".{NAME}", "").replace(".", "")


if __name__ == "__main__":
    for path in write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference")):
        print(path)
