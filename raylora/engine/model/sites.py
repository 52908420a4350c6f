"""Which layers of a model an adapter is attached to, and which are its task head."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from raylora.adapters.base import Adapter, Site, WholeModel, find_sites, is_linear
from raylora.adapters.side_by_side import adapter_of
from raylora.spec import AdapterSpec

_MORE_TARGETS = {"mpnet": ["q", "v"], "modernbert": ["Wqkv"], "gemma3_text": ["q_proj", "v_proj"]}
"""Attention projections of architectures that PEFT has no default for."""


@dataclass(frozen=True)
class Selected:
    """The layers that an adapter is attached to."""

    sites: list[Site]
    target_modules: list[str]
    """The same as PEFT names them: by their endings where those select the same layers, else in full."""


@dataclass(frozen=True)
class AdaptedLayers:
    """The layers of a base that its members adapt."""

    all: Selected
    """What any member adapts, in the model's order."""
    own: Mapping[str, Selected]
    """What those adapt who say the same of ``target_modules`` and ``layers``."""

    @classmethod
    def find(cls, model: Any, specs: Sequence[AdapterSpec], heads: Sequence[str]) -> AdaptedLayers:
        """Return the layers that members of these adapters have in a model. Raises: BaseError."""
        own: dict[str, Selected] = {}
        for spec in specs:
            sites = adapter_sites(model, adapter_of(spec), heads)  # checks an adapter of layers that are known, too
            if _selection(spec) not in own:
                own[_selection(spec)] = Selected(sites, target_names(model, sites, heads))
        if len(own) == 1:
            return cls(next(iter(own.values())), {})
        found = {site.name: site for selected in own.values() for site in selected.sites}
        union = [found[name] for name, _ in model.named_modules() if name in found]
        return cls(Selected(union, target_names(model, union, heads)), own)

    def of(self, spec: AdapterSpec) -> Selected:
        """Return the layers of members with this adapter; who adapts nothing is told all."""
        return self.own[_selection(spec)] if self.own and spec.kind != "none" else self.all


def _selection(spec: AdapterSpec) -> str:
    return repr((spec.target_modules, spec.layers))


def adapter_sites(model: Any, adapter: Adapter, heads: Sequence[str]) -> list[Site]:
    """Return the checked layers an adapter is attached to; none for the kinds that are attached nowhere."""
    if isinstance(adapter, WholeModel):
        adapter.own_weights(model, heads)  # refuses what cannot be trained
    if adapter.spec.kind == "none" or isinstance(adapter, WholeModel):
        return []
    defaults = default_targets(model.config.model_type) if adapter.spec.target_modules == "auto" else []
    sites = find_sites(model, adapter.spec, defaults, heads)
    adapter.check(sites)
    return sites


def default_targets(model_type: str) -> list[str]:
    """Return the attention projections that LoRA usually adapts in an architecture, or none if unknown."""
    return list(_MORE_TARGETS.get(model_type) or _targets_of_peft().get(model_type, []))


@functools.lru_cache(maxsize=1)
def _targets_of_peft() -> Mapping[str, Sequence[str]]:
    """Return PEFT's own table, read from its file: to import PEFT takes every process seconds, for one dictionary."""
    name, package = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", importlib.util.find_spec("peft")
    if package is not None and package.origin is not None:
        file = Path(package.origin).with_name("utils") / "constants.py"
        for node in ast.parse(file.read_text(encoding="utf-8")).body if file.exists() else ():
            if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == name for target in node.targets):
                with contextlib.suppress(ValueError):  # it is no literal any more
                    return cast("Mapping[str, Sequence[str]]", ast.literal_eval(node.value))
    from peft import utils

    return cast("Mapping[str, Sequence[str]]", getattr(utils, name))


def find_heads(model: Any, missing: Sequence[str]) -> dict[str, bool]:
    """Return the task head's linear layers -> whether they start fresh.

    The head is every linear outside the backbone, plus every one that the checkpoint lacks: a pooler
    that nobody trained must not stay frozen at random values.
    """
    backbone = getattr(model, "base_model_prefix", "")
    absent = {key.rpartition(".")[0] for key in missing if key.endswith(".weight")}
    output = model.get_output_embeddings()
    heads = {}
    for name, module in model.named_modules():
        outside = not name.startswith(backbone + ".") and backbone != ""
        if is_linear(module) and module is not output and (outside or name in absent):
            heads[name] = name in absent
    return heads


def target_names(model: nn.Module, sites: Sequence[Site], heads: Sequence[str]) -> list[str]:
    """Return the sites as PEFT names them: by their endings where those select the same layers, else in full."""
    names = [name for name, module in model.named_modules() if is_linear(module)]
    chosen = {site.name for site in sites}
    if not chosen:  # PEFT refuses an adapter without any target; one with no tensors for it changes nothing there
        return [name for name in names if name not in heads][:1]
    endings = sorted({name.rpartition(".")[2] for name in chosen})
    selected = {name for name in names if name.rpartition(".")[2] in endings}
    return endings if selected == chosen else sorted(chosen)
