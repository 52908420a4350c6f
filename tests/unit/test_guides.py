"""The guides are transcripts: every command in them is run, and what it says is what stands there.

``UPDATE_GUIDES=1 pytest tests/unit/test_guides.py -m slow`` writes down what is said now.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
_MOST_S = 1800
"""What a command may take on a machine that is busy with other things; on a quiet one it is a minute or two."""

_GUIDES = Path(__file__).parents[2] / "docs" / "guides"
_BLOCK = re.compile(r"```(console|yaml|python)(?: (\S+))?\n(.*?)```", re.DOTALL)
_WHILE_IT_RUNS = re.compile(
    r"^(job-\d+ |\S+ (training|evaluating|aggregating|loading)\b|[\w-]+ succeeded$|fetching \S+ for ).*\n", re.MULTILINE
)
"""Lines about how far a run is, and what it fetches where the cache lacks it: they depend on the machine."""
_NUMBER = re.compile(r"±?\d[\d.,]*(?:e-?\d+)?")


def say(command: str, folder: Path) -> str:
    """Run a command as a person would and return what a terminal shows, with the exit code if it is not 0."""
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "110"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=_MOST_S, check=False,
    )
    said = _WHILE_IT_RUNS.sub("", done.stdout).replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
    said = "\n".join(line.rstrip() for line in said.splitlines())
    code = done.returncode if done.returncode >= 0 else 128 - done.returncode
    return said.rstrip() + (f"\n[{code}]" if code else "")


def plain(said: str) -> list[str]:
    """Return the words, with every number alike and without lines and padding: other machines compute other digits."""
    return _NUMBER.sub("0", re.sub(r"[━─┃│┏┓┡┩└┘┳╇┴╋╈┬┼]+", " ", said)).split()


@pytest.mark.parametrize("name", [path.name for path in sorted(_GUIDES.glob("*.md")) if path.name != "README.md"])
def test_a_guide_says_what_raylora_says(name: str, tmp_path: Path) -> None:
    guide = _GUIDES / name
    text = guide.read_text(encoding="utf-8")
    played = 0
    for kind, file, block in _BLOCK.findall(text):
        if kind != "console":
            if file:
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).write_text(block)
            continue
        parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
        written = []
        for part in parts:
            command, _, expected = part.partition("\n")
            said = say(command, tmp_path)
            written.append(f"$ {command}\n{said}\n" if said else f"$ {command}\n")
            played += 1
            if not os.environ.get("UPDATE_GUIDES"):
                assert plain(said) == plain(expected), command
        text = text.replace(f"```console\n{block}```", f"```console\n{''.join(written)}```")
    assert played
    if os.environ.get("UPDATE_GUIDES"):
        guide.write_text(text, encoding="utf-8")
