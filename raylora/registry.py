"""Kinds and where they live: adding an adapter, a quantizer, a task or a tracker is one new file and one line here.

Modules are named, not imported: reading a spec must not import torch before it has to, and the layers
above stay unknown to this one. Each named module exposes ``Spec`` (a pydantic model) and ``build``, a tracker
``check`` too; an output, which a spec does not configure, ``build`` alone, and the report of one its ``SECTION``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from raylora.errors import SpecError, suggest

REGISTRY: dict[str, dict[str, str]] = {
    "adapter": {
        "lora": "raylora.adapters.lora",
        "mos": "raylora.adapters.mos",
        "none": "raylora.adapters.none",
        "prolora": "raylora.adapters.prolora",
        "melora": "raylora.adapters.melora",
        "lora_xs": "raylora.adapters.lora_xs",
        "nola": "raylora.adapters.nola",
        "boosted_lora": "raylora.adapters.boosted_lora",
        "peft": "raylora.adapters.peft",
        "full": "raylora.adapters.full",
    },
    "quantization": {
        "none": "raylora.quant.none",
        "nf4": "raylora.quant.nf4",
        "int8": "raylora.quant.int8",
        "rtn": "raylora.quant.rtn",
        "optq": "raylora.quant.optq",
    },
    "compensation": {
        "cloq": "raylora.init.cloq",
        "loftq": "raylora.init.loftq",
        "apiq": "raylora.init.apiq",
        "rilq": "raylora.init.rilq",
    },
    "loss": {
        "kl": "raylora.distill.losses.kl",
        "reverse_kl": "raylora.distill.losses.reverse_kl",
        "js": "raylora.distill.losses.js",
        "mse": "raylora.distill.losses.mse",
        "dirichlet": "raylora.distill.losses.dirichlet",
        "multi_head": "raylora.distill.losses.multi_head",
        "topk_kl": "raylora.distill.losses.topk_kl",
        "gkd": "raylora.distill.losses.gkd",
        "answers": "raylora.distill.losses.answers",
    },
    "task": {
        "classification": "raylora.data.tasks.classification",
        "regression": "raylora.data.tasks.regression",
        "multiple_choice": "raylora.data.tasks.multiple_choice",
        "language_modeling": "raylora.data.tasks.language_modeling",
        "instruction": "raylora.data.tasks.instruction",
    },
    "output": {
        "classes": "raylora.ensemble.outputs.classes",
        "value": "raylora.ensemble.outputs.value",
        "tokens": "raylora.ensemble.outputs.tokens",
    },
    "tracker": {
        "tensorboard": "raylora.tracking.tensorboard",
        "mlflow": "raylora.tracking.mlflow",
        "wandb": "raylora.tracking.wandb",
    },
    "report": {
        "classes": "raylora.report.outputs.classes",
        "value": "raylora.report.outputs.value",
        "tokens": "raylora.report.outputs.tokens",
    },
}


@dataclass(frozen=True)
class Alias:
    """A name that people know a kind's settings by."""

    says: str
    kind: str
    keys: Mapping[str, Any]
    """What it stands for; whoever gives one of them too must mean the same."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What it stands for under ``options``."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Keys that may stand beside it, as with ``lora`` -> their names under ``options``."""
    first: Sequence[Mapping[str, Any]] = ({},)
    """What a first spec begins with; where the layers cannot have it, the next."""


def _peft(
    says: str, method: str, *, rank: str = "", alpha: str = "", first: Sequence[Mapping[str, Any]] = (), **options: Any
) -> Alias:
    names = {key: name for key, name in (("rank", rank), ("alpha", alpha)) if name}
    usual = [{key: value for key, value in (("rank", r), ("alpha", 2 * r)) if key in names} for r in (8, 2)]
    return Alias(says, "peft", {"method": method}, options, names, first or usual)


def _options(key: str, *values: int) -> list[dict[str, dict[str, int]]]:
    return [{"options": {key: value}} for value in values]


