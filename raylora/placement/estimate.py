"""What a worker's memory goes to, in bytes by part: a pure function of a model's shape and a member's work.

The parts that training keeps are counted operation by operation, as transformers' blocks run over frozen layers: a
frozen linear layer keeps nothing of its input, a norm keeps its input, attention its q, k, v and, where it is
computed eagerly (on CPUs), every softmax. What is not counted that way are the constants at the top, measured by
``benchmarks/memory_estimate.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from raylora.placement.answering import AnswerShape, CacheShape, cached_bytes

RUNTIME_BYTES = 620_000_000
"""A CPU worker without base and members: 540 MB once libraries are loaded, the rest when it computes."""
GPU_RUNTIME_BYTES = 1_270_000_000
"""The context and the kernels on a device, as an H100 showed it with torch 2.11 and CUDA 13."""
ADAPTER_BYTES, OPTIMIZER_BYTES = 12, 16
"""Per trained parameter: it, its copy stacked for the forward and what is multiplied; gradients and two moments."""
CHUNK_BYTES, GPU_CHUNK_BYTES = 32 * 2**20, 256 * 2**20
"""Of the logits that exist at once, in float32, where the output layer is passed in chunks of positions."""
MOST_PARTS, MOST_OUTPUT_PARTS = 64, 128
"""Of a table that is looked up in parts, and of an output layer: each is a message in every pass."""
_GATED_HEAP, _CHUNK_HEAP = 1.4, 2
"""What glibc's heap takes over the tensors of gated blocks, and of a chunk of logits: freed ones lie between kept ones.
Measured, and not understood further; a GPU's allocator has no such share."""
_GATHERED_BLOCKS = 2
"""The block that computes and the one that is fetched meanwhile."""


@dataclass(frozen=True)
class ModelShape:
    """The frozen model, as it is stored and computed with."""

    block_bytes: int = 0
    """All transformer blocks as stored, codes and scales."""
    embedding_bytes: int = 0
    """All that is beside the blocks: embeddings, output layer, last norm."""
    largest_table_bytes: int = 0
    """The largest tensor beside the blocks that a split base needs whole: a table that is only looked up is not."""
    largest_beside_output_bytes: int = 0
    """The same where the output layer is passed in parts."""
    output_part_bytes: int = 0
    """Of the output layer, one of the parts that it can be passed in; 0 where it cannot."""
    output_bytes: int = 0
    """All of its table."""
    output_in_parts: bool = False
    """It is passed in them."""
    workspace_bytes: int = 0
    """The largest quantized layer while it is multiplied with; nothing where none is quantized."""
    layers: int = 1
    hidden: int = 0
    heads: int = 0
    intermediate: int = 0
    vocabulary: int = 0
    block_parameters: int = 0
    head_parameters: int = 0
    """Of the output layer, where every token meets it."""
    compute_bytes: int = 2
    """Of a number in the compute type."""
    is_gated: bool = False
    """The feed-forward part has a gate; norms and softmax then compute in float32, as in Llama."""
    beside_bytes: int = 0
    """What a process holds beside the base, whatever it trains: a teacher that is asked."""
    keeps_inputs: bool = False
    """The frozen layers keep their inputs for the backward pass, as int8's do."""
    caches: tuple[CacheShape, ...] = ()
    """What its layers remember of a token, where answers are written."""


