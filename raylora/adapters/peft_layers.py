"""PEFT's own layers without a model: a tree of stand-ins into which PEFT injects a method, and what came of it.

The stand-ins have the shapes and the paths of the adapted layers but no weights, so the base is never touched
and nothing has to be restored. PEFT initializes, names and computes; raylora holds the numbers.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raylora.adapters.base import Site, Tensors
from raylora.errors import BaseError

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Injected:
    """What PEFT made for some sites: its layers and how it calls their tensors."""

    layers: dict[str, nn.Module]
    """Per site PEFT's layer around a stand-in."""
    locals: dict[str, dict[str, str]]
    """Per site the layer's own name of a tensor -> the member's name of it; shared ones occur at every site."""
    trained: Tensors
    """What a member starts with, by the member's names."""
    frozen: Tensors
    """Projections that PEFT draws from its own key and does not train."""
    files: dict[str, str]
    """A member's name of a tensor -> its name in PEFT's file."""


class Answered(nn.Module):
    """A frozen layer whose output for one input is known: PEFT's layer calls it, and may look at its weight."""

    def __init__(self, linear: nn.Module, x_NI: Tensor, base_NO: Tensor) -> None:
        super().__init__()
        self.answer = (linear, x_NI, base_NO)  # in a tuple, so that the frozen layer is not registered below PEFT's

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":  # PEFT puts a weight back that it has read; the base is never written to
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["answer"][0], name)

    def forward(self, x_NI: Tensor) -> Tensor:
        """Return what the frozen layer makes of x."""
        linear, known_NI, base_NO = self.answer
        return base_NO.clone() if x_NI is known_NI else linear(x_NI)  # some methods add to it in place


def inject(
    method: str, options: Mapping[str, Any], sites: Sequence[Site], seed: int,
    weights: Mapping[str, Tensor] | None = None,
) -> Injected:
    """Let PEFT build a method for the sites, drawing from the seed alone.

    Args:
        weights: site -> O x I, for initializations that look at the frozen weight; else it is taken as zero.

    Raises:
        BaseError: PEFT refuses; its own words are in the message.
    """
    import peft

    fields = {"target_modules": [site.name for site in sites], **options}
    if any(site.transposed for site in sites):
        fields["fan_in_fan_out"] = True
    # Whoever counts parameters does so on the meta device; PEFT's frozen projections are drawn on the CPU.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            model = peft.get_peft_model(_tree(sites, weights or {}), _config_class(method)(**fields))
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise BaseError(f"adapter: PEFT refuses {method} with these options: {error}") from error
        saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return _read(model, sites, saved)


def settings(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's whole configuration of a method, as PEFT writes it to a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = _config_class(method)(**options)
    fields = {}
    for key, value in config.to_dict().items():
        value = sorted(value) if isinstance(value, set) else value
        fields[key] = getattr(value, "value", value)
    return fields


def _read(model: Any, sites: Sequence[Site], saved: Mapping[str, Tensor]) -> Injected:
    """Return PEFT's layers and tensors; a tensor is known by its memory, which the saved views share."""
    names = {tensor.data_ptr(): name for name, tensor in saved.items()}
    trained: Tensors = {}
    frozen: Tensors = {}
    files: dict[str, str] = {}
    layers: dict[str, nn.Module] = {}
    inner: dict[str, dict[str, str]] = {}
    for site in sites:
        layer = model.base_model.model.get_submodule(site.name)
        layers[site.name], inner[site.name] = layer, {}
        own = [(n, t, True) for n, t in layer.named_parameters()] + [(n, t, False) for n, t in layer.named_buffers()]
        for local, tensor, is_parameter in own:
            if local.startswith("base_layer."):
                continue
            # What PEFT does not save it makes again from its key, under the name that the layers know it by.
            file = names.get(tensor.data_ptr(), local.removesuffix(".default"))
            name = file.removeprefix(_PREFIX).removesuffix(".weight")
            inner[site.name][local] = name
            if tensor.data_ptr() in names:
                files[name] = file
            (trained if is_parameter else frozen)[name] = tensor.detach().clone()
            if is_parameter and not tensor.requires_grad:
                raise BaseError(f"adapter: PEFT does not train {name} with these options", "choose other options")
    return Injected(layers, inner, trained, frozen, files)


def _tree(sites: Sequence[Site], weights: Mapping[str, Tensor]) -> nn.Module:
    """Return nested modules with one linear layer at every site's path."""
    root = nn.Module()
    root.config = {"model_type": "custom"}  # type: ignore[assignment]  # PEFT looks for one
    for site in sites:
        *parents, last = site.name.split(".")
        node = root
        for part in parents:
            if not hasattr(node, part):
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.add_module(last, _stand_in(site, weights.get(site.name)))
    return root


def _stand_in(site: Site, weight_OI: Tensor | None) -> nn.Module:
    """Return a linear layer of the site's shape; without a weight it is one zero, expanded: no memory."""
    from transformers.pytorch_utils import Conv1D

    weight = torch.zeros((), device="cpu").expand(site.out_features, site.in_features)
    if weight_OI is not None:
        weight = weight_OI.detach().float().cpu().clone()
    layer: nn.Module
    if site.transposed:
        layer, weight = Conv1D(1, 1), weight.T
        layer.nf, layer.nx = site.out_features, site.in_features
        layer.bias = nn.Parameter(torch.zeros(site.out_features, device="cpu"), requires_grad=False)
    else:
        layer = nn.Linear(1, 1, bias=False, device="meta")
        layer.in_features, layer.out_features = site.in_features, site.out_features
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _config_class(method: str) -> Any:
    import peft

    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
