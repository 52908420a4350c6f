"""Adapters as data: what a member is made of, where it is attached, and the seam every kind fills.

Shapes: K members in a pack, N tokens of one member (batch x time), I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from raylora.errors import BaseError, suggest
from raylora.spec import AdapterSpec

Tensors = dict[str, Tensor]
"""A member: named float32 tensors. Adapter names start with the site, head names with ``head:``."""

WeightOf = Callable[[str], Tensor]
"""A site's name -> its frozen weight, O x I, in float32 (dequantized)."""

HEAD = "head:"


@dataclass(frozen=True)
class Site:
    """One linear layer of the base that carries an adapter."""

    name: str
    in_features: int
    out_features: int
    block: int | None
    """Index of the transformer block it stands in, if any."""
    transposed: bool = False
    """The weight is stored I x O (the Conv1D layers of GPT-2), as PEFT's ``fan_in_fan_out``."""


class Adapter(Protocol):
    """A kind of low-rank change. Stateless: all state is in the tensors."""

    spec: AdapterSpec

    def check(self, sites: Sequence[Site]) -> None:
        """Raise BaseError if the spec does not fit these layers."""

    def build(self, sites: Sequence[Site], generator: torch.Generator) -> Tensors:
        """Return a fresh member's float32 tensors, drawn from the generator only."""

    def frozen_tensors(self, sites: Sequence[Site], seed: int, weight_of: WeightOf) -> Tensors:
        """Return what a member needs but does not train (index draws, frozen factors), or nothing.

        A pure function of the member's seed and the frozen base, so it is never saved: it is made again.
        """

    def decay_group(self, name: str) -> str:
        """Return ``a`` or ``b``: which of the two decays a tensor takes (arXiv 2310.00035, section 3)."""

    def materialize(self, stacked: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Any]:
        """Return per site what ``packed_delta`` needs, once per optimizer step, from all tensors stacked over K."""

    def packed_delta(self, x_KNI: Tensor, at_site: Any) -> Tensor:
        """Return y_KNO, each member's own change of its own inputs."""

    def delta_weight(self, tensors: Mapping[str, Tensor], site: Site) -> Tensor:
        """Return the change as a weight, O x I, in float32, from one member's trained and frozen tensors."""


@runtime_checkable
class PeftNative(Protocol):
    """A kind whose tensors PEFT loads as they are."""

    def peft_config(self) -> dict[str, Any]:
        """Return this kind's part of ``adapter_config.json``: ``peft_type``, ``r``, ``lora_alpha`` and so on."""


