"""Any of several PEFT methods as a member: PEFT's own layers compute, raylora trains, stores and evaluates.

At an adapted layer with the frozen weight W the change is what PEFT's layer adds to the layer it wraps,

    delta(x) = layer_theta(x) - (W x + b)

so that everything raylora does to a change (seeded dropout of x, switching it off for a reference, several
members in one forward) holds for every method. The layer's own call of W is answered with what is known of W x.

Methods that PEFT starts from a decomposition of W, and that therefore keep W - s B0 A0 instead of W (PiSSA,
arXiv 2404.02948; OLoRA, arXiv 2406.01775), leave the shared base alone here: s B0 A0 x is subtracted instead,
which is the same function. Their members start alike and differ by their heads, data order and dropout.

Shapes: K members, N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from raylora.adapters.base import Site, Tensors, WeightOf
from raylora.adapters.low_rank import check_rank
from raylora.adapters.peft_layers import Answered, Injected, inject, settings
from raylora.errors import BaseError, suggest
from raylora.spec import AdapterSpec

OPTIONS: dict[str, tuple[str, ...]] = {
    "LORA": ("r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern"),
    "VERA": ("r", "projection_prng_key", "d_initial"),
    "VBLORA": ("r", "num_vectors", "vector_length", "topk", "init_vector_bank_bound", "init_logits_std"),
    "RANDLORA": ("r", "randlora_alpha", "projection_prng_key", "sparse", "very_sparse"),
    "LOHA": ("r", "alpha", "rank_pattern", "alpha_pattern"),
    "LOKR": ("r", "alpha", "decompose_both", "decompose_factor", "rank_pattern", "alpha_pattern"),
    "HIRA": ("r",),
    "MISS": ("r",),
    "GRALORA": ("r", "alpha", "gralora_k", "hybrid_r"),
    "FOURIERFT": ("n_frequency", "scaling", "random_loc_seed"),
    "IA3": ("feedforward_modules",),
    "OFT": ("r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
    "HRA": ("r", "apply_GS"),
    "ROAD": ("variant", "group_size"),
}
"""The methods that are known to work, and which of PEFT's settings a spec may give; raylora sets the others."""
_ALWAYS: dict[str, dict[str, Any]] = {"RANDLORA": {"save_projection": False}, "IA3": {"feedforward_modules": []}}
"""PEFT would write RandLoRA's projections once for every layer; it makes them again from their key. IA3 scales
outputs, and inputs only where a spec names feedforward modules."""
_READS_PLAIN_WEIGHTS = ("LOHA", "LOKR", "HIRA", "HRA")
_OVER_THE_WEIGHT = ("HIRA", "IA3", "OFT", "HRA", "ROAD")
_DECOMPOSED = ("pissa", "olora")
_STARTS = (True, "gaussian", "orthogonal", *_DECOMPOSED)
_FIRST_FACTORS = (
    "lora_A", "vblora_logits_A", "vera_lambda_d", "randlora_lambda", "hada_w1_a", "hada_w1_b", "lokr_w1", "lokr_w1_a",
    "lokr_w1_b", "hira_A", "gralora_A",
)


class Spec(AdapterSpec):
    """A PEFT method and its settings, under PEFT's own names."""

    kind: Literal["peft"] = "peft"
    method: str = "LORA"
    """PEFT's name of the method, in capitals."""
    options: dict[str, Any] = {}
    """The method's settings, under PEFT's own names; PEFT's defaults for the rest."""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def variant(self) -> str:
        """Return the method; of LoRA, what its options make of it."""
        start = self.options.get("init_lora_weights")
        if self.options.get("use_dora"):
            return "DORA"
        if start in _DECOMPOSED:
            return str(start).upper()
        return "RSLORA" if self.options.get("use_rslora") else self.method

    @model_validator(mode="after")
    def _known(self) -> Spec:
        if self.method not in OPTIONS:
            raise ValueError(f"method {self.method!r} is not one that members may use; "
                             + suggest(self.method, OPTIONS))
        for key in self.options:
            if key.endswith("dropout"):
                raise ValueError(f"options.{key}: use adapter.dropout, which is seeded per member")
            if key not in OPTIONS[self.method]:
                raise ValueError(f"options.{key} is not a setting of {self.method} that a member may have; "
                                 + suggest(key, OPTIONS[self.method]))
        start = self.options.get("init_lora_weights", True)
        if start not in _STARTS:
            names = ", ".join(map(repr, _STARTS))
            raise ValueError(f"options.init_lora_weights: {start!r} needs calibration data, is not the same twice "
                             f"or changes the quantized base that all members share; use one of {names}")
        if self.options.get("use_dora") and start not in (True, "gaussian"):
            raise ValueError(f"options.use_dora: does not go with init_lora_weights {start!r}; leave one out")
        return self


