"""A member in a pack is the member that trains alone: its data, its gradient, its clipping, its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from raylora.adapters.packed import stack
from raylora.data.order import Order, Sample
from raylora.data.task import Batch, mean_per_example
from raylora.engine.model.token_losses import at_tokens, predicting, with_divergence
from raylora.engine.training import trainer as trainer_module
from raylora.engine.training.optimizer import MemberOptimizer
from raylora.engine.training.schedule import learning_rate_factor, total_steps
from raylora.errors import TrainingError
from raylora.spec import OptimizationSpec
from raylora.spec.members import KLSpec

EVERYTHING = {
    "ensemble__members": 4,
    "adapter__dropout": 0.1,
    "task__max_length": 40,
    "optimization": {
        "lr": 0.005, "steps": 6, "micro_batch": 2, "accumulation": 2, "clip_norm": 0.05, "warmup": 0.5, "eps": 1e-6,
    },
    "ensemble__regularizers": {"kl": {"beta": 0.5}, "decay_a": 4.0, "decay_b": 1.0, "decay_head": 0.5},
}


def assert_members_close(one: dict[str, Any], two: dict[str, Any], **tolerance: float) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("kind", "targets"), [("bert", ["query", "value"]), ("llama", "auto"), ("gpt2", "auto")])
def test_packed_equals_alone_after_every_step(
    kind: str, targets: Any, make_parts: Callable[..., Any], tiny_model: Any, trajectory: Any
) -> None:
    parts = make_parts(base__source=tiny_model(kind), adapter__target_modules=targets, **EVERYTHING)
    packed = trajectory(parts.trainer())
    assert len(packed) == 6
    for unit in parts.units:
        trainer = parts.trainer([unit])
        alone = trajectory(trainer)
        for step in range(6):
            assert_members_close(packed[step][unit.name], alone[step][unit.name], rtol=1e-5, atol=1e-5)
        norms = [point["grad_norm"] for point in trainer.states[0].history if "grad_norm" in point]
        assert min(norms) > 0.05, "clipping was not active"
        moved = max((packed[5][unit.name][n] - packed[0][unit.name][n]).abs().max() for n in packed[0][unit.name])
        assert moved > 1e-3
    lengths = {b.input_ids_BT.shape[1] for b in (
        parts.task.collate([parts.sets.train.examples[i] for i in t.order.indices(0)], parts.base.tokenizer)
        for t in parts.trainer().states
    )}
    assert len(lengths) > 1, "the members' batches should be padded differently"


@pytest.mark.slow
def test_packed_equals_alone_on_the_real_4_bit_base(make_parts: Callable[..., Any]) -> None:
    """bfloat16 over NF4: one member's gradient differs by rounding only, at most 2 % of its norm."""
    parts = make_parts(
        base={"source": "pypi:minilm-l6", "dtype": "bfloat16", "quantization": "nf4"}, ensemble__members=4,
        adapter__dropout=0.1,
    )
    members = [parts.member(unit, trained=0.02) for unit in parts.units]
    batches = [parts.batch(4 * k) for k in range(4)]
    seeds = [unit.stream("dropout", 0) for unit in parts.units]
    packed = parts.model.gradients(
        stack(members), parts.pack(*batches), seeds, KLSpec(beta=0.1)
    )
    for k in range(4):
        alone = parts.model.gradients(
            stack([members[k]]), parts.pack(batches[k]), [seeds[k]], KLSpec(beta=0.1)
        )
        assert packed.losses_K[k] == pytest.approx(alone.losses_K[0], rel=0.02)
        one, two = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in
                    (packed.gradients[k], alone.gradients[0]))
        assert two.norm() > 0.1
        assert (one - two).norm() / two.norm() < 0.02


# --- each member's own gradient --------------------------------------------------------------------------
@pytest.fixture
def parts(make_parts: Callable[..., Any]) -> Any:
    return make_parts(ensemble__members=3, adapter__dropout=0.1)


def gradients_of(parts: Any, members: list[Any], batches: list[Any], **options: Any) -> Any:
    seeds = [11, 22, 33][: len(members)]
    return parts.model.gradients(stack(members), parts.pack(*batches), seeds, **options)


def test_another_members_batch_and_weights_do_not_touch_my_gradient(parts: Any) -> None:
    members = [parts.member(unit, trained=0.1) for unit in parts.units]
    one = gradients_of(parts, members, [parts.batch(0), parts.batch(4), parts.batch(8)])
    members[1] = {n: 5 * t for n, t in members[1].items()}
    two = gradients_of(parts, members, [parts.batch(0), parts.batch(20), parts.batch(8)])
    for k in (0, 2):
        assert one.losses_K[k] == pytest.approx(two.losses_K[k], rel=1e-6)
        assert_members_close(one.gradients[k], two.gradients[k], rtol=1e-5, atol=1e-7)
    assert (one.gradients[1]["bert.encoder.layer.0.attention.self.query.lora_A"]
            - two.gradients[1]["bert.encoder.layer.0.attention.self.query.lora_A"]).norm() > 1e-4


