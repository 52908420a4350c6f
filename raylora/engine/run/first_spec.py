"""A first spec that runs: a task's data, a base that fits the task, an adapter that fits the base's layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from raylora import registry
from raylora.adapters.base import NeedsBaseWeights, Site, WholeModel
from raylora.data.task import Task
from raylora.engine.model.checkpoint import load_config, load_tokenizer, shell_model
from raylora.engine.model.sites import adapter_sites, default_targets, find_heads
from raylora.errors import BaseError, SpecError
from raylora.spec import BaseSpec, parse_spec
from raylora.spec.starting import Starter, starter_text


@dataclass(frozen=True)
class _Fit:
    """An adapter's section, and what came of it on the base's layers."""

    section: Mapping[str, Any]
    sites: list[Site]
    needs_plain_weights: bool


def first_spec(task: str = "", base: str = "", adapter: str = "") -> str:
    """Return a spec as YAML, checked against the base's configuration and tokenizer; what is not named is chosen.

    Raises:
        UsageError: an unknown name, or parts that do not go together.
    """
    kind = task or "classification"
    module = registry.load("task", kind)
    starter: Starter = module.STARTER
    source = BaseSpec.model_validate({"source": base or starter.base, "quantization": "none"})
    registry.load("adapter", _kind_of(adapter or "lora"))  # an unknown name is said before anything is fetched
    shell = shell_model(source, module.build(module.Spec(**starter.task)))
    starter = _shortened(starter, source, module)
    heads = list(find_heads(shell, []))
    fit = _fit(adapter or "lora", shell, heads)
    if not fit.sites and not heads:
        raise SpecError(f"adapter {adapter} trains the task's head only, and {kind} has none", "use another adapter")
    quantized = getattr(load_config(source), "quantization_config", None) is not None
    lr = getattr(registry.load("adapter", _kind_of(adapter or "lora")), "FIRST_LR", starter.optimization["lr"])
    text = starter_text(
        kind, replace(starter, optimization={**starter.optimization, "lr": lr}), fit.section, base,
        "none" if fit.needs_plain_weights or quantized else "nf4",
        {"adapter.target_modules": f"here: {', '.join(sorted({site.name.rpartition('.')[2] for site in fit.sites}))}"},
    )
    parse_spec(text)
    return text


def _kind_of(adapter: str) -> str:
    alias = registry.alias_of("adapter", adapter)
    return alias.kind if alias is not None else adapter


def _shortened(starter: Starter, source: BaseSpec, module: Any) -> Starter:
    """Return the starter with rows no longer than the base can read. Raises: DataError for another misfit."""
    task: Task = module.build(module.Spec(**starter.task))
    tokenizer = load_tokenizer(source, task)
    length = min(starter.task["max_length"], int(tokenizer.model_max_length))
    starter = replace(starter, task={**starter.task, "max_length": length})
    module.build(module.Spec(**starter.task)).check(tokenizer)
    return starter


def _fit(name: str, shell: nn.Module, heads: list[str]) -> _Fit:
    """Return the first settings of an adapter that its layers can have. Raises: BaseError where none can."""
    refused: list[BaseError] = []
    for section in _sections(name, shell):
        spec = registry.load("adapter", _kind_of(name)).Spec.model_validate(registry.long_form("adapter", section))
        adapter = registry.load("adapter", spec.kind).build(spec)
        try:
            sites = adapter_sites(shell, adapter, heads)
        except BaseError as error:
            refused.append(error)
            continue
        particular = isinstance(adapter, WholeModel | NeedsBaseWeights)
        return _Fit(section, sites, bool(particular and adapter.unsupported_reason(True)))
    raise refused[0]


def _sections(name: str, shell: Any) -> Iterator[dict[str, Any]]:
    """Yield what an adapter may begin with, the usual first."""
    module, alias = registry.load("adapter", _kind_of(name)), registry.alias_of("adapter", name)
    choices = alias.first if alias is not None else getattr(module, "FIRST", ({},))
    targets: tuple[dict[str, str], ...] = ({"target_modules": "auto"}, {"target_modules": "all-linear"})
    if not getattr(module, "HAS_TARGETS", True):
        targets = ({},)
    elif not default_targets(shell.config.model_type):
        targets = targets[1:]
    for target in targets:
        yield from ({"kind": name, **keys, **target} for keys in choices)
