"""A run's members as other programs read them: every kind that is a pair of matrices per layer, as PEFT's LoRA;
whole models as folders of transformers.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylora.adapters.base import HEAD, Adapter, LoraExpandable, PeftNative, Site, WholeModel
from raylora.adapters.export import peft_names, to_peft
from raylora.adapters.side_by_side import adapter_of
from raylora.data.task import Task
from raylora.engine.model.base import Base, load_base
from raylora.engine.model.checkpoint import (
    export_name,
    load_dense,
    load_tokenizer,
    quiet,
    shell_model,
    weights_folder,
)
from raylora.engine.model.machine import compute_device
from raylora.engine.model.quantized_layers import prepared_store
from raylora.engine.model.serialization import check_layout, layout_of, to_bytes
from raylora.engine.model.sites import adapter_sites, find_heads, target_names
from raylora.engine.quantization.prepared_base import weights_sha256
from raylora.engine.run.compressed_members import FILE
from raylora.engine.run.finished_members import member_facts, member_tensors, weights_of
from raylora.engine.run.roster import Roster, read_roster
from raylora.engine.run.speakers import read_speakers
from raylora.engine.training.distillation_loss import task_of
from raylora.engine.training.member_plan import member_adapters, member_plans_of
from raylora.ensemble.weights import MemberWeights
from raylora.errors import RunDirectoryError, StoreError, UsageError, suggest
from raylora.spec import BaseSpec, RunSpec
from raylora.store import commit
from raylora.store.run_store import RunStore
from raylora.store.storage import Storage

FORMATS = ("peft-lora", "checkpoint")
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Exported:
    """One written member, and its weights' size before and after."""

    member: str
    folder: str
    size_bytes: int
    exported_bytes: int


def export_run(
    run: str, form: str = "peft-lora", out: str | None = None, members: Sequence[str] = (),
    allow_missing: bool = False, base_name: str = "",
) -> list[Exported]:
    """Write a run's finished members, one folder each, and return what was written.

    Of a run that selected or weighted its members, each folder has an ``ensemble.json`` with the weights of all who
    speak, and how they are aggregated.

    Args:
        form: ``peft-lora``, adapters that PEFT loads: members that it loads as they are get copied, others are
            written out layer by layer; or ``checkpoint``, whole models that transformers loads.
        out: a folder or fsspec URI, by default ``export`` in the run directory.
        members: names such as ``member-000``; by default all, or those whom the run selected.
        allow_missing: go on without members that are damaged, missing or not finished.
        base_name: what adapters call their base, a hub id or a folder; by default its hub id, or its folder's name.

    Raises:
        StoreError: a member that is wanted is damaged or missing.
        RunDirectoryError: there is no run, no such member, or the member does not belong to the base.
        UsageError: the format is unknown, or members of this kind have no such form.
    """
    if form not in FORMATS:
        raise UsageError(f"--format: unknown format {form!r}", suggest(form, FORMATS))
    store = RunStore(run)
    spec = store.read_spec()
    target = Storage(out or f"{store.uri}/export")
    adapters = {plan.name: plan.adapter for plan in member_plans_of(spec)}
    written = []
    roster = read_roster(store)
    chosen = _chosen(store, roster, members, allow_missing)
    speakers = read_speakers(store, spec, roster.usable if members else chosen)
    for name in chosen if members else speakers.names:
        spec = spec.model_copy(update={"adapter": adapters[name]})
        adapter = adapter_of(spec.adapter)
        files: Mapping[str, bytes] = store.load_result(f"members/{name}")
        exported: Mapping[str, bytes]
        if form == "checkpoint":
            exported = _as_checkpoint(spec, adapter, files)
        else:
            exported = _as_lora(store, spec, adapter, name, files) if not isinstance(adapter, PeftNative) else (
                _whole(files)
            )
            exported = _with_base(exported, spec.base, base_name)
        if speakers.is_fitted:
            exported = {**exported, "ensemble.json": _weights_file(name, spec, speakers.weights)}
        commit.commit(target, name, exported)
        written.append(Exported(name, target.path(name), len(weights_of(files)), _weights_size(exported)))
    return written


