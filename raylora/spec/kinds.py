"""Every registered kind in words: its sentence, its papers, its keys, and for a task its columns and a first spec."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raylora import registry
from raylora.spec.keys import Key, about, keys_of
from raylora.spec.starting import Starter, starter_text

SEAMS = {
    "adapter": "What is trained in each member.",
    "quantization": "How the frozen base's weights are stored.",
    "compensation": "A low-rank pair that makes up for what quantization lost.",
    "loss": "What a student learns from a teacher's predictions by.",
    "task": "What a row means and what the model is asked for.",
    "tracker": "Where the numbers of a run are shown while it goes on.",
}
"""The seams that a spec configures."""
WHERE = {
    "adapter": "adapter", "quantization": "base.quantization", "compensation": "base.compensation",
    "loss": "distill.loss", "task": "task", "tracker": "tracking",
}
"""The key that chooses a kind of each seam."""


@dataclass(frozen=True)
class Columns:
    """What a task reads of a row."""

    required: Sequence[str]
    optional: Sequence[str]
    label: str | None
    """The column of the label, which sets to be predicted may lack; None where the text is its own label."""


@dataclass(frozen=True)
class Kind:
    """A registered kind of a seam."""

    seam: str
    name: str
    title: str
    """The first paragraph of its module."""
    says: str
    """What its Spec is."""
    papers: Sequence[str]
    keys: Sequence[Key]
    methods: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of a kind that has several methods: each one's options."""
    columns: Columns | None = None
    row: Mapping[str, Any] | None = None
    spec: str = ""
    """A first spec, as YAML."""

    def record(self) -> dict[str, Any]:
        """Return the kind as plain data."""
        record: dict[str, Any] = {"seam": self.seam, "kind": self.name, "title": self.title, "says": self.says,
                  "papers": list(self.papers), "keys": [key.record() for key in self.keys]}
        if self.methods:
            record["methods"] = {name: list(options) for name, options in self.methods.items()}
        if self.columns is not None:
            record |= {"columns": vars(self.columns), "row": self.row, "spec": self.spec}
        return record


def kind_of(seam: str, name: str) -> Kind:
    """Return a kind in words; its module is imported. Raises: SpecError for an unknown one."""
    module = registry.load(seam, name)
    title = _flat(about(module).partition("\n\n")[0])
    starter: Starter | None = getattr(module, "STARTER", None)
    task = module.build(module.Spec(**starter.task)) if starter is not None else None
    return Kind(
        seam, name, title, _flat(about(module.Spec)), papers_in(f"{about(module)} {about(module.Spec)}"),
        tuple(keys_of(module.Spec)),
        getattr(module, "OPTIONS", {}),
        Columns(task.columns, task.optional_columns, task.label_column) if task is not None else None,
        starter.row if starter is not None else None,
        starter_text(name, starter, FIRST_ADAPTER) if starter is not None else "",
    )


FIRST_ADAPTER = {"kind": "lora", "rank": 8, "alpha": 16, "target_modules": "auto"}
"""The adapter of a first spec, unless another is asked for."""


def papers_in(text: str) -> tuple[str, ...]:
    """Return the numbers of the papers that a text names, such as 2106.09685."""
    return tuple(dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{5})", text)))


def written_out(alias: registry.Alias) -> str:
    """Return what an alias stands for, as YAML has it."""
    keys = [f"{key}: {value}" for key, value in alias.keys.items()]
    options = ", ".join(f"{key}: {_plain(value)}" for key, value in alias.options.items())
    return f"{{kind: {alias.kind}, {', '.join(keys)}{f', options: {{{options}}}' if options else ''}}}"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flat(text: str) -> str:
    """Return the text with each paragraph on one line."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
