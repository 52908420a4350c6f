"""What a run needs of machines: the shape of its base, of a member's work, and what may be shared or split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from raylora import registry
from raylora.adapters.base import Adapter, NeedsBaseWeights, PartlyTrained, Site, WholeModel, is_linear, site_of
from raylora.adapters.side_by_side import adapter_of
from raylora.data.answered import prompt_length
from raylora.data.sets import DataSets
from raylora.data.task import Task
from raylora.distill import AsksTeacher
from raylora.engine.model.blocks import find_blocks
from raylora.engine.model.checkpoint import quantizer_of, shell_model
from raylora.engine.model.machine import compute_dtype
from raylora.engine.model.parameter_count import adapter_parameters, kept_parameters
from raylora.engine.model.sites import AdaptedLayers, find_heads
from raylora.engine.run.answer_demand import answers_after, answers_within, caches_of
from raylora.engine.training.distillation_loss import loss_of, task_of
from raylora.engine.training.member_plan import MemberPlan, member_adapters, packable_groups, unpackable_reason
from raylora.engine.training.row_packing import packing_of
from raylora.ensemble.outputs import output_of
from raylora.errors import BaseError
from raylora.placement.estimate import (
    ADAPTER_BYTES,
    MOST_PARTS,
    MemberShape,
    ModelShape,
    asked_bytes,
    logit_chunk,
    output_part_rows,
)
from raylora.placement.inventory import Inventory
from raylora.placement.plan import Demand
from raylora.spec import AdapterSpec, RunSpec
from raylora.store.run_store import RunStore


@dataclass(frozen=True)
class Shell:
    """A model without weights, and what members have in it."""

    model: Any
    adapter: Adapter
    layers: AdaptedLayers
    heads: Sequence[str]
    member_parameters: int
    """What is trained of the largest member."""
    kept_parameters: int = 0
    """What is kept beside it and is not trained, of the member that keeps most."""

    @property
    def sites(self) -> Sequence[Site]:
        """What any member adapts."""
        return self.layers.all.sites


def shell_of(spec: RunSpec, task: Task) -> Shell:
    """Return the base of a spec without weights, and its members' places in it. Raises: BaseError."""
    model = shell_model(spec.base, task)
    heads = list(find_heads(model, []))
    adapter = adapter_of(spec.adapter)
    own = member_adapters(spec)
    _check_side_by_side([spec.adapter, *(one for one in own if one != spec.adapter)])
    layers = AdaptedLayers.find(model, own, heads)
    at = [(adapter_of(one), layers.of(one).sites) for one in own]
    parameters = max(adapter_parameters(one, sites, model, heads) for one, sites in at) + sum(
        p.numel() for name in heads for p in model.get_submodule(name).parameters()
    )
    kept = max(kept_parameters(one, sites) for one, sites in at)
    return Shell(model, adapter, layers, heads, parameters, kept)


def _check_side_by_side(adapters: Sequence[AdapterSpec]) -> None:
    """Refuse adapters of one run's members that share no forward with each other. Raises: BaseError."""
    for spec in adapters if len(adapters) > 1 else ():
        if isinstance(adapter_of(spec), WholeModel) or spec.kind == "none":
            raise BaseError(f"ensemble.vary: members of adapter.kind {spec.kind} have no place beside others",
                            "give them a run of their own")


def demand_of(
    spec: RunSpec, shell: Shell, batch: MemberShape, units: Sequence[MemberPlan], inventory: Inventory
) -> Demand:
    """Return what these units need on such machines; ``batch`` says how much text they see at once."""
    on_gpu = inventory.gpus > 0 and spec.placement.gpus_per_worker != 0
    beside_bytes, asked = _teacher_bytes(spec, batch.time, on_gpu)
    writes = batch.answers is not None or batch.own_answers
    model = replace(
        _model_shape(spec, shell, on_gpu), beside_bytes=beside_bytes,
        caches=caches_of(shell.model.config) if writes else (),
    )
    member = replace(
        batch, parameters=shell.member_parameters, kept_parameters=shell.kept_parameters,
        input_widths=_input_widths(spec, shell.sites, model),
        logit_chunk=_logit_chunk(spec, shell, model.vocabulary, on_gpu), asked_bytes=asked,
    )
    return Demand(
        groups_of(spec, units), model, member, unpackable_reason(units[0]), _unsplittable_reason(spec, shell),
        places=spec.ensemble.places,
    )


def _teacher_bytes(spec: RunSpec, time: int, on_gpu: bool) -> tuple[int, int]:
    """Return what a teacher that is asked takes in every process, and for every token; nothing where none is.

    Before the teacher's run has begun, nothing is known of it.
    """
    run = RunStore(RunStore.for_spec(spec).uri.rpartition("/")[0])
    if spec.distill_from is None or spec.distill_from.members is None or not run.is_begun():
        return 0, 0
    teacher, members = run.read_spec(), len(spec.distill_from.members)
    shell = shell_of(teacher, task_of(teacher))
    shape = _model_shape(teacher, shell, on_gpu)
    base = 0 if teacher.base == spec.base else shape.block_bytes + shape.embedding_bytes + shape.workspace_bytes
    size = shell.member_parameters + shell.kept_parameters
    return base + ADAPTER_BYTES * members * size, asked_bytes(shape, members, time, on_gpu)


