"""Kinds and where they live: adding an adapter, a quantizer, a task or a tracker is one new file and one line here.

Modules are named, not imported: reading a spec must not import torch before it has to, and the layers
above stay unknown to this one. Each named module exposes ``Spec`` (a pydantic model) and ``build``, a tracker
``check`` too; an output, which a spec does not configure, ``build`` alone, and the report of one its ``SECTION``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

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
    },
    "loss": {
        "kl": "raylora.distill.losses.kl",
        "reverse_kl": "raylora.distill.losses.reverse_kl",
        "js": "raylora.distill.losses.js",
        "mse": "raylora.distill.losses.mse",
        "dirichlet": "raylora.distill.losses.dirichlet",
        "multi_head": "raylora.distill.losses.multi_head",
        "topk_kl": "raylora.distill.losses.topk_kl",
    },
    "task": {
        "classification": "raylora.data.tasks.classification",
        "regression": "raylora.data.tasks.regression",
        "multiple_choice": "raylora.data.tasks.multiple_choice",
        "language_modeling": "raylora.data.tasks.language_modeling",
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
        raise SpecError(f"unknown {seam} kind {kind!r}", suggest(kind, REGISTRY[seam])) from None
    return importlib.import_module(name)