ALIASES: dict[str, dict[str, Alias]] = {
    "adapter": {
        "dora": _peft("DoRA (arXiv 2402.09353)", "LORA", rank="r", alpha="lora_alpha", use_dora=True),
        "rslora": _peft("rsLoRA (arXiv 2312.03732)", "LORA", rank="r", alpha="lora_alpha", use_rslora=True),
        "pissa": _peft("PiSSA (arXiv 2404.02948)", "LORA", rank="r", alpha="lora_alpha", init_lora_weights="pissa"),
        "olora": _peft("OLoRA (arXiv 2406.01775)", "LORA", rank="r", alpha="lora_alpha", init_lora_weights="olora"),
        "vera": _peft("VeRA (arXiv 2310.11454)", "VERA", rank="r", first=[{"rank": 256}]),
        "vblora": _peft(
            "VB-LoRA (arXiv 2405.15179)", "VBLORA", rank="r", first=_options("vector_length", 64, 32, 16, 8)
        ),
        "randlora": _peft("RandLoRA (arXiv 2502.00987)", "RANDLORA", rank="r", alpha="randlora_alpha"),
        "loha": _peft("LoHa, of FedPara (arXiv 2108.06098)", "LOHA", rank="r", alpha="alpha"),
        "lokr": _peft("LoKr (arXiv 2309.14859)", "LOKR", rank="r", alpha="alpha"),
        "hira": _peft("HiRA, a Hadamard product with the frozen weight", "HIRA", rank="r"),
        "miss": _peft("MiSS (arXiv 2409.15371)", "MISS", rank="r"),
        "gralora": _peft("GraLoRA (arXiv 2505.20355)", "GRALORA", rank="r", alpha="alpha"),
        "fourierft": _peft("FourierFT (arXiv 2405.03003)", "FOURIERFT", first=_options("n_frequency", 1000, 100)),
        "ia3": _peft("(IA)3 (arXiv 2205.05638)", "IA3"),
        "oft": _peft("OFT (arXiv 2306.07280)", "OFT", first=_options("oft_block_size", 32, 8)),
        "hra": _peft("HRA (arXiv 2405.17484)", "HRA", rank="r"),
        "road": _peft("RoAd (arXiv 2409.00119)", "ROAD", first=_options("group_size", 64, 16, 8)),
    },
}
"""What people type for a kind with settings; a spec that was read holds the kind and the settings."""
_INSTEAD = {
    "adapter": {
        "adalora": "AdaLoRA takes ranks away from layers while it trains, which members cannot: use lora or dora",
        "qlora": "QLoRA is adapter kind lora on a base with quantization nf4",
    },
}
"""Names that are asked for and are no kinds, and what to do."""


def kinds(seam: str) -> list[str]:
    """Return the registered kinds of a seam, sorted."""
    return sorted(REGISTRY[seam])


def load(seam: str, kind: str) -> ModuleType:
    """Import the module behind a kind.

    Raises:
        SpecError: the kind is unknown; the message lists the known ones.
    """
    try:
        name = REGISTRY[seam][kind]
    except KeyError:
        known = [*REGISTRY[seam], *ALIASES.get(seam, {})]
        hint = _INSTEAD.get(seam, {}).get(kind) or suggest(kind, known)
        raise SpecError(f"unknown {seam} kind {kind!r}", hint) from None
    return importlib.import_module(name)


def alias_of(seam: str, kind: Any) -> Alias | None:
    """Return what a name stands for, or None for one that is a kind itself, or nothing."""
    return ALIASES.get(seam, {}).get(kind) if isinstance(kind, str) else None


def long_form(seam: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section of a spec with its kind in place of an alias.

    Raises:
        SpecError: another key of the section says otherwise than the alias.
    """
    name = section.get("kind")
    alias = alias_of(seam, name)
    if alias is None:
        return dict(section)
    options = section.get("options", {})
    if not isinstance(options, Mapping):
        raise SpecError(f"{seam} {name}: 'options' must be a mapping, not {options!r}")
    short = {key: section[key] for key in alias.names if key in section}
    named = {alias.names[key]: value for key, value in short.items()}
    for key, meant in alias.keys.items():
        _agree(f"{seam} {name} stands for {alias.kind} with {key}", meant, section.get(key, meant), key)
    for key, meant in alias.options.items():
        _agree(f"{seam} {name} stands for options.{key}", meant, options.get(key, meant), f"options.{key}")
    for key, value in short.items():
        inner = alias.names[key]
        _agree(f"{seam} {name}: {key} says", value, options.get(inner, value), f"options.{inner}")
    rest = {key: value for key, value in section.items() if key not in short}
    found = rest | {"kind": alias.kind, **alias.keys}
    return found | {"options": {**options, **alias.options, **named}} if options or alias.options or named else found


def _agree(what: str, meant: Any, given: Any, key: str) -> None:
    if given != meant:
        raise SpecError(f"{what} {meant!r}, and {key} says {given!r}", "leave out one of them")