def groups_of(spec: RunSpec, units: Sequence[MemberPlan]) -> tuple[tuple[str, ...], ...]:
    """Return the units that may share a forward, group by group."""
    brackets = spec.ensemble.pruning.brackets if spec.ensemble.pruning is not None else 1
    return tuple(tuple(group) for group in packable_groups(units, brackets))


def batch_of(spec: RunSpec, sets: DataSets) -> MemberShape:
    """Return how much text a member sees at once: the longest rows that there are, cut as the task cuts them.

    Of packed rows it is the most that a micro-batch of a first epoch has.
    """
    examples = sets.train.examples
    time = min(spec.task.max_length, max(len(s) for e in examples for s in e.sequences))
    rows = spec.optimization.micro_batch * max(len(e.sequences) for e in examples)
    packing = packing_of(spec, examples)
    loss = loss_of(spec)
    if isinstance(loss, AsksTeacher) and loss.writing.share:  # nobody knows yet how long the student's answers are
        longest = max(map(prompt_length, examples)) + loss.writing.max_new_tokens
        packing, time = None, min(spec.task.max_length, max(time, longest))
    evaluated = max((len(loaded.examples) for loaded in sets.all() if loaded is not sets.train), default=0)
    read = min(spec.evaluation.batch, spec.ensemble.members * evaluated)
    has_token_logits = bool(examples[0].spans or examples[0].target_ranges)
    return MemberShape(
        rows=rows if packing is None else packing.most_sequences, time=time if packing is None else packing.longest,
        has_token_logits=has_token_logits, evaluated_tokens=read * time,
        recomputed=spec.placement.recompute, answers=answers_after(spec, sets), own_answers=answers_within(spec, sets),
    )


def assumed_batch(spec: RunSpec, task: Task) -> MemberShape:
    """Return how much text a member sees at once where there is no data to look at: rows as long as may be."""
    time = spec.task.max_length
    return MemberShape(
        rows=spec.optimization.micro_batch, time=time, has_token_logits=task.output == "tokens",
        evaluated_tokens=spec.evaluation.batch * time, recomputed=spec.placement.recompute,
        answers=answers_after(spec, None), own_answers=answers_within(spec, None),
    )


def _model_shape(spec: RunSpec, shell: Shell, on_gpu: bool) -> ModelShape:
    """Return the base's shape, from a model whose tensors are nowhere."""
    model, config = shell.model, getattr(shell.model.config, "text_config", shell.model.config)
    number_bytes = _compute_bytes(spec, on_gpu)
    try:
        blocks = [block.module for block in find_blocks(model)]
    except BaseError:  # no chain of blocks: all of it is one
        blocks = [model]
    quantizer, left = quantizer_of(spec.base), {*shell.heads, "lm_head"}
    linears = [(site_of(n, m), m) for n, m in model.named_modules() if is_linear(m) and n not in left]
    stored = {
        id(m): s.in_features * s.out_features
        * quantizer.bits_per_weight((s.out_features, s.in_features), 8 * number_bytes) / 8
        for s, m in linears
    }
    inside = {id(m) for block in blocks for m in block.modules()}
    block_numel = sum(p.numel() for block in blocks for p in block.parameters())
    dense = {id(m): s.in_features * s.out_features for s, m in linears}
    block_bytes: float = number_bytes * (block_numel - sum(dense[i] for i in dense if i in inside))
    block_bytes += sum(size for i, size in stored.items() if i in inside)
    beside_bytes = number_bytes * (
        sum(p.numel() for p in model.parameters()) - block_numel - sum(dense[i] for i in dense if i not in inside)
    ) + sum(size for i, size in stored.items() if i not in inside)
    of_blocks = {id(p) for block in blocks for p in block.parameters()}
    beside = [(m, p) for m in model.modules() for p in m.parameters(recurse=False) if id(p) not in of_blocks]
    shared = {id(p) for m, p in beside if type(m) is not nn.Embedding}
    tables = {
        id(p): p.numel() if type(m) is not nn.Embedding or id(p) in shared else math.ceil(p.numel() / MOST_PARTS)
        for m, p in beside
    }
    is_quantized = spec.base.quantization.kind != "none"
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    output = None if head is None or output_obstacle(spec, shell) else head.weight
    intermediate, is_gated = _feed_forward(blocks[0], int(config.hidden_size))
    return ModelShape(
        block_bytes=int(block_bytes),
        embedding_bytes=int(beside_bytes),
        largest_table_bytes=number_bytes * max(tables.values(), default=0),
        largest_beside_output_bytes=number_bytes * max((n for i, n in tables.items() if i != id(output)), default=0),
        output_part_bytes=0 if output is None else number_bytes * output.shape[1] * output_part_rows(
            len(output), number_bytes * output.shape[1], int(block_bytes) // len(blocks)
        ),
        output_bytes=0 if output is None else number_bytes * output.numel(),
        output_in_parts=output is not None and spec.placement.output_layer == "parts",
        workspace_bytes=(4 + number_bytes) * max(dense.values(), default=0) if is_quantized else 0,
        layers=len(blocks),
        hidden=int(config.hidden_size),
        heads=int(config.num_attention_heads),
        intermediate=intermediate,
        vocabulary=int(config.vocab_size),
        block_parameters=block_numel,
        head_parameters=0 if head is None else sum(p.numel() for p in head.parameters()),
        compute_bytes=number_bytes,
        is_gated=is_gated,
        keeps_inputs=spec.base.quantization.kind == "int8",
    )