def _whole(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Return the folder of a member that PEFT loads; of a compressed one with the weights that come out of it."""
    if FILE not in files:
        return files
    return {**{name: content for name, content in files.items() if name != FILE},
            _WEIGHTS: to_bytes(peft_names(member_tensors(files)))}


def _weights_file(name: str, spec: RunSpec, weights: MemberWeights) -> bytes:
    """Return the file that says what a member weighs among those who speak for the run."""
    weight_of = weights.record()
    facts = {"member": name, "weight": weight_of.get(name, 0.0), "weights": weight_of,
             "aggregate": spec.ensemble.aggregate, "fitted_on": "validation"}
    return json.dumps(facts, indent=1).encode()


def _with_base(files: Mapping[str, bytes], base: BaseSpec, name: str) -> Mapping[str, bytes]:
    """Return an adapter's folder that says which base it belongs to, where no hub id does."""
    if base.folder is None and not name:
        return files
    config = json.loads(files["adapter_config.json"])
    called = name or config["base_model_name_or_path"]
    config["base_model_name_or_path"] = called
    front, _, text = files["README.md"].decode().partition("\n---\n")
    front = re.sub(r"^base_model: .*$", lambda match: f"base_model: {called}", front, flags=re.MULTILINE)
    if base.folder is not None:
        text += (
            f"\nIts base is the model in the folder `{called}`, whose weights have the SHA-256 "
            f"`{weights_sha256(weights_folder(base))}`. PEFT looks for that folder from where it is run, else:\n\n"
            f"```python\nmodel = PeftModel.from_pretrained(AutoModel….from_pretrained(\"/path/to/{called}\"), \".\")\n"
            "```\n"
        )
    return {
        **files, "README.md": f"{front}\n---\n{text}".encode(),
        "adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode(),
    }


def _weights_size(files: Mapping[str, bytes]) -> int:
    return sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))


def _chosen(store: RunStore, roster: Roster, wanted: Sequence[str], allow_missing: bool) -> list[str]:
    """Return the members to write: those that are named, of whom none may be missing, or all of the run."""
    if not wanted:
        return roster.members(allow_missing)
    for name in wanted:
        if name in roster.lost:
            raise StoreError(
                f"{store.uri}: {name} {roster.lost[name]}", f"`raylora repair {store.uri}` trains it again"
            )
        if name not in roster.usable:
            raise RunDirectoryError(f"{store.uri}: has no finished member {name!r}", suggest(name, roster.usable))
    return list(wanted)


def _as_lora(
    store: RunStore, spec: RunSpec, adapter: Adapter, name: str, files: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Return the folder of one member, written out as LoRA."""
    if isinstance(adapter, WholeModel):
        raise UsageError(
            f"members of kind {spec.adapter.kind} have no LoRA form: every weight is their own",
            "use --format checkpoint",
        )
    if not isinstance(adapter, LoraExpandable):
        raise UsageError(f"members of kind {spec.adapter.kind} have no LoRA form")
    task = task_of(spec)
    tensors, facts = member_tensors(files), member_facts(files)
    head = {n: t for n, t in tensors.items() if n.startswith(HEAD)}
    shell = shell_model(spec.base, task)
    # The shell does not know what the checkpoint lacks; the member does: it trained it.
    heads = list(find_heads(shell, [n.removeprefix(HEAD) for n in head]))
    sites = adapter_sites(shell, adapter, heads)
    seeds = {unit.name: unit.stream("fixed") for unit in member_plans_of(spec)}
    frozen_tensors = adapter.frozen_tensors(sites, seeds[name], _weights(store, spec, task))
    check_layout(name, facts.get("layout"), layout_of(_shapes(adapter, sites), frozen_tensors))
    lora, written = adapter.as_lora({**tensors, **frozen_tensors}, sites)
    task_type = "SEQ_CLS" if task.auto_class == "AutoModelForSequenceClassification" else "CAUSAL_LM"
    peft = to_peft(
        {**written, **head}, lora, sites, target_names(shell, sites, heads), task_type, export_name(spec.base)
    )
    readme = (
        f"---\nbase_model: {export_name(spec.base)}\nlibrary_name: peft\ntags: [raylora, {spec.adapter.kind}]\n---\n\n"
        f"# {name}\n\nWritten out from a {spec.adapter.kind} adapter.\n"
    )
    return {_WEIGHTS: to_bytes(peft.tensors), "adapter_config.json": peft.config_bytes(), "README.md": readme.encode()}


def _as_checkpoint(spec: RunSpec, adapter: Adapter, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return a member as ``save_pretrained`` writes a model, with its tokenizer, in float32 as it was trained."""
    if not isinstance(adapter, WholeModel):
        raise UsageError(f"members of kind {spec.adapter.kind} are adapters, not models", "use --format peft-lora")
    task = task_of(spec)
    model = load_dense(spec.base, task, compute_device(0)).float()
    tokenizer = load_tokenizer(spec.base, task)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    parameters = dict(model.named_parameters())
    for name, tensor in member_tensors(files).items():
        parameters[name.removeprefix(HEAD)].data.copy_(tensor)
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def _shapes(adapter: Adapter, sites: Sequence[Site]) -> Mapping[str, Tensor]:
    with torch.device("meta"):
        return adapter.build(sites, torch.Generator("cpu"))


def _weights(store: RunStore, spec: RunSpec, task: Task) -> Callable[[str], Tensor]:
    """Return a reader of the base's weights that loads it when it is first asked; many kinds never ask."""
    loaded: Any = functools.lru_cache(maxsize=1)(
        lambda: load_base(spec.base, member_adapters(spec), task, compute_device(0), prepared_store(store))
    )

    def weight_of(site: str) -> Tensor:
        base: Base = loaded()
        return base.weight_of(site)

    return weight_of
