"""Prepare a base: quantize it block by block, each block reading what the quantized ones before it give.

One copy of the model is held; a block's dense weights go as its quantized ones come, and one block's activations
exist at a time. Every finished block is committed, so a killed preparation continues where it was.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from raylora.data.task import Task
from raylora.engine.model.blocks import Block, find_blocks
from raylora.engine.model.checkpoint import (
    is_decoder,
    load_config,
    load_dense,
    load_tokenizer,
    refuse_quantized,
    weights_folder,
)
from raylora.engine.model.machine import compute_dtype, peak_memory_bytes
from raylora.engine.model.quantized_layers import (
    SUMMARY,
    Solved,
    block_folder,
    install,
    solved_layers,
    summary_of,
    weight_of,
)
from raylora.engine.model.serialization import from_bytes, to_bytes
from raylora.engine.quantization.block_activations import Stream, advance, observe, open_stream
from raylora.engine.quantization.calibration import Calibration, load_calibration
from raylora.engine.quantization.layer_solver import GroupJob, Solve, layer_tensors, solve_here
from raylora.engine.quantization.model_tuning import tune_pairs
from raylora.engine.quantization.prepared_base import identity_of, store_of, weights_sha256
from raylora.errors import BaseError, Interrupted, RunDirectoryError
from raylora.init.rilq import Spec as RilqSpec
from raylora.progress import BlockDone, OnBlock
from raylora.quant.gram import Cross, Gram
from raylora.records import LayerErrors, PreparationSummary
from raylora.spec import BaseSpec, RunSpec, SetSpec
from raylora.store.run_store import RunStore

_WAIT_S = 2.0
_TUNED = "tuned"
"""All pairs after they were tuned together, before the blocks have them."""


@dataclass(frozen=True)
class PreparedBase:
    """A base that is prepared or will be: where it lies, by what it is known, and what it is calibrated on."""

    store: RunStore
    identity: dict[str, Any]
    calibration: Calibration | None

    @property
    def is_ready(self) -> bool:
        """Whether it has been prepared."""
        return self.store.has_result(SUMMARY)

    def notes(self, spec: RunSpec) -> list[str]:
        """Return what a person should know before it is prepared or trained on."""
        name = self.store.uri.rpartition("/")[2]
        found = [f"the base {name} is already prepared" if self.is_ready else f"the base {name} will be prepared first"]
        if self.calibration is not None and self.calibration.left_out:
            found.append(f"{self.calibration.left_out:,} calibration texts are in evaluation sets and were left out")
        compensation = spec.base.compensation
        if compensation is not None and compensation.trainable and spec.ensemble.members > 1:
            found.append("members start from one and the same pair (base.compensation.trainable): "
                         "only their data order and heads tell them apart")
        return found


def open_base(
    spec: BaseSpec, task: Task, folder: str, evaluated: set[str] | None = None, evaluation_sets: Sequence[SetSpec] = ()
) -> PreparedBase:
    """Return the base that a spec asks for, prepared or not.

    Nothing is written.

    Raises:
        UsageError: the base cannot be had, or the calibration text does not serve.
    """
    refuse_quantized(spec)
    calibration = None
    if spec.calibration is not None:
        tokenizer = load_tokenizer(spec, task)
        calibration = load_calibration(
            spec.calibration, tokenizer, is_decoder(load_config(spec)), evaluated or set(), evaluation_sets
        )
    identity = identity_of(spec, calibration, weights_sha256(weights_folder(spec)))
    return PreparedBase(store_of(spec, folder, identity), identity, calibration)


def ensure_prepared(
    spec: BaseSpec, task: Task, base: PreparedBase, device: torch.device, solve: Solve = solve_here,
    report: OnBlock = lambda done: None, should_stop: Callable[[], int] = lambda: 0,
) -> PreparationSummary:
    """Prepare a base unless it is there already; if another process is at it, wait for that one. Return its summary.

    Raises:
        Interrupted: a signal came; the blocks so far are committed.
        BaseError: a layer that cannot be quantized, by name.
    """
    store = base.store
    while not base.is_ready:
        try:
            with store.held():
                _Preparation(spec, task, base, device, solve, report, should_stop).run()
        except RunDirectoryError:
            time.sleep(_WAIT_S)
            if should_stop():
                raise Interrupted("stopped while waiting for the base", signal_number=should_stop()) from None
    return summary_of(store)


class _Preparation:
    """One pass over the blocks."""

    def __init__(
        self, spec: BaseSpec, task: Task, base: PreparedBase, device: torch.device, solve: Solve, report: OnBlock,
        should_stop: Callable[[], int],
    ) -> None:
        self.spec, self.task, self.store, self.identity = spec, task, base.store, base.identity
        self.calibration, self.device = base.calibration, device
        self.solve, self.report, self.should_stop = solve, report, should_stop
        self.dtype = compute_dtype(spec.dtype, device)
        assert spec.grid is not None
        self.grid = spec.grid
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {"forward": 0.0, "solve": 0.0}
        self.layers: list[Solved] = []
        self.short_of = 0
        """The widest input, if there are fewer calibration tokens than it has directions."""

    def run(self) -> None:
        if self.store.has_result(SUMMARY):  # another process was faster
            return
        self.store.write_json("base.json", {"identity": self.identity, "base": self.spec.model_dump(mode="json")})
        model = load_dense(self.spec, self.task, self.device)
        blocks = find_blocks(model)
        dense_bytes = sum(layer_weight.nbytes for layer_weight in _dense_weights(model, blocks))
        before = self._perplexity(model)
        stream = self._timed("forward", lambda: self._open(model, blocks))
        reference = self._reference(stream)
        for index, block in enumerate(blocks):
            started = time.perf_counter()
            fresh = not self.store.has_result(block_folder(index))
            if fresh:
                beside = None if self._tunes else reference
                self._commit(index, self._quantize(block, stream, beside), time.perf_counter() - started)
            if reference is not None and (self._tunes or index + 1 < len(blocks)):
                block.module.to(self.dtype)
                self._timed("forward", partial(advance, block, reference))
            layers = solved_layers(self.store, index, self.grid)
            self.layers += layers
            install(model, layers, self.dtype)
            block.module.to(self.dtype)
            if stream is not None and index + 1 < len(blocks):
                self._timed("forward", partial(advance, block, stream))
            self._say(index, len(blocks), time.perf_counter() - started, layers)
        model.to(self.dtype)
        if self._tunes:
            assert reference is not None
            self._timed("solve", partial(self._tune, model, blocks, reference))
        after = self._perplexity(model)
        self._finish(model, blocks, dense_bytes, before, after)

    def _open(self, model: Any, blocks: Sequence[Block]) -> Stream | None:
        if self.calibration is None:
            return None
        batches = [_to(batch, self.device) for batch in self.calibration.batches]
        stream = open_stream(model, blocks, batches, self.dtype)
        widest = max(weight.shape[1] for weight in _dense_weights(model, blocks))
        self.short_of = widest if stream.tokens < widest else 0
        return stream

    def _reference(self, stream: Stream | None) -> Stream | None:
        """Return where calibration stands in the full model, for methods that compare with it."""
        compensation = self.spec.compensation
        if stream is None or compensation is None or not compensation.reads_full_model:
            return None
        return replace(stream, hidden=list(stream.hidden))

    @property
    def _tunes(self) -> bool:
        return self.spec.compensation is not None and self.spec.compensation.tunes_together

    def _tune(self, model: Any, blocks: Sequence[Block], reference: Stream) -> None:
        """Tune all pairs together, commit them, and then each block again with its own; each is done once."""
        if not self.store.has_result(_TUNED):
            assert self.calibration is not None
            batches = [_to(batch, self.device) for batch in self.calibration.batches]
            is_causal = self.task.auto_class == "AutoModelForCausalLM"
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                found = tune_pairs(
                    model, blocks, batches, reference, cast(RilqSpec, self.spec.compensation), is_causal,
                    self.should_stop,
                )
            factors = {f"{name}|A": a_RI for name, (a_RI, _) in found.items()}
            factors |= {f"{name}|B": b_OR for name, (_, b_OR) in found.items()}
            self.store.commit_result(_TUNED, {"pairs.safetensors": to_bytes(factors)})
        pairs = from_bytes(self.store.load_result(_TUNED)["pairs.safetensors"])
        self.layers = []
        for index in range(len(blocks)):
            layers = [
                # What a pair leaves of its layer's own error says nothing here, and is not what was minimized.
                replace(layer, pair=(pairs[f"{layer.name}|A"], pairs[f"{layer.name}|B"]),
                        errors={key: layer.errors[key] for key in ("weight", "quantized")})
                for layer in solved_layers(self.store, index, self.grid)
            ]
            self._commit(index, layers, sum(layer.seconds for layer in layers))
            self.layers += layers
        for layer in self.layers:
            linear: Any = model.get_submodule(layer.name)
            assert layer.pair is not None
            linear.pair_A_RI, linear.pair_B_OR = (each.to(self.device, self.dtype) for each in layer.pair)

    def _quantize(self, block: Block, stream: Stream | None, reference: Stream | None) -> list[Solved]:
        """Return a block's quantized layers; its weights are read as the checkpoint holds them, before any cast."""
        weights = {name: weight_of(block.module.get_submodule(name.removeprefix(block.name + ".")))
                   for name in block.linears}
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise BaseError(f"{name}: its weights are not finite", "the checkpoint is damaged: fetch it again")
        grams: dict[tuple[str, ...], tuple[Tensor | None, Tensor | None]] = {tuple(block.linears): (None, None)}
        if stream is not None:
            block.module.to(self.dtype)
            grams = self._timed("forward", lambda: _grams(block, stream, self.device, reference))
        jobs = [
            GroupJob({name: weights[name] for name in names}, gram_II, self.grid, self.spec.compensation, cross_II)
            for names, (gram_II, cross_II) in grams.items()
        ]
        solved = self._timed("solve", lambda: self.solve(jobs))
        by_name = {layer.name: layer for group in solved for layer in group}
        return [by_name[name] for name in block.linears]

    def _commit(self, index: int, layers: Sequence[Solved], seconds: float) -> None:
        tensors = {key: tensor for layer in layers for key, tensor in layer_tensors(layer).items()}
        facts = {"seconds": seconds, "layers": [
            {"name": layer.name, "shape": list(layer.quantized.shape), "errors": layer.errors, "seconds": layer.seconds}
            for layer in layers
        ]}
        self.store.commit_result(block_folder(index), {
            "layers.safetensors": to_bytes(tensors), "facts.json": json.dumps(facts, indent=1).encode(),
        })

    def _say(self, index: int, blocks: int, block_s: float, layers: Sequence[Solved]) -> None:
        shares = [
            layer.errors.get("compensated", layer.errors["quantized"]) / layer.errors["weight"]
            for layer in layers if layer.errors.get("weight")
        ]
        elapsed = time.perf_counter() - self.started
        eta_s = elapsed / (index + 1) * (blocks - index - 1)
        self.report(BlockDone(index + 1, blocks, block_s, eta_s, sum(shares) / len(shares) if shares else None))
        number = self.should_stop()
        if number and index + 1 < blocks:
            raise Interrupted(f"stopped after block {index + 1} of {blocks}; those are committed", signal_number=number)

    def _perplexity(self, model: Any) -> float | None:
        if self.calibration is None or not self.calibration.held_out or self.task.auto_class != "AutoModelForCausalLM":
            return None
        batches = [_to(batch, self.device) for batch in self.calibration.held_out]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return perplexity(model, batches)

    def _finish(
        self, model: Any, blocks: Sequence[Block], dense_bytes: int, before: float | None, after: float | None
    ) -> None:
        quantized_bytes = sum(layer.quantized.size_bytes for layer in self.layers)
        pair_bytes = sum(each.nbytes for layer in self.layers for each in layer.pair or ())
        weights = sum(math.prod(layer.quantized.shape) for layer in self.layers)
        calibration = self.calibration
        summary: PreparationSummary = {
            "blocks": len(blocks),
            "linears": len(self.layers),
            "weights": weights,
            "dense_bytes": dense_bytes,
            "quantized_bytes": quantized_bytes,
            "bits_per_weight": 8 * quantized_bytes / weights,
            "pair_bytes": pair_bytes,
            "perplexity_before": before,
            "perplexity_after": after,
            "calibration_tokens": calibration.tokens if calibration else 0,
            "held_out_tokens": calibration.held_out_tokens if calibration else 0,
            "texts_left_out": calibration.left_out if calibration else 0,
            "widest_input_not_spanned": self.short_of,
            "seconds": {"total": time.perf_counter() - self.started, **self.seconds},
            "peak_rss_bytes": peak_memory_bytes(),
            "compute_dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "layers": [
                cast(LayerErrors, {"name": layer.name, "shape": list(layer.quantized.shape), **layer.errors})
                for layer in self.layers
            ],
        }
        self.store.commit_result(SUMMARY, {"summary.json": json.dumps(summary, indent=1).encode()})

    def _timed(self, key: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[key] += time.perf_counter() - started


@torch.no_grad()
def perplexity(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Return exp of the mean negative log-likelihood of every token but each sample's first."""
    total, count = 0.0, 0
    for batch in batches:
        logits_BTV = model(**batch, use_cache=False).logits[:, :-1]
        mask_BT = batch["attention_mask"][:, 1:].bool()
        targets = batch["input_ids"][:, 1:][mask_BT]
        total += float(torch.nn.functional.cross_entropy(logits_BTV[mask_BT].float(), targets, reduction="sum"))
        count += len(targets)
    return math.exp(total / count)


def _grams(
    block: Block, stream: Stream, device: torch.device, reference: Stream | None
) -> dict[tuple[str, ...], tuple[Tensor, Tensor | None]]:
    """Return by group of linears X'^T X' of what they read, and X'^T X with what they read in the reference."""
    grams: dict[tuple[str, ...], Gram] = {}
    crosses: dict[tuple[str, ...], Cross] = {}

    def take(names: tuple[str, ...], x_NI: Tensor, reference_NI: Tensor | None) -> None:
        if names not in grams:
            grams[names] = Gram(x_NI.shape[1], device)
        grams[names].add(x_NI, "/".join(names))
        if reference_NI is not None:
            crosses.setdefault(names, Cross(x_NI.shape[1], device)).add(x_NI, reference_NI)

    observe(block, stream, take, reference)
    return {names: (gram.matrix_II, crosses[names].matrix_II if crosses else None) for names, gram in grams.items()}


def _dense_weights(model: Any, blocks: Sequence[Block]) -> list[Tensor]:
    return [weight_of(model.get_submodule(name)) for block in blocks for name in block.linears]


def _to(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}