def test_my_gradient_is_not_divided_by_the_number_of_members(parts: Any) -> None:
    members = [parts.member(unit, trained=0.1) for unit in parts.units]
    batches = [parts.batch(4 * k) for k in range(3)]
    packed = gradients_of(parts, members, batches)
    alone = gradients_of(parts, members[:1], batches[:1])
    assert_members_close(packed.gradients[0], alone.gradients[0], rtol=1e-4, atol=1e-7)
    head = alone.gradients[0]["head:classifier.weight"].norm()
    assert packed.gradients[0]["head:classifier.weight"].norm() / head == pytest.approx(1.0, rel=1e-5)


def replace_member(parts: Any, trainer: Any, index: int, tensors: dict[str, Any]) -> None:
    """Give a member of the pack other tensors."""
    trainer.states[index].optimizer = MemberOptimizer(
        tensors, parts.adapter, parts.spec.optimization, parts.spec.ensemble.regularizers, trainer.total,
        parts.base.device,
    )


def test_a_member_with_a_huge_loss_does_not_change_the_clipping_of_another(
    make_parts: Callable[..., Any], trajectory: Any
) -> None:
    parts = make_parts(optimization__clip_norm=0.1, optimization__steps=3)
    calm, wild = parts.trainer(), parts.trainer()
    for trainer, factor in ((calm, 1.0), (wild, 1000.0)):
        other = {n: t * (factor if n.startswith("head:") else 1) for n, t in parts.member(parts.units[1], 0.1).items()}
        replace_member(parts, trainer, 1, other)
    one, two = trajectory(calm), trajectory(wild)
    losses = [t.states[1].history[0]["loss"] for t in (calm, wild)]
    assert losses[1] > 50 * losses[0]
    assert_members_close(one[-1]["member-000"], two[-1]["member-000"], rtol=1e-5, atol=1e-6)


def test_each_member_sees_its_own_rows_once_per_epoch_and_shared_order_is_shared(
    make_parts: Callable[..., Any]
) -> None:
    own = make_parts(ensemble__members=3)
    seen = [[i for step in range(5) for i in t.order.indices(step)] for t in own.trainer().states]
    assert all(sorted(rows) == list(range(40)) for rows in seen)
    assert seen[0] != seen[1] != seen[2] and seen[0] != seen[2]
    shared = make_parts(ensemble__members=3, ensemble__data_order="shared")
    seen = [[i for step in range(5) for i in t.order.indices(step)] for t in shared.trainer().states]
    assert seen[0] == seen[1] == seen[2] and sorted(seen[0]) == list(range(40))


def test_bootstrap_draws_each_members_rows_with_replacement_and_keeps_them() -> None:
    draws = []
    for seed in range(2):
        order = Order(300, 10, seed=0, sample=Sample(300, seed, with_replacement=True))
        epochs = [sorted(i for s in range(30 * e, 30 * e + 30) for i in order.indices(s)) for e in range(2)]
        assert epochs[0] == epochs[1] and len(epochs[0]) == 300
        assert 0.58 < len(set(epochs[0])) / 300 < 0.69  # 1 - 1/e
        draws.append(epochs[0])
    assert draws[0] != draws[1]


# --- step 0 ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_fresh_member_predicts_what_the_base_with_its_head_predicts(
    kind: str, make_parts: Callable[..., Any], tiny_model: Any
) -> None:
    parts = make_parts(base__source=tiny_model(kind), adapter__target_modules="all-linear", ensemble__members=3)
    members = [parts.member(unit) for unit in parts.units]
    batch = parts.batch()
    scores, _ = parts.model.scores(stack(members), batch)
    name = "classifier" if kind == "bert" else "score"
    for member, mine in zip(members, scores.view(3, len(batch), -1), strict=True):
        head = parts.base.heads[name]
        with torch.no_grad():
            head.weight = torch.nn.Parameter(member[f"head:{name}.weight"])  # the base's own cannot be written
            if head.bias is not None:
                head.bias = torch.nn.Parameter(member[f"head:{name}.bias"])
            expected = parts.base.model(**batch.model_inputs()).logits
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_seeds_make_members_differ_and_equal_seeds_make_them_equal(make_parts: Callable[..., Any]) -> None:
    parts = make_parts(ensemble__members=4)
    members = [parts.member(unit) for unit in parts.units]
    for i in range(4):
        assert_members_close(members[i], parts.member(parts.units[i]), rtol=0, atol=0)
        for j in range(i):
            for name in members[i]:
                if name.endswith("lora_A") or name == "head:classifier.weight":
                    a, b = members[i][name], members[j][name]
                    # independent draws are sqrt(2) apart, relative to their size
                    assert (a - b).norm() / a.norm() > 1.0, name
                elif name.endswith("lora_B"):
                    assert not members[i][name].any()


