"""Members in PEFT's format: a folder that ``PeftModel.from_pretrained`` loads without raylora.

Where PEFT knows a kind, what raylora keeps per member maps onto PEFT's names one to one; nothing is merged or
rounded. A kind that PEFT does not know is kept under raylora's own names, without a configuration that would mislead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raylora import registry
from raylora.adapters.base import HEAD, PeftNative, PeftWritten, Site, Tensors
from raylora.spec import AdapterSpec

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftFiles:
    """The tensors of ``adapter_model.safetensors`` and the content of ``adapter_config.json``."""

    tensors: Tensors
    config: dict[str, Any] | None
    """None for a kind that PEFT does not know."""

    def config_bytes(self) -> bytes:
        """Return the configuration as a file."""
        return json.dumps(self.config, indent=2, sort_keys=True).encode()


def to_peft(
    tensors: Mapping[str, Tensor], spec: AdapterSpec, sites: Sequence[Site], target_modules: Sequence[str],
    task_type: str, base_name: str,
) -> PeftFiles:
    """Return a member as a PEFT adapter, or under its own names where PEFT does not know its kind.

    Args:
        target_modules: names or endings that select exactly the sites.
        task_type: ``SEQ_CLS`` or ``CAUSAL_LM``.
        base_name: the hub id or relative name that the adapter remembers its base by.
    """
    adapter = registry.load("adapter", spec.kind).build(spec)
    if not isinstance(adapter, PeftNative):
        return PeftFiles(dict(tensors), None)
    heads = sorted({_saved_module(name.removeprefix(HEAD)) for name in tensors if name.startswith(HEAD)})
    settings = {
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": any(site.transposed for site in sites),
        "target_modules": list(target_modules),
        "modules_to_save": heads or None,
    }
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)}
    files = peft_names(tensors)
    if isinstance(adapter, PeftWritten):
        files = {_to_peft_name(name): tensors[name] for name in tensors.keys() - own.keys()}
        files |= adapter.peft_tensors(own, sites)
    config = adapter.peft_config()
    if isinstance(adapter, PeftWritten):  # not every method has every setting
        settings = {key: value for key, value in settings.items() if key in config}
    return PeftFiles(files, {**config, **settings})


def peft_names(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return a member's tensors under the names that PEFT's LoRA and its like have for them."""
    return {_to_peft_name(name): tensor for name, tensor in tensors.items()}


def from_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Tensors:
    """Return a member from what :func:`to_peft` wrote."""
    if config is None:
        return dict(tensors)
    heads = config.get("modules_to_save") or []
    return {_from_peft_name(name, heads): tensor for name, tensor in tensors.items()}


def _saved_module(name: str) -> str:
    """Return the module that PEFT saves for a head's tensor.

    For SEQ_CLS it always saves a whole ``classifier`` or ``score``, so that a linear inside one must not be named.
    """
    parts = name.split(".")[:-1]
    whole = next((n for n, part in enumerate(parts, 1) if part in ("classifier", "score")), len(parts))
    return ".".join(parts[:whole])


def _to_peft_name(name: str) -> str:
    if name.startswith(HEAD):
        return _PREFIX + name.removeprefix(HEAD)
    return f"{_PREFIX}{name}.weight"


def _from_peft_name(name: str, heads: Sequence[str]) -> str:
    inner = name.removeprefix(_PREFIX)
    if any(inner.startswith(head + ".") for head in heads):
        return HEAD + inner
    return inner.removesuffix(".weight")