def _logit_chunk(spec: RunSpec, shell: Shell, vocabulary: int, on_gpu: bool) -> int:
    """Return how many tokens' logits exist at once; 0 for all, unless tokens are scored with the base's own head."""
    return 0 if output_obstacle(spec, shell) else logit_chunk(vocabulary, on_gpu)


def output_obstacle(spec: RunSpec, shell: Shell) -> str:
    """Return why the output layer is not passed with some positions, or in parts, by itself; nothing if it is."""
    task = registry.load("task", spec.task.kind).build(spec.task)
    if not output_of(task.output).per_token:
        return f"task.kind {spec.task.kind} is not scored token by token"
    if isinstance(shell.adapter, WholeModel):
        return f"members of adapter.kind {spec.adapter.kind} have output layers of their own"
    head = shell.model.get_output_embeddings()
    is_adapted = any(shell.model.get_submodule(site.name) is head for site in shell.sites)
    return "adapter.target_modules adapts the output layer" if is_adapted else ""


def _compute_bytes(spec: RunSpec, on_gpu: bool) -> int:
    if on_gpu:
        return 4 if spec.base.dtype == "float32" else 2
    return compute_dtype(spec.base.dtype, torch.device("cpu")).itemsize


def _feed_forward(block: nn.Module, hidden: int) -> tuple[int, bool]:
    """Return the width between a block's last two layers, and whether two layers lead there, one as a gate."""
    sizes = [site_of(name, m) for name, m in block.named_modules() if is_linear(m)]
    width = max((s.in_features for s in sizes if s.out_features == hidden), default=hidden)
    return width, sum(s.in_features == hidden and s.out_features == width for s in sizes) > 1 and width != hidden


def _input_widths(spec: RunSpec, sites: Sequence[Site], model: ModelShape) -> int:
    """Return the widths of what the adapters keep of their inputs; neighbors read the same tensor."""
    own = member_adapters(spec)
    is_kept = any(_keeps_inputs(one) for one in own)
    if any(one.dropout for one in own):  # each drops other numbers: a mask, and a copy where it is kept
        return (1 + is_kept) * sum(site.in_features for site in sites)
    if model.keeps_inputs or not is_kept:
        return 0
    return sum(width for _, width in {(site.name.rpartition(".")[0], site.in_features) for site in sites})


def _keeps_inputs(spec: AdapterSpec) -> bool:
    adapter = adapter_of(spec)
    return adapter.keeps_inputs if isinstance(adapter, PartlyTrained) else True


class _Asked(Exception):
    """An adapter wants to see a frozen weight."""


def _unsplittable_reason(spec: RunSpec, shell: Shell) -> str:
    """Return why no rank may be without the whole base, or nothing if each can."""
    if spec.distill_from is not None and spec.distill_from.members is not None:
        return "a teacher that is asked while its student learns is whole in every worker"
    if spec.ensemble.places is not None:
        return "one worker has all of a bracket (ensemble.pruning.places)"
    adapter = shell.adapter
    if isinstance(adapter, WholeModel):
        return f"members of adapter.kind {adapter.spec.kind} are whole models themselves"
    if getattr(shell.model.config, "quantization_config", None) is not None:
        return f"{spec.base.source} is quantized already, in a format that is not split"

    if spec.optimization.cache_trunk:
        return "optimization.cache_trunk passes blocks that no rank has whole"

    def asked(name: str) -> Tensor:
        raise _Asked

    try:
        find_blocks(shell.model)
        first = list(shell.sites[:1])  # one tells, and PEFT takes its time for all sites of a large model
        for adapter in map(adapter_of, member_adapters(spec)):
            adapter.frozen_tensors(first, 0, asked)
            if isinstance(adapter, NeedsBaseWeights):
                with torch.device("meta"):
                    tensors = adapter.build(first, torch.Generator("cpu"))
                adapter.from_weights(tensors, first, asked)
    except BaseError as error:
        return error.message
    except _Asked:
        return f"adapter.kind {adapter.spec.kind} starts from the base's whole weights, which no rank has"
    return ""