# --- regularizers ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_to_the_base_equals_a_float64_reference(direction: Any, make_parts: Callable[..., Any]) -> None:
    parts = make_parts()
    member, fresh = parts.member(parts.units[0], trained=0.3), parts.member(parts.units[0])
    heads = stack([{n: t for n, t in fresh.items() if n.startswith("head:")}])
    batch = parts.batch()

    def loss(kl: KLSpec | None) -> float:
        return parts.model.gradients(stack([member]), parts.pack(batch), [1], kl, heads).losses_K[0]

    def probabilities(tensors: Any) -> torch.Tensor:
        scores = parts.model.scores(stack([tensors]), batch)[0]
        return scores.double().softmax(-1)

    p, q = probabilities(member), probabilities(fresh)  # a fresh member is the base with its adapters off
    if direction == "reverse":
        p, q = q, p
    expected = 0.0
    for row_p, row_q in zip(p.tolist(), q.tolist(), strict=True):
        expected += sum(a * (math.log(a) - math.log(b)) for a, b in zip(row_p, row_q, strict=True)) / len(p)
    assert expected > 1e-3
    assert loss(KLSpec(beta=0.7, direction=direction)) - loss(None) == pytest.approx(0.7 * expected, rel=1e-3)


def test_kl_over_a_vocabulary_is_a_mean_over_target_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(2, 4, 7, generator=generator) for _ in range(2))
    mask = torch.tensor([[False, True, True, True], [False, False, True, True]])
    batch = Batch(["a", "b"], torch.zeros_like(mask, dtype=torch.long), mask.long(), None, target_mask_BT=mask)
    asked, reference = logits[:, :-1][predicting(batch)], reference[:, :-1]
    none = torch.zeros(len(asked))
    loss = with_divergence(lambda logits, chunk: none, lambda chunk: reference[predicting(batch)], KLSpec(beta=1.0))
    found = mean_per_example(at_tokens(loss(asked, slice(None)), batch), batch)
    p, q = F.log_softmax(logits[:, :-1].double(), -1), F.log_softmax(reference.double(), -1)
    kl = (p.exp() * (p - q)).sum(-1)
    expected = [kl[0, 0:3].mean(), kl[1, 1:3].mean()]  # the logits before a token predict it
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_early_stopping_takes_a_member_out_at_its_best_while_the_others_go_on(
    make_parts: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts(
        optimization={"lr": 0.005, "epochs": 4, "micro_batch": 8},
        ensemble__regularizers={"early_stopping": {"patience": 1}},
    )
    curve = {"member-000": iter([1.0, 0.5, 0.6]), "member-001": iter([1.0, 0.9, 0.8, 0.7])}
    trainer, at_epoch = parts.trainer(), {}

    def fake(model: Any, stacked: Any, *rest: Any) -> list[dict[str, float]]:
        active = [t.plan.name for t in trainer.states if t.training]
        assert len(next(iter(stacked.values()))) == len(active)
        return [{"nll": next(curve[name])} for name in active]

    monkeypatch.setattr(trainer_module, "validation_metrics", fake)
    taken: list[dict[str, float]] = []

    def keep(trainer: Any, epoch: int) -> None:
        at_epoch[epoch] = [{n: p.clone() for n, p in t.optimizer.tensors().items()} for t in trainer.states]

    trainer.run(lambda t: None, lambda progress: taken.append(progress.losses), lambda: 0, keep)
    first, second = trainer.states
    assert first.stopped_at == 15 and second.stopped_at is None
    assert [sorted(losses) for losses in taken[14:16]] == [["member-000", "member-001"], ["member-001"]]
    assert_members_close(first.result(), at_epoch[2][0], rtol=0, atol=0)
    assert_members_close(second.result(), at_epoch[4][1], rtol=0, atol=0)
    assert_members_close(at_epoch[3][0], at_epoch[4][0], rtol=0, atol=0)


def test_real_overfitting_is_stopped_and_the_best_epoch_is_returned(make_parts: Callable[..., Any]) -> None:
    parts = make_parts(
        optimization={"lr": 0.05, "epochs": 8, "micro_batch": 8, "schedule": "constant"}, data__train_rows=16,
        ensemble__regularizers={"early_stopping": {"patience": 2}},
    )
    trainer = parts.trainer()
    trainer.run(lambda t: None, lambda p: None, lambda: 0)
    for state in trainer.states:
        seen = [point["validation_nll"] for point in state.history if "validation_nll" in point]
        assert state.best_value == min(seen)
        assert len(seen) == 8 or len(seen) == seen.index(min(seen)) + 3


# --- failures --------------------------------------------------------------------------------------------
def spoil(parts: Any, trainer: Any, index: int) -> None:
    tensors = parts.member(parts.units[index])
    tensors["head:classifier.bias"] = torch.full_like(tensors["head:classifier.bias"], math.nan)
    replace_member(parts, trainer, index, tensors)


def test_a_loss_that_is_nan_fails_its_member_and_no_other(make_parts: Callable[..., Any], trajectory: Any) -> None:
    parts = make_parts(ensemble__members=3)
    trainer = parts.trainer()
    spoil(parts, trainer, 1)
    steps = trajectory(trainer)
    failure = trainer.states[1].failure
    assert "loss is nan at step 1 on examples" in failure
    ids = {e.id for e in parts.sets.train.examples}
    assert failure.split("examples ")[1].split(", ")[0] in ids
    others = trajectory(parts.trainer([parts.units[0], parts.units[2]]))
    for name in ("member-000", "member-002"):
        assert_members_close(steps[-1][name], others[-1][name], rtol=1e-4, atol=1e-5)


def test_if_every_member_fails_so_does_the_pack(make_parts: Callable[..., Any]) -> None:
    parts = make_parts()
    trainer = parts.trainer()
    for index in range(2):
        spoil(parts, trainer, index)
    with pytest.raises(TrainingError, match="member-000: the loss is nan.*member-001: the loss is nan"):
        trainer.run(lambda t: None, lambda p: None, lambda: 0)


def test_a_member_that_breaks_in_the_last_update_fails_alone(make_parts: Callable[..., Any]) -> None:
    parts = make_parts(optimization__steps=2)
    trainer = parts.trainer()
    optimizer = trainer.states[1].optimizer
    real = optimizer.step

    def step() -> bool:
        done = real()
        if optimizer.steps_done == 2:
            with torch.no_grad():
                optimizer.parameters["head:classifier.bias"].fill_(math.inf)
        return done

    optimizer.step = step
    trainer.run(lambda t: None, lambda p: None, lambda: 0)
    assert not trainer.states[0].failure
    assert trainer.states[1].failure == "its weights are not finite after step 2"


def test_a_gradient_that_is_not_finite_fails_its_member(make_parts: Callable[..., Any], monkeypatch: Any) -> None:
    parts = make_parts()
    trainer = parts.trainer()
    real = trainer_module.PackedModel.gradients

    def broken(*arguments: Any, **options: Any) -> Any:
        outcome = real(*arguments, **options)
        if len(outcome.gradients) == 2:
            outcome.gradients[1]["head:classifier.bias"].fill_(math.inf)
        return outcome

    monkeypatch.setattr(trainer_module.PackedModel, "gradients", broken)
    trainer.run(lambda t: None, lambda p: None, lambda: 0)
    assert not trainer.states[0].failure
    assert "gradient" in trainer.states[1].failure and "step 1" in trainer.states[1].failure


# --- schedule --------------------------------------------------------------------------------------------
def test_the_schedule_warms_up_to_one_and_ends_near_zero() -> None:
    spec = OptimizationSpec(warmup=0.2, steps=10)
    factors = [learning_rate_factor(spec, step, 10) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[-1] == pytest.approx(1 / 8)
    assert factors[2:] == sorted(factors[2:], reverse=True)
    cosine = OptimizationSpec(warmup=0.0, schedule="cosine")
    assert learning_rate_factor(cosine, 5, 10) == pytest.approx(0.5) and learning_rate_factor(cosine, 0, 10) == 1
    constant = OptimizationSpec(warmup=0.0, schedule="constant")
    assert {learning_rate_factor(constant, step, 10) for step in range(10)} == {1.0}


@pytest.mark.parametrize(("rows", "changes", "steps"), [
    (40, {"epochs": 3, "micro_batch": 8}, 15), (41, {"epochs": 3, "micro_batch": 8}, 18),
    (40, {"epochs": 0.5, "micro_batch": 8}, 3), (40, {"micro_batch": 8, "accumulation": 2}, 8),
    (3, {"micro_batch": 8, "accumulation": 4, "epochs": 1}, 1), (40, {"steps": 7}, 7),
])
def test_the_number_of_steps(rows: int, changes: dict[str, Any], steps: int) -> None:
    assert total_steps(rows, OptimizationSpec(**changes)) == steps
