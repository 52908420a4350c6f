"""Rows that share a sequence have the losses and gradients of rows that have one each, and never meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

from raylora.adapters.packed import stack
from raylora.data.order import Order
from raylora.data.packed_rows import Packing, bins_of, pack_rows
from raylora.data.task import Batch, Example, collate_pack, take_part
from raylora.distill import TokenTargets, TokenTargetsWriter
from raylora.distill.losses import topk_kl
from raylora.engine.model.packed_model import PackLoss
from raylora.engine.model.recompute import recompute_blocks
from raylora.engine.model.shared_sequences import check_shared_sequences
from raylora.engine.model.trunk import DistinctRows
from raylora.engine.training.collator import Collator
from raylora.engine.training.distillation_loss import DistillationLoss
from raylora.errors import BaseError, DataError
from raylora.spec.members import KLSpec

SIZE = 32
LENGTHS = [[5, 32, 2, 9, 12, 7, 3, 20], [4, 4, 30, 18, 2, 6, 11, 3]]
KINDS = ["llama", "gpt2", "gemma3"]


@pytest.fixture
def make_language_parts(make_parts: Callable[..., Any], tiny_model: Callable[[str], str]) -> Callable[..., Any]:
    """Return a function from an architecture to two members of it in float32."""
    def make(kind: str = "llama", **changes: Any) -> Any:
        return make_parts(
            base={"source": tiny_model(kind), "dtype": "float32", "quantization": "none"},
            adapter__target_modules="all-linear", task={"kind": "language_modeling", "max_length": SIZE}, **changes,
        )
    return make


def examples_of(lengths: Sequence[int], seed: int = 0, vocabulary: int = 1000) -> list[Example]:
    """Return made-up rows of these lengths; a row depends on the seed and its place alone."""
    found = []
    for n, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * seed + n)
        tokens = torch.randint(10, vocabulary, (length,), generator=generator).tolist()
        found.append(Example(f"row-{seed}-{n}", (tuple(tokens),), None, (1,)))
    return found


def batches_of(parts: Any, lengths_K: Sequence[Sequence[int]] = LENGTHS) -> tuple[Batch, Batch]:
    """Return members' rows, each in a sequence of its own, and packed."""
    examples_K = [examples_of(lengths, seed) for seed, lengths in enumerate(lengths_K)]
    apart = collate_pack(parts.task, examples_K, parts.base.tokenizer)
    return apart, pack_rows(apart, SIZE)


def members_of(parts: Any, count: int = 2) -> dict[str, Tensor]:
    units = [replace(parts.units[0], seed=seed) for seed in range(count)]
    return stack([parts.member(unit, trained=0.05) for unit in units])


def taken(parts: Any, pack: Any, batch: Batch, seeds: Sequence[int] = (1, 2), **options: Any) -> tuple[PackLoss, Any]:
    """Return what a batch gives the members, and the loss of each example by its id."""
    losses: dict[str, float] = {}

    def noted(scores: Tensor, on: Batch) -> Tensor:
        found: Tensor = type(parts.task).loss(parts.task, scores, on)
        losses.update(zip(on.ids, found.tolist(), strict=True))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.task, "loss", noted)
        return parts.model.gradients(pack, batch, list(seeds), **options), losses


def exact_gradients(parts: Any, pack: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return each member's gradients in float64, as the mean over its rows one by one, which need no padding."""
    parts.base.model.double().set_attn_implementation("sdpa")
    found = []
    for k, lengths in enumerate(LENGTHS):
        member = {name: tensor[k : k + 1].double() for name, tensor in pack.items()}
        rows = [collate_pack(parts.task, [[row]], parts.base.tokenizer) for row in examples_of(lengths, k)]
        each = [taken(parts, member, row, [1])[0].gradients[0] for row in rows]
        found.append({name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]})
    return found