FIRST: tuple[dict[str, Any], ...] = ({"method": "LORA", "options": {"r": 8, "lora_alpha": 16}},)
"""What a first spec begins with; where the layers cannot have it, the next."""


@dataclass(frozen=True)
class _AtSite:
    """What one adapted layer reads during a forward."""

    layer: nn.Module
    members: list[Tensors]
    """Per member, by the layer's own names."""
    start: tuple[Tensor, Tensor] | None
    """(A0_KRI, s B0_KOR) of a decomposed start."""


class Peft:
    """A PEFT method. Member tensors carry PEFT's names without its prefix: ``<site>.vera_lambda_b``."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.decomposed = spec.options.get("init_lora_weights") in _DECOMPOSED
        self._injected: dict[tuple[Site, ...], Injected] = {}

    def check(self, sites: Sequence[Site]) -> None:
        """Raise BaseError if the rank is too large for a low-rank method, or PEFT refuses the layers."""
        if self.spec.method == "LORA":
            check_rank("options.r", int(self.spec.options.get("r", 8)), sites)
        self._layers(sites)

    def build(self, sites: Sequence[Site], generator: torch.Generator) -> Tensors:
        """Return what PEFT starts a member with, drawn from one number of the generator."""
        seed = int(torch.randint(2**62, (1,), generator=generator, device="cpu"))
        return inject(self.spec.method, self._plain_start(), sites, seed).trained

    def from_weights(self, tensors: Tensors, sites: Sequence[Site], weight_of: WeightOf) -> Tensors:
        """Return a fresh member's tensors with those in place that PEFT computes from the frozen weights."""
        if not (self.decomposed or self.spec.options.get("use_dora")):
            return tensors
        wanted = ".lora_" if self.decomposed else ".lora_magnitude_vector"
        found = dict(tensors)
        for site in sites:  # one at a time: all weights in float32 would not fit
            start = inject(self.spec.method, self.spec.options, [site], 0, {site.name: weight_of(site.name)}).trained
            found |= {name: tensor for name, tensor in start.items() if wanted in name}
        return found

    def frozen_tensors(self, sites: Sequence[Site], seed: int, weight_of: WeightOf) -> Tensors:
        """Return PEFT's frozen projections, and the factors of a decomposed start; every member has the same."""
        frozen_tensors = dict(self._layers(sites).frozen)
        for site in sites if self.decomposed else ():
            weight_OI = weight_of(site.name)
            one = inject(self.spec.method, self.spec.options, [site], 0, {site.name: weight_OI})
            a_RI, b_OR = (one.trained[f"{site.name}.lora_{key}"] for key in "AB")
            scale = float(one.layers[site.name].scaling["default"])  # type: ignore[index]
            frozen_tensors |= {f"{site.name}.start_A": a_RI, f"{site.name}.start_B": scale * b_OR}
        return frozen_tensors

    def decay_group(self, name: str) -> str:
        """Return ``a`` for what meets the input first, ``b`` for everything else."""
        return "a" if name.rpartition(".")[2] in _FIRST_FACTORS else "b"

    def materialize(self, stacked: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, _AtSite]:
        """Return per site PEFT's layer and each member's tensors for it."""
        injected = self._layers(sites)
        at_site = {}
        for site in sites:
            own = injected.locals[site.name]
            members = len(next(iter(stacked.values())))
            start = (stacked[f"{site.name}.start_A"], stacked[f"{site.name}.start_B"]) if self.decomposed else None
            tensors = [{local: stacked[name][k] for local, name in own.items()} for k in range(members)]
            at_site[site.name] = _AtSite(injected.layers[site.name], tensors, start)
        return at_site

    def packed_delta(self, x_KNI: Tensor, at_site: _AtSite) -> Tensor:
        """Return the change on a frozen layer of zeros, which is the change of every additive method."""
        layer: Any = at_site.layer
        base_KNO = x_KNI.new_zeros(*x_KNI.shape[:2], layer.out_features)
        return self.packed_delta_over(layer.base_layer, base_KNO, x_KNI, at_site)

    def packed_delta_over(self, linear: nn.Module, base_KNO: Tensor, x_KNI: Tensor, at_site: _AtSite) -> Tensor:
        """Return layer(x) - linear(x) per member, in x's type, less the decomposed start."""
        layer: Any = at_site.layer
        stand_in = layer.base_layer
        parts = []
        for k, own in enumerate(at_site.members):
            x_NI = x_KNI[k]
            layer.base_layer = Answered(linear, x_NI, base_KNO[k])
            parts.append(functional_call(layer, own, (x_NI,)))
        layer.base_layer = stand_in
        delta_KNO = (torch.stack(parts) - base_KNO).to(x_KNI.dtype)
        if at_site.start is None:
            return delta_KNO
        a_KRI, b_KOR = (t.to(x_KNI.dtype) for t in at_site.start)
        return delta_KNO - x_KNI @ a_KRI.transpose(1, 2) @ b_KOR.transpose(1, 2)

    def delta_weight(self, tensors: Mapping[str, Tensor], site: Site) -> Tensor:
        """Return the change as a weight, O x I.

        Raises:
            BaseError: for a method whose change depends on the frozen weight.
        """
        if self.spec.options.get("use_dora") or self.spec.method in _OVER_THE_WEIGHT:
            name = "DoRA" if self.spec.method == "LORA" else self.spec.method
            raise BaseError(f"adapter: the change of {name} is no weight of its own: it depends on the frozen one")
        sites = next(sites for sites in self._injected if site in sites) if self._injected else (site,)
        stacked = {name: tensor.float()[None] for name, tensor in tensors.items()}
        eye_II = torch.eye(site.in_features, device=next(iter(stacked.values())).device)
        return self.packed_delta(eye_II[None], self.materialize(stacked, sites)[site.name])[0].T

    # --- what the engine asks of kinds that are not like the others ---------------------------------
    def notes(self, sites: Sequence[Site]) -> list[str]:
        """Return what a person should know before training."""
        if not self.decomposed:
            return []
        start = self.spec.options["init_lora_weights"]
        return [f"members start alike from {start}: they differ by their heads, data order and dropout"]

    def unpackable_reason(self) -> str:
        """Return why a pack holds one member of this kind."""
        return f"one member per forward: PEFT's {self.spec.method} layers hold one member at a time"

    def unsupported_reason(self, quantized: bool) -> str:
        """Return why PEFT cannot work over such weights, or nothing if it can."""
        if self.decomposed and quantized:
            start = self.spec.options["init_lora_weights"]
            return f"PEFT loads what started from {start} only onto weights that it can decompose and replace"
        if self.spec.method in _READS_PLAIN_WEIGHTS and quantized:
            return f"PEFT's {self.spec.method} reads the weight itself and takes its packed codes for numbers"
        return ""

    def peft_config(self) -> dict[str, Any]:
        """Return PEFT's own configuration, without what is said of the run."""
        config = settings(self.spec.method, _ALWAYS.get(self.spec.method, {}) | self.spec.options)
        key = f"{self.spec.method.lower()}_dropout"
        return config | ({key: self.spec.dropout} if key in config else {})

    def peft_tensors(self, tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> Tensors:
        """Return a member's adapter tensors and PEFT's frozen ones under the names of PEFT's file."""
        injected = self._layers(sites)
        whole = {**injected.frozen, **tensors}
        return {file: whole[name] for name, file in injected.files.items()}

    def _plain_start(self) -> dict[str, Any]:
        """Return the options with a start that needs no weights; what comes from them is put in afterwards."""
        plain = {"init_lora_weights": True} if self.decomposed else {}
        return _ALWAYS.get(self.spec.method, {}) | self.spec.options | plain

    def _layers(self, sites: Sequence[Site]) -> Injected:
        """Return PEFT's layers for these sites, made once and emptied: every call brings its own tensors."""
        key = tuple(sites)
        if key not in self._injected:
            made = inject(self.spec.method, self._plain_start(), sites, 0)
            for layer in made.layers.values():
                layer.to("meta")
            self._injected[key] = replace(made, trained={})
        return self._injected[key]


def build(spec: Spec) -> Peft:
    """Return the adapter for a spec."""
    return Peft(spec)
