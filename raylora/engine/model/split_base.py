"""A base that is split over the ranks of a gang by DeepSpeed ZeRO-3, and gathered block by block as it is passed.

Each rank holds 1/G of every tensor, as stored: packed codes travel, not weights. A block is gathered whole, the next
one while it computes, in the forward and again in the backward pass; nothing is kept in between. The members' adapters
and heads are no part of the model and stay where they are; no gradient crosses ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raylora.adapters.base import Site, is_linear
from raylora.adapters.packed import AdaptedLinear, MemberLinear, Pack, Part, Slot
from raylora.engine.model.blocks import find_blocks
from raylora.engine.model.gang import Gang, Round
from raylora.engine.model.output_parts import split_output
from raylora.engine.model.token_head import Forward, TokenHead, WholeHead
from raylora.placement.estimate import MOST_PARTS
from raylora.quant.base import Quantizer
from raylora.quant.split import SplitEmbedding, SplitLinear

_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    # SplitLinear sees to what this is for, of all kinds of layers and without changing torch for the whole process.
    "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
}


def split(
    model: nn.Module, sites: Sequence[Site], heads: Mapping[str, nn.Linear], slot: Slot, quantizer: Quantizer,
    gang: Gang, device: torch.device, token_head: TokenHead,
) -> None:
    """Split a model with attached adapters over a gang; all its ranks do this together.

    On rank 0 the tensors are read from where they lie, block by block, and every rank keeps its part; the other ranks
    read none. From now on the model may be passed within a round of the gang only.

    Args:
        token_head: what makes the logits of this base's task, so that idle ranks pass the output layer as others do.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import set_z3_leaf_modules
    from deepspeed.utils.timer import NoopTimer

    blocks = [block.module for block in find_blocks(model)]
    shapes = {f"{name}.{key}": p.shape for name, linear in heads.items() for key, p in linear.named_parameters()}
    _replace_linears(model, quantizer)
    for module in model.modules():
        if isinstance(module, MemberLinear):  # every member has its own: the base's is for looking at
            module.__dict__["base"] = module._modules.pop("base")
    split_output(model, gang, device)
    block_numel = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    _replace_tables(model, block_numel)
    set_z3_leaf_modules(model, list({type(block) for block in blocks}))
    for part in [*blocks, model]:
        fresh = [p for p in part.parameters() if not hasattr(p, "ds_id")]
        if gang.place.rank:
            for parameter in fresh:  # what rank 0 sends is written over them, and they may be mapped read-only
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype)
        if fresh and part is not model:
            Init(module=part, config_dict_or_path=_CONFIG)
    # One ahead: it fetches while less than this much is there, so that beside what computes there is one more block.
    offload = DeepSpeedZeRoOffload(
        model, NoopTimer(), _CONFIG, overlap_comm=device.type == "cuda", prefetch_bucket_size=block_numel,
        max_reuse_distance=0, max_live_parameters=block_numel + 1, param_persistence_threshold=0,
    )
    for module in model.modules():  # positions and the like, which every rank has
        module._buffers.update({key: b.to(device) for key, b in module._buffers.items() if b is not None})

    def after(passed: Round) -> None:
        if passed is Round.TRAIN:
            offload.release_backward_leftovers()

    gang.passed_by(_IdlePass(model, sites, shapes, slot, device, token_head), after)


def _replace_linears(model: nn.Module, quantizer: Quantizer) -> None:
    """Put a layer that keeps nothing in the place of every frozen linear layer; the heads are the members'."""
    for parent in list(model.modules()):
        if isinstance(parent, MemberLinear | SplitLinear):
            continue
        for name, child in list(parent.named_children()):
            if is_linear(child):
                setattr(parent, name, SplitLinear(child, quantizer).eval())
    assert not any(isinstance(m, AdaptedLinear) and is_linear(m.base) for m in model.modules())


def _replace_tables(model: nn.Module, most_bytes: int) -> None:
    """Put a layer that looks its rows up part by part in the place of every table that is larger than a block.

    A table that is the output layer, too, is needed whole there, once in a pass where its logits are made in chunks.
    Where that is passed in parts, the table is elsewhere already.
    """
    holders = [p for _, p in model.named_parameters(remove_duplicate=False)]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Embedding or child.max_norm is not None:
                continue
            table_VD = child.weight
            is_tied = sum(p is table_VD for p in holders) > 1
            if table_VD.nbytes > most_bytes and not is_tied:
                row_bytes = table_VD.nbytes // len(table_VD)
                rows = max(most_bytes // row_bytes, math.ceil(len(table_VD) / MOST_PARTS), 1)
                setattr(parent, name, SplitEmbedding(table_VD.data, rows).eval())


@dataclass
class _IdlePass:
    """Joins a round with one token and no member: every tensor is gathered and nothing is made of it."""

    model: nn.Module
    sites: Sequence[Site]
    head_shapes: Mapping[str, torch.Size]
    slot: Slot
    device: torch.device
    token_head: TokenHead

    def __call__(self, agreed: Round) -> None:
        """Pass the model as the others do."""
        with torch.set_grad_enabled(agreed is Round.TRAIN):
            leaf = torch.zeros((), device=self.device, requires_grad=agreed is Round.TRAIN)
            heads = {
                name: torch.zeros(1, *shape, device=self.device) + leaf for name, shape in self.head_shapes.items()
            }
            at_site = {site.name: (leaf, site.out_features) for site in self.sites}
            token = torch.ones((1, 1), dtype=torch.long, device=self.device)
            with self.slot.use(Pack([Part(_Nobody(), 1, at_site)], heads)):  # type: ignore[arg-type]
                made = self._made(lambda: self.model(input_ids=token, attention_mask=token).logits)
            if agreed is Round.TRAIN:
                torch.autograd.grad(made.float().sum(), [leaf])

    def _made(self, forward: Forward) -> Tensor:
        """Return the logits or, where others pass the output layer in chunks, the losses of no position at all."""
        if isinstance(self.token_head, WholeHead):
            return forward()
        nowhere_BT = torch.zeros((1, 0), dtype=torch.bool, device=self.device)
        return self.token_head.losses(forward, nowhere_BT, lambda logits_CV, chunk: logits_CV)


class _Nobody:
    """An adapter that changes nothing, but has a gradient wherever members have one."""

    def packed_delta(self, x_KNI: Tensor, at_site: tuple[Tensor, int]) -> Tensor:
        """Return zeros, K x N x O."""
        leaf, outputs = at_site
        return (leaf * x_KNI[..., :1].float()).expand(*x_KNI.shape[:-1], outputs)