def assert_same(found: PackLoss, expected: PackLoss, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found.losses_K, expected.losses_K, rtol=1e-5, atol=1e-6)
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        assert one.keys() == other.keys() and any(gradient.any() for gradient in one.values())
        for name, gradient in one.items():
            torch.testing.assert_close(gradient, other[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# --- which rows share a sequence -----------------------------------------------------------------------
def test_bins_by_hand() -> None:
    assert bins_of([3], 10) == [[0]]
    assert bins_of([10, 10], 10) == [[0], [1]]
    assert bins_of([2, 9, 8, 1], 10) == [[1, 3], [2, 0]]
    # first fit decreasing fills the first to 10 and leaves 4; two of 7 are a narrower batch
    assert bins_of([5, 5, 2, 2], 10) == [[0, 2], [1, 3]]
    assert bins_of([12, 3], 10) == [[0], [1]]  # a row longer than the size has a sequence for itself
    assert bins_of([6, 5, 5, 4], 10) == [[0, 3], [1, 2]]
    assert bins_of([3, 3, 2, 2, 2], 6) == [[0, 1], [2, 3, 4]]  # each into the emptiest would come to 7


def test_the_shares_of_padding_by_hand() -> None:
    packing = Packing.of([[10, 2, 3, 5], [4, 1]], 10)
    # 4 rows of 10 and 2 of 4 are 48 places for 25 tokens; two sequences of 10 and one of 5 hold them all
    assert packing == Packing(6, 25, 3, 25, 48, 2, 10)
    assert str(packing) == "rows packed: 6 rows in 3 sequences; padding 47.9% -> 0.0%"
    assert str(Packing.of([[6, 6, 5]], 8)) == "rows packed: 3 rows in 3 sequences; padding 5.6% -> 5.6%"


def test_what_a_packed_batch_holds(make_language_parts: Callable[..., Any]) -> None:
    apart, packed = batches_of(make_language_parts(), [[3, 2, 4, 30], [31, 2, 32, 30]])
    assert packed.segments_BT is not None and packed.position_ids_BT is not None
    assert packed.lengths_K == (30, 32) and packed.input_ids_BT.shape == (6, 32)  # the second member needs three
    assert packed.ids == ["row-0-3", "row-0-2", "row-0-0", "row-0-1", "row-1-2", "row-1-0", "row-1-3", "row-1-1"]
    assert packed.attention_mask_BT.sum() == apart.attention_mask_BT.sum()
    assert packed.model_inputs().keys() == {"input_ids", "position_ids"}
    assert packed.segments_BT[0].tolist() == [0] * 30 + [-1] * 2
    assert packed.segments_BT[1].tolist() == [1] * 4 + [2] * 3 + [3] * 2 + [-1] * 23
    assert packed.position_ids_BT[1].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, *range(23)]
    assert packed.target_mask_BT is not None
    assert packed.target_mask_BT[1].tolist() == [False, True, True, True, False, True, True, False, True] + [False] * 23
    assert (packed.segments_BT[2] == -1).all() and packed.position_ids_BT[2].tolist() == list(range(32))
    by_id = dict(zip(apart.ids, range(8), strict=True))
    for n, name in enumerate(packed.ids):
        row = by_id[name]
        expected = apart.input_ids_BT[row][apart.attention_mask_BT[row].bool()]
        assert torch.equal(packed.input_ids_BT[packed.segments_BT == n], expected)


def test_the_collator_packs_what_it_collates(make_language_parts: Callable[..., Any]) -> None:
    parts, examples = make_language_parts(), examples_of([length for lengths in LENGTHS for length in lengths])
    orders = {f"member-{k:03d}": Order(len(examples), 4, seed=k) for k in range(2)}
    with Collator(parts.model, examples, 4, packs_rows=True) as collator:
        for number in range(4):
            chosen = [[examples[i] for i in order.indices(number)] for order in orders.values()]
            expected = pack_rows(collate_pack(parts.task, chosen, parts.base.tokenizer), SIZE)
            found = collator.batch(number, orders)
            for name, value in vars(expected).items():
                same = torch.equal(value, getattr(found, name)) if isinstance(value, Tensor) else None
                assert same if same is not None else value == getattr(found, name), name


# --- losses and gradients ------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_rows_apart(
    kind: str, attention: str, make_language_parts: Callable[..., Any]
) -> None:
    parts = make_language_parts(kind)
    parts.base.model.set_attn_implementation(attention)
    pack = members_of(parts)
    apart, packed = batches_of(parts)
    (expected, losses), (found, packed_losses) = taken(parts, pack, apart), taken(parts, pack, packed)
    assert len(packed.input_ids_BT) < len(apart.input_ids_BT) / 2
    assert found.tokens == expected.tokens == sum(map(sum, LENGTHS))
    assert packed_losses.keys() == losses.keys() and len(losses) == 16
    torch.testing.assert_close([packed_losses[name] for name in losses], list(losses.values()), rtol=1e-5, atol=1e-6)
    assert_same(found, expected)
    for k, gradients in enumerate(exact_gradients(parts, pack)):
        for name, gradient in gradients.items():
            assert (found.gradients[k][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_shares_its_sequence_is_nothing_to_a_row(kind: str, make_language_parts: Callable[..., Any]) -> None:
    parts = make_language_parts(kind)
    pack, (_, packed) = members_of(parts, 1), batches_of(parts, LENGTHS[:1])
    mine = packed.ids.index("row-0-3")
    assert packed.segments_BT is not None
    others = packed.segments_BT != mine
    changed = packed.input_ids_BT.clone()
    changed[others] = torch.randint(10, 1000, (int(others.sum()),), generator=torch.Generator().manual_seed(9))
    _, before = taken(parts, pack, packed, [1])
    _, after = taken(parts, pack, replace(packed, input_ids_BT=changed), [1])
    assert before["row-0-3"] == after["row-0-3"]
    assert all(before[name] != after[name] for name in before if name != "row-0-3")


@pytest.mark.parametrize("lengths", [[7], [32], [32, 32], [2, 2], [31, 2]])
def test_single_and_whole_rows(lengths: list[int], make_language_parts: Callable[..., Any]) -> None:
    parts = make_language_parts("gemma3")
    pack, (apart, packed) = members_of(parts, 1), batches_of(parts, [lengths])
    assert_same(taken(parts, pack, packed, [1])[0], taken(parts, pack, apart, [1])[0])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_divergence_from_the_base(direction: Any, make_language_parts: Callable[..., Any]) -> None:
    parts = make_language_parts()
    pack, (apart, packed), kl = members_of(parts), batches_of(parts), KLSpec(beta=2.0, direction=direction)
    with_kl = taken(parts, pack, packed, kl=kl)[0]
    assert_same(with_kl, taken(parts, pack, apart, kl=kl)[0])
    assert with_kl.losses_K[0] > taken(parts, pack, packed)[0].losses_K[0] + 1e-3


def test_blocks_that_are_run_again(make_language_parts: Callable[..., Any]) -> None:
    parts = make_language_parts("gemma3", adapter__dropout=0.1)
    pack, (_, packed) = members_of(parts), batches_of(parts)
    kept, _ = taken(parts, pack, packed)
    recompute_blocks(parts.base.model)
    assert_same(taken(parts, pack, packed)[0], kept, rtol=0, atol=0)


# --- members and workers -------------------------------------------------------------------------------
def test_four_members_equal_each_alone_dropout_included(make_language_parts: Callable[..., Any]) -> None:
    parts = make_language_parts(adapter__dropout=0.2)
    lengths_K = [*LENGTHS, [2, 2, 2, 2, 2, 2, 2, 2], [32, 31, 30, 29, 28, 2, 3, 20]]
    pack, seeds = members_of(parts, 4), [5, 6, 7, 8]
    apart, packed = batches_of(parts, lengths_K)
    together, _ = taken(parts, pack, packed, seeds)
    for k, seed in enumerate(seeds):
        own = collate_pack(parts.task, [examples_of(lengths_K[k], k)], parts.base.tokenizer)
        member = {name: tensor[k : k + 1] for name, tensor in pack.items()}
        alone, _ = taken(parts, member, pack_rows(own, SIZE), [seed])
        one = PackLoss([together.losses_K[k]], [together.gradients[k]], alone.tokens)
        assert_same(one, alone)
    without = make_language_parts(adapter__dropout=0.0)
    assert taken(without, pack, packed, seeds)[0].losses_K != pytest.approx(together.losses_K, rel=1e-4)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_parts_of_workers_that_share_a_batch(count: int, make_language_parts: Callable[..., Any]) -> None:
    parts = make_language_parts()
    pack, (apart, _) = members_of(parts), batches_of(parts)
    expected = taken(parts, pack, apart)[0]
    found = [taken(parts, pack, pack_rows(take_part(apart, n, count), SIZE))[0] for n in range(count)]
    mean = PackLoss(
        [sum(each.losses_K[k] for each in found) / count for k in range(2)],
        [{name: sum(each.gradients[k][name] for each in found) / count for name in expected.gradients[k]}
         for k in range(2)],
        expected.tokens,
    )
    assert_same(mean, expected)


def test_blocks_below_the_adapters_are_computed_once_per_sequence(make_language_parts: Callable[..., Any]) -> None:
    parts = make_language_parts("gemma3", adapter__layers={"last": 1})
    assert parts.base.trunk is not None
    pack = members_of(parts)
    packed = pack_rows(collate_pack(parts.task, [examples_of(LENGTHS[0])] * 2, parts.base.tokenizer), SIZE)
    assert DistinctRows.of(packed).save_work(SIZE)
    shared, _ = taken(parts, pack, packed)
    parts.model = replace(parts.model, base=replace(parts.base, trunk=None))
    assert_same(shared, taken(parts, pack, packed)[0])


# --- a teacher -----------------------------------------------------------------------------------------
def test_a_teachers_targets_meet_the_tokens_they_were_made_for(make_language_parts: Callable[..., Any]) -> None:
    parts, files = make_language_parts(), {}
    pack, (apart, packed) = members_of(parts), batches_of(parts)
    vocabulary = parts.base.model.config.vocab_size
    with TokenTargetsWriter(
        files.__setitem__, teacher_digest="t", members=(0,), vocabulary=vocabulary, k=8, prefix="tokens"
    ) as writer:
        for name, length in zip(apart.ids, apart.attention_mask_BT.sum(1).tolist(), strict=True):
            generator = torch.Generator().manual_seed(len(files) + length)
            writer.add(name, name, 3 * torch.randn(1, length - 1, vocabulary, generator=generator))
    targets = TokenTargets(files.__getitem__)
    taught = DistillationLoss(parts.task, topk_kl.build(topk_kl.Spec(task_weight=0.3)), targets)
    options = {"token_loss": lambda batch: taught.of_positions(batch, 0.5)}
    expected, found = (taken(parts, pack, batch, **options)[0] for batch in (apart, packed))
    assert_same(found, expected)
    assert found.losses_K != pytest.approx(taken(parts, pack, packed)[0].losses_K, rel=1e-2)
    other = replace(packed, ids=[packed.ids[1], packed.ids[0], *packed.ids[2:]])
    with pytest.raises(DataError, match="read other tokens than the student"):
        taken(parts, pack, other, **options)


# --- models --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_asked_whether_it_keeps_rows_apart(kind: str, make_language_parts: Callable[..., Any]) -> None:
    check_shared_sequences(make_language_parts(kind).base)


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_a_model_whose_rows_meet_is_refused(kind: str, make_language_parts: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    small = {"vocab_size": 97, "hidden_size": 32, "initializer_range": 0.1}
    model: Any = (
        t.BloomForCausalLM(t.BloomConfig(**small, n_layer=2, n_head=4)) if kind == "bloom"
        else t.MambaForCausalLM(t.MambaConfig(**small, num_hidden_layers=2, state_size=4))
    )
    with pytest.raises(BaseError, match=f"optimization.pack_rows: in {type(model).__name__} a row sees"):
        check_shared_sequences(replace(make_language_parts().base, model=model.eval()))


@pytest.mark.parametrize("token_mean", [False, True])
def test_answers_of_chats_and_what_they_weigh(
    token_mean: bool, make_parts: Callable[..., Any], tiny_model: Callable[[str], str]
) -> None:
    parts = make_parts(
        base={"source": tiny_model("llama"), "dtype": "float32", "quantization": "none"},
        adapter__target_modules="all-linear",
        task={"kind": "instruction", "max_length": 160, "token_mean": token_mean},
        data={"train": {"source": "pypi:arithmetic"}, "train_rows": 16, "validation_rows": 4, "test_rows": 4},
    )
    pack, examples = members_of(parts), parts.sets.train.examples
    orders = {f"member-{k:03d}": Order(16, 8, seed=k) for k in range(2)}
    batches = []
    for packs_rows in (False, True):
        with Collator(parts.model, examples, 2, accumulation=2, packs_rows=packs_rows) as collator:
            batches.append(collator.batch(0, orders))
    apart, packed = batches
    assert len(packed.input_ids_BT) < len(apart.input_ids_BT) and (apart.weight_N is not None) == token_mean
    assert_same(taken(parts, pack, packed)[0], taken(parts, pack, apart)[0])