@runtime_checkable
class PeftWritten(PeftNative, Protocol):
    """A kind whose tensors PEFT names, and beside which it keeps some that are not trained."""

    def peft_tensors(self, tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> Tensors:
        """Return the content of ``adapter_model.safetensors`` but for the head, from one member's trained tensors."""


@runtime_checkable
class NeedsBaseWeights(Protocol):
    """A kind whose start or change depends on the frozen layer itself, as DoRA's norms do."""

    def from_weights(self, tensors: Tensors, sites: Sequence[Site], weight_of: WeightOf) -> Tensors:
        """Return a fresh member's tensors with those in place that come from the frozen weights."""

    def packed_delta_over(self, linear: nn.Module, base_KNO: Tensor, x_KNI: Tensor, at_site: Any) -> Tensor:
        """Return y_KNO as ``packed_delta`` does, given the frozen layer and what it makes of x."""

    def unsupported_reason(self, quantized: bool) -> str:
        """Return why it cannot be put over weights that are quantized or not, or nothing if it can."""


@runtime_checkable
class WholeModel(Protocol):
    """A kind without sites, whose members are the model's own weights instead of a change to them."""

    def own_weights(self, model: nn.Module, heads: Collection[str]) -> dict[str, nn.Parameter]:
        """Return the parameters that a member starts from and replaces, by name; tied ones once. Raises: BaseError."""

    def unsupported_reason(self, quantized: bool) -> str:
        """Return why weights that are quantized or not cannot be trained, or nothing if they can."""


@runtime_checkable
class Unpackable(Protocol):
    """A kind whose members train one at a time instead of sharing a forward."""

    def unpackable_reason(self) -> str:
        """Return the reason that a plan gives."""


@runtime_checkable
class TwoFactors(Protocol):
    """A kind whose decay groups are the two factors of a product, B zero at first: LoRA+ can give each its own rate."""

    two_factors: Literal[True]


@runtime_checkable
class PartlyTrained(Protocol):
    """A kind that may train a part of a member's tensors: the rest is saved with it, and has no gradient or moments."""

    keeps_inputs: bool
    """Whether gradients need what the adapted layers were given."""

    def parted(self, tensors: Mapping[str, Tensor], round: int = 0) -> tuple[Tensors, Tensors]:
        """Return what is trained of a member without its head, and what is kept; ``materialize`` takes both.

        Args:
            round: the number, from 0, of the round that training is in, for kinds that train in rounds.
        """

    def joined(self, trained: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensors:
        """Return the member that was parted so."""


@runtime_checkable
class InRounds(PartlyTrained, Protocol):
    """A kind that trains in rounds, equal parts of the steps, each with a part of the member and moments of its own."""

    rounds: int

    def begin_round(
        self, tensors: Mapping[str, Tensor], sites: Sequence[Site], round: int, generator: torch.Generator
    ) -> Tensors:
        """Return a member without its head as a later round finds it, from what the round before made of it."""


@runtime_checkable
class LoraExpandable(Protocol):
    """A kind that PEFT does not know, whose change can be written out as a pair of matrices per layer."""

    def as_lora(self, tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> tuple[AdapterSpec, Tensors]:
        """Return a LoRA spec and tensors with the same change, from one member's trained and frozen tensors."""


@runtime_checkable
class Noted(Protocol):
    """A kind that does something to these layers that a person should know before training."""

    def notes(self, sites: Sequence[Site]) -> list[str]:
        """Return one line per finding."""


def find_sites(model: Any, spec: AdapterSpec, defaults: Sequence[str], heads: Sequence[str]) -> list[Site]:
    """Return the layers that a spec's ``target_modules`` and ``layers`` select, in the model's order.

    Args:
        defaults: what ``auto`` means for this architecture.
        heads: names of the task head's linears, which are trained whole and never adapted.

    Raises:
        BaseError: a target that matches nothing, more layers than the model has, or a layer that the model uses
            under two names.
    """
    linears = {n: m for n, m in model.named_modules() if is_linear(m) and n not in heads}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inner = {n: m for n, m in linears.items() if m is not output}
    if spec.target_modules == "all-linear":
        chosen = list(inner)
    else:
        targets = list(defaults) if spec.target_modules == "auto" else spec.target_modules
        targets = [targets] if isinstance(targets, str) else list(targets)
        chosen = _match(targets, linears)
    sites = [site_of(name, linears[name]) for name in linears if name in set(chosen)]
    _refuse_shared(model, {site.name: linears[site.name] for site in sites})
    return _select_blocks(sites, spec.layers, [_block(n) for n in inner])


def is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies by one weight: torch's, bitsandbytes' or GPT-2's linear layer."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _match(targets: Sequence[str], linears: Mapping[str, nn.Module]) -> list[str]:
    kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
    endings = {".".join(name.split(".")[-n:]) for name in linears for n in (1, 2, 3)}
    chosen: list[str] = []
    for target in targets:
        found = [n for n in linears if n == target or n.endswith("." + target)]
        if not found:
            hint = suggest(target, endings) if target else ""
            raise BaseError(
                f"adapter.target_modules: {target!r} matches no linear layer of this model",
                f"its linear layers are called: {', '.join(kinds)}" + (f"; {hint}" if "did you" in hint else ""),
            )
        chosen += found
    if not chosen:
        raise BaseError(
            "adapter.target_modules: no default is known for this architecture",
            f"name some of its linear layers: {', '.join(kinds)}, or use 'all-linear'",
        )
    return chosen


def _refuse_shared(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """An adapter is attached to one name; under its other names a shared module would run without it."""
    names = {id(module): name for name, module in chosen.items()}
    for other, module in model.named_modules(remove_duplicate=False):
        first = names.get(id(module), other)
        if first != other:
            raise BaseError(
                f"adapter.target_modules: {first} and {other} are one and the same layer of this model",
                "leave it out: name the other layers in target_modules",
            )


def site_of(name: str, module: nn.Module) -> Site:
    """Return what an adapter needs to know of a linear layer."""
    if isinstance(module, nn.Linear):
        return Site(name, module.in_features, module.out_features, _block(name))
    in_features, out_features = cast(Tensor, module.weight).shape
    return Site(name, int(in_features), int(out_features), _block(name), transposed=True)


def _block(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _select_blocks(sites: list[Site], layers: str | Mapping[str, int], blocks: Sequence[int | None]) -> list[Site]:
    if layers == "all":
        return sites
    if not isinstance(layers, Mapping) or set(layers) != {"last"} or layers["last"] < 1:
        raise BaseError(f"adapter.layers: {layers!r} is neither 'all' nor {{last: k}} with k >= 1")
    depth = 1 + max((b for b in blocks if b is not None), default=-1)
    last = layers["last"]
    if last > depth:
        raise BaseError(f"adapter.layers: last {last} of only {depth} blocks", f"use at most {depth}, or 'all'")
    return [s for s in sites if s.block is not None and s.block >= depth - last]