@dataclass(frozen=True)
class MemberShape:
    """What one member trains, and on how much at once."""

    parameters: int = 0
    rows: int = 0
    """Model rows of a micro-batch."""
    time: int = 0
    """Tokens of the longest row."""
    has_token_logits: bool = False
    """Every token has logits, over the whole vocabulary."""
    input_widths: int = 0
    """Widths of the layers' inputs that adapters keep, summed over all sites that do not share one."""
    evaluated_tokens: int = 0
    """Tokens of one evaluation forward, whatever the pack."""
    logit_chunk: int = 0
    """How many tokens' logits exist at once, whatever the pack; 0 where it is all of them."""

    asked_bytes: int = 0
    """What a teacher that is asked about a token takes for it, its members together."""

    kept_parameters: int = 0
    """What it has beside what it trains, without gradients and moments."""

    recomputed: bool = False
    """Blocks are run again in the backward pass, and only their inputs are kept."""

    answers: AnswerShape | None = None
    """What is written when all members are finished."""

    own_answers: tuple[AnswerShape, ...] = ()
    """What those who train together write on the way."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.time


@dataclass(frozen=True)
class Parts:
    """Bytes of one process by what they are for."""

    base: int = 0
    embeddings: int = 0
    workspace: int = 0
    """Quantized weights while they are multiplied with."""
    gathered: int = 0
    """Blocks or tables of a split base, whole for as long as they compute."""
    adapters: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    evaluation: int = 0
    """What the logits of an evaluation take beyond all that training keeps."""
    answers: int = 0
    """What writing answers takes, most of it the members' keys and values, beyond all that training keeps."""
    teacher: int = 0
    """One that stays loaded, and what it takes to ask it."""
    runtime: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.by_name().values())

    @property
    def shared(self) -> int:
        """What CPU workers of one node have once: they map the same pages."""
        return self.base + self.embeddings

    @property
    def own(self) -> int:
        """What every process has for itself."""
        return self.total - self.shared

    def by_name(self) -> dict[str, int]:
        """Return name -> bytes, in reading order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def parts_of(model: ModelShape, member: MemberShape, members: int, ranks: int = 1, on_gpu: bool = False) -> Parts:
    """Return what one process needs that trains so many members in one forward, over its part of the base.

    Args:
        ranks: over how many processes the base is split; 1 where it is not.
    """
    trained, kept = members * member.parameters, members * member.kept_parameters
    activations = members * activation_bytes(model, member, on_gpu, member.recomputed)
    logits = logit_bytes(model, member, members, on_gpu)
    evaluation = max(0, (_evaluation_bytes(model, member) if members else 0) - activations - logits)
    adapters, optimizer = ADAPTER_BYTES * (trained + kept), OPTIMIZER_BYTES * trained
    step = activations + logits + evaluation
    return Parts(
        base=math.ceil(model.block_bytes / ranks),
        embeddings=math.ceil(model.embedding_bytes / ranks),
        workspace=model.workspace_bytes,
        gathered=_gathered_bytes(model) if ranks > 1 else 0,
        adapters=adapters,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        evaluation=evaluation,
        answers=_answers_beyond(model, member, members, step, adapters + optimizer, on_gpu),
        teacher=model.beside_bytes + members * member.tokens * member.asked_bytes,
        runtime=GPU_RUNTIME_BYTES if on_gpu else RUNTIME_BYTES,
    )


def _gathered_bytes(model: ModelShape) -> int:
    """Return what is gathered at once of a split base: two blocks, a table, or a part of one and a block."""
    block = model.block_bytes // max(1, model.layers)
    if not model.output_in_parts:
        return max(_GATHERED_BLOCKS * block, model.largest_table_bytes)
    return max(_GATHERED_BLOCKS * block, model.largest_beside_output_bytes, block + model.output_part_bytes)


def output_part_rows(vocabulary: int, row_bytes: int, block_bytes: int) -> int:
    """Return the rows that make a part of an output layer's table: parts are alike, and at most a block's bytes.

    They are a little less: beside a part there may be a block and the last norm, which together are to be no more than
    two blocks. Where that would be more than :data:`MOST_OUTPUT_PARTS`, a part is larger.
    """
    most = max(block_bytes * 15 // 16 // row_bytes, math.ceil(vocabulary / MOST_OUTPUT_PARTS), 1)
    return math.ceil(vocabulary / math.ceil(vocabulary / most))


def activation_bytes(model: ModelShape, member: MemberShape, on_gpu: bool, recomputed: bool = False) -> int:
    """Return what one member's micro-batch keeps for its backward pass, without its logits.

    Args:
        recomputed: each block's activations are made again in the backward pass, and only its input is kept.
    """
    per_token = _kept_per_token(model, member, on_gpu)
    working = per_token  # one block's forward or backward pass while it runs
    inputs = member.input_widths * model.compute_bytes
    if recomputed:
        kept = member.tokens * (model.layers * model.hidden * model.compute_bytes + per_token + working)
    else:
        kept = member.tokens * (model.layers * per_token + inputs + working)
    return math.ceil(kept * _GATED_HEAP) if model.is_gated and not on_gpu else kept


def asked_bytes(model: ModelShape, members: int, time: int, on_gpu: bool) -> int:
    """Return what so many members of a teacher take for a token that they read: one block at work, and the last states.

    Args:
        time: tokens of the longest row.
    """
    return members * (_kept_per_token(model, MemberShape(time=time), on_gpu) + model.hidden * model.compute_bytes)


def _kept_per_token(model: ModelShape, member: MemberShape, on_gpu: bool) -> int:
    """Return the bytes that one block keeps of one token (after Korthikanti et al., arXiv 2205.05198, section 4.1)."""
    c, hidden = model.compute_bytes, model.hidden
    wide = 4 if model.is_gated else c  # Llama and its like normalize, and take the softmax, in float32
    norms, softmax = 2 * hidden * wide, model.heads * member.time * (c + wide)
    attention = 3 * hidden * c + (hidden * c if on_gpu else softmax)
    feed_forward = model.intermediate * c * (3 if model.is_gated else 1)
    inputs = (3 * hidden + model.intermediate) * c if model.keeps_inputs else 0
    return norms + attention + feed_forward + inputs


def _answers_beyond(
    model: ModelShape, member: MemberShape, members: int, step: int, state: int, on_gpu: bool
) -> int:
    """Return what answers take beyond a step's bytes, or a step's and the training state's when that is gone.

    Whoever trains answers between two steps, beside optimizers and adapters. When all members are finished, every
    worker has all of them, and nothing else that training had.
    """
    within = [answer_bytes(model, one, members, on_gpu) - step for one in member.own_answers] if members else []
    after = 0
    if members and member.answers is not None:
        everyone = member.answers.members
        after = answer_bytes(model, member.answers, everyone, on_gpu) - step - state
        after += ADAPTER_BYTES * everyone * (member.parameters + member.kept_parameters)
    return max(0, after, *within)


def answer_bytes(model: ModelShape, answers: AnswerShape, members: int, on_gpu: bool) -> int:
    """Return what it takes so many members to write answers side by side, without themselves.

    It is most while the prompts are read, by one block after another, or when the answers are long: then the layer
    that reads has its old keys and values beside the new ones. The logits are those of one position, in float32 and
    as probabilities.
    """
    rows, c = members * answers.rows_of(members), model.compute_bytes
    longest = answers.prompt + answers.new_tokens
    grown = max((rows * c * longest * one.width // one.layers for one in model.caches), default=0)
    begun = cached_bytes(model.caches, replace(answers, ways=1), members, c, written=0)
    reading = begun + rows * answers.prompt * asked_bytes(model, 1, answers.prompt, on_gpu)
    writing = cached_bytes(model.caches, answers, members, c) + grown
    return max(reading, writing) + rows * model.vocabulary * (c + 16)


def logit_chunk(vocabulary: int, on_gpu: bool = False) -> int:
    """Return how many positions the output layer is passed with at once: as many as make logits of a few megabytes."""
    return max(1, (GPU_CHUNK_BYTES if on_gpu else CHUNK_BYTES) // (4 * vocabulary))


def logit_bytes(model: ModelShape, member: MemberShape, members: int = 1, on_gpu: bool = False) -> int:
    """Return what a language model's logits take in training: themselves, in float32, their log-softmax, gradients.

    Where they are made in chunks, the hidden states at the target positions and their gradients are kept beside them.
    """
    if not member.has_token_logits:
        return 0
    tokens, c = members * member.tokens, model.compute_bytes
    if not member.logit_chunk:
        return tokens * model.vocabulary * (3 * c + 12)
    chunk = min(tokens, member.logit_chunk) * model.vocabulary * (c + 12)
    return (1 if on_gpu else _CHUNK_HEAP) * chunk + tokens * model.hidden * 3 * c


def _evaluation_bytes(model: ModelShape, member: MemberShape) -> int:
    """Return what the logits of one evaluation forward take; no gradients."""
    if not member.has_token_logits:
        return 0
    tokens = min(member.evaluated_tokens, member.logit_chunk or member.evaluated_tokens)
    return tokens * model.vocabulary * (2 * model.compute_bytes + 8)
