"""Language models' targets: the top-k divergence, the stream of shards, and mixing workers from their top-k."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raylora.distill import TokenTargets, TokenTargetsWriter, TopK, content_hash
from raylora.distill.loss_functions import tempered_mixture
from raylora.distill.losses import topk_kl
from raylora.distill.tokens import concatenate
from raylora.distill.topk import FLOOR, teacher_logp, top_k
from raylora.errors import DataError, StoreError

VOCABULARY = 5000
WORDS = ["a", "b", "c", "d", "e", "f", "g"]


def randn(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def peaked(members: int, positions: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """Return M x P x V logits like a language model's: Zipf's law over a ranking of its own at each position,
    sharper at some positions than at others, and members that differ a little on every token."""
    generator = torch.Generator().manual_seed(seed)
    ranks_PV = torch.rand(positions, vocabulary, generator=generator).argsort(1).argsort(1)
    sharpness_P1 = 1.2 + 1.5 * torch.rand(positions, 1, generator=generator)
    return -sharpness_P1 * torch.log1p(ranks_PV.float()) + 0.5 * torch.randn(
        members, positions, vocabulary, generator=generator
    )


class Files(dict[str, bytes]):
    def read(self, name: str) -> bytes:
        if name not in self:
            raise FileNotFoundError(name)
        return self[name]


def logits_of(example_id: str, members: tuple[int, ...] = (0, 1), vocabulary: int = 50) -> Tensor:
    """Return M x P x V logits that depend on the id and the member alone; P differs between ids."""
    number = WORDS.index(example_id)
    logits = peaked(8, 3 + number, seed=number, vocabulary=vocabulary)
    return logits[list(members)]


def write(files: Files, ids: list[str], **changed: object) -> TokenTargetsWriter:
    facts: dict = {"teacher_digest": "t", "members": (0, 1), "vocabulary": 50, "k": 8, **changed}
    with TokenTargetsWriter(files.__setitem__, **facts) as writer:
        for example_id in ids:
            logits = logits_of(example_id, tuple(facts["members"]), facts["vocabulary"])
            writer.add(example_id, content_hash(example_id), logits)
    return writer


def exact_of(example_id: str, k: int = 8, members: tuple[int, ...] = (0, 1)) -> TopK:
    return top_k(tempered_mixture(logits_of(example_id, members).transpose(0, 1), 1.0), k)


# --- the divergence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_the_whole_vocabulary_it_is_the_exact_kl(temperature: float) -> None:
    teacher_PV, student_PV = randn(6, 9), randn(6, 9, seed=1).requires_grad_(True)
    whole = top_k(torch.log_softmax(teacher_PV / temperature, -1), 9, temperature)
    found_P = topk_kl.topk_kl(student_PV, whole.index_PK, whole.logp_PK, whole.tail_P, temperature)
    p, q = torch.softmax(teacher_PV / temperature, -1), torch.softmax(student_PV / temperature, -1)
    assert torch.allclose(found_P, temperature**2 * (p * (p / q).log()).sum(-1))
    found_P.sum().backward()
    assert student_PV.grad is not None and torch.allclose(student_PV.grad, temperature * (q - p), atol=1e-12)


def test_it_equals_the_kl_of_the_coarse_distributions_and_never_exceeds_the_whole() -> None:
    teacher_PV, student_PV = randn(40, 30), randn(40, 30, seed=1)
    p, q = torch.softmax(teacher_PV, -1), torch.softmax(student_PV, -1)
    whole_P, before_P = (p * (p / q).log()).sum(-1), torch.zeros(40, dtype=torch.float64)
    for k in (1, 3, 10, 29, 30):
        some = top_k(torch.log_softmax(teacher_PV, -1), k)
        found_P = topk_kl.topk_kl(student_PV, some.index_PK, some.logp_PK, some.tail_P)
        for at in range(40):
            kept = some.index_PK[at].tolist()
            coarse = [(p[at, v].item(), q[at, v].item()) for v in kept]
            if k < 30:
                rest = [v for v in range(30) if v not in kept]
                coarse.append((p[at, rest].sum().item(), q[at, rest].sum().item()))
            assert found_P[at].item() == pytest.approx(sum(a * math.log(a / b) for a, b in coarse), abs=1e-12)
        assert (found_P >= before_P - 1e-12).all() and (found_P <= whole_P + 1e-12).all()
        before_P = found_P


def test_equal_distributions_have_no_loss_and_no_gradient_even_after_float16() -> None:
    student_PV = randn(6, 200).requires_grad_(True)
    same = top_k(torch.log_softmax(student_PV.detach(), -1), 8)
    found_P = topk_kl.topk_kl(student_PV, same.index_PK, same.logp_PK, same.tail_P)
    found_P.sum().backward()
    assert student_PV.grad is not None and found_P.abs().max() < 1e-14 and student_PV.grad.abs().max() < 1e-14
    halved_P = topk_kl.topk_kl(student_PV, same.index_PK, same.logp_PK.half(), same.tail_P.half())
    assert halved_P.min() >= 0 and halved_P.max() < 1e-5
    assert torch.allclose(teacher_logp(same).exp().sum(-1), torch.ones(6).double())


def test_certain_teachers_and_extreme_students_stay_finite() -> None:
    teacher_PV = torch.full((2, 10), -2000.0)
    teacher_PV[:, 3] = 2000.0
    certain = top_k(torch.log_softmax(teacher_PV, -1), 2)
    student_PV = torch.tensor([[65504.0] + [-65504.0] * 9, [0.0] * 10], requires_grad=True)
    found_P = topk_kl.topk_kl(student_PV, certain.index_PK, certain.logp_PK.half(), certain.tail_P.half())
    found_P.sum().backward()
    assert found_P.isfinite().all() and student_PV.grad is not None and student_PV.grad.isfinite().all()
    forbidden = top_k(torch.tensor([[0.0, -math.inf, -math.inf]]), 2)
    assert forbidden.logp_PK.tolist() == [[0.0, FLOOR]] and forbidden.tail_P.tolist() == [FLOOR]


def test_the_loss_kind_adds_the_next_token_and_checks_what_it_is_given() -> None:
    student_PV, tokens_P = randn(5, 50), torch.tensor([4, 1, -1, 0, 49])
    targets = top_k(torch.log_softmax(randn(5, 50, seed=1), -1), 8)
    loss = topk_kl.build(topk_kl.Spec(task_weight=0.25))
    kl_P = topk_kl.topk_kl(student_PV, targets.index_PK, targets.logp_PK, targets.tail_P)
    nll_P = F.cross_entropy(student_PV, tokens_P, ignore_index=-1, reduction="none")
    assert torch.allclose(loss.per_example(student_PV, targets, tokens_P), 0.25 * nll_P + 0.75 * kl_P)
    with pytest.raises(DataError, match="5 positions over 50 tokens, the student 4 over 50"):
        loss.per_example(student_PV[:4], targets, None)
    with pytest.raises(DataError, match="the student 5 over 49") as caught:
        loss.per_example(student_PV[:, :49], targets, None)
    assert "same tokenizer" in caught.value.hint
    with pytest.raises(DataError, match=r"made at temperature 1.0, the loss has 2.0"):
        topk_kl.build(topk_kl.Spec(temperature=2.0)).per_example(student_PV, targets, None)


# --- the stream ----------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_by_id_whatever_the_order() -> None:
    straight, mixed = Files(), Files()
    write(straight, WORDS, shard_positions=10)
    write(mixed, random.Random(0).sample(WORDS, len(WORDS)), shard_positions=1)
    a, b = TokenTargets(straight.read), TokenTargets(mixed.read, cache_bytes=1)
    for batch in (["d"], ["f", "a", "f", "c"], WORDS[::-1]):
        (one, lengths), (other, same_lengths) = a.gather(batch), b.gather(batch, [content_hash(w) for w in batch])
        assert lengths == same_lengths == [3 + WORDS.index(word) for word in batch]
        assert torch.equal(one.index_PK, other.index_PK) and torch.equal(one.logp_PK, other.logp_PK)
        exact = concatenate([exact_of(word) for word in batch])
        assert torch.equal(one.index_PK, exact.index_PK) and one.index_PK.dtype == torch.int64
        # float16's share, and the float32 in which members are mixed
        assert ((one.logp_PK - exact.logp_PK).abs() <= exact.logp_PK.abs() / 2048 + 1e-6).all()
        assert ((one.tail_P - exact.tail_P).abs() <= exact.tail_P.abs() / 2048 + 1e-6).all()


def test_float16_costs_a_distribution_next_to_nothing() -> None:
    logp_PV = tempered_mixture(peaked(4, 64).transpose(0, 1), 1.0)
    exact = top_k(logp_PV, 32)
    halved = TopK(exact.index_PK, exact.logp_PK.half(), exact.tail_P.half(), VOCABULARY)
    p, q = teacher_logp(exact).double(), teacher_logp(halved).double()
    assert (p.exp() * (p - q)).sum(-1).max() < 1e-5 and (p.exp() - q.exp()).abs().max() < 1e-3


@pytest.mark.parametrize(("vocabulary", "bytes_per_index"), [(50, 2), (65_536, 2), (65_537, 4)])
def test_bytes_per_token_are_measured_and_small_vocabularies_take_two(vocabulary: int, bytes_per_index: int) -> None:
    files = Files()
    with TokenTargetsWriter(
        files.__setitem__, teacher_digest="t", members=[0], vocabulary=vocabulary, k=16
    ) as writer:
        logits = torch.zeros(1, 300, vocabulary)
        logits[:, :, -16:] = torch.arange(16.0, 0.0, -1.0)
        writer.add("a", "h", logits)
    targets = TokenTargets(files.read)
    plain = 16 * (bytes_per_index + 2) + 2
    shards = sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))
    assert targets.bytes_per_token == shards / 300 and plain <= targets.bytes_per_token < plain + 2
    found, _ = targets.gather(["a"])
    assert found.index_PK[7].tolist() == list(range(vocabulary - 16, vocabulary))  # the largest numbers survive


def test_memory_is_bounded_by_a_shard_and_one_example() -> None:
    files, taken = Files(), []

    def members(example: int) -> object:
        for member in range(3):  # a generator: members' logits never exist all at once
            taken.append((example, member))
            yield torch.zeros(10, 50)

    with TokenTargetsWriter(
        files.__setitem__, teacher_digest="t", members=[0, 1, 2], vocabulary=50, k=4, shard_positions=64
    ) as writer:
        for example in range(200):
            writer.add(str(example), "h", members(example))  # type: ignore[arg-type]
    assert writer.positions == 2000 and writer.most_buffered < 64 + 10 and len(taken) == 600
    assert len(files) == math.ceil(200 / 7) + 1
    targets = TokenTargets(files.read, cache_bytes=3 * len(files["tokens-00000.safetensors"]))
    for example in range(200):
        targets.gather([str(example)])
    assert len(targets._cache) <= 3


def test_a_batch_reads_each_shard_once_and_the_cache_saves_the_next_reading() -> None:
    files = Files()
    write(files, WORDS, shard_positions=10)
    reads: list[str] = []

    def read(name: str) -> bytes:
        reads.append(name)
        return files.read(name)

    small, large = TokenTargets(read, cache_bytes=1), TokenTargets(read)
    reads.clear()
    small.gather(["a", "g", "a", "g", "a"])
    assert len(reads) == 2
    reads.clear()
    large.gather(WORDS)
    large.gather(WORDS)
    assert len(reads) == len(set(reads)) == len(files) - 1


def test_streams_of_several_workers_are_read_as_one() -> None:
    files = Files()
    write(files, WORDS[:3], prefix="worker-0")
    write(files, WORDS[3:], prefix="worker-1")
    both = TokenTargets(files.read, ["worker-0", "worker-1"])
    assert both.keys.ids == tuple(WORDS) and both.positions == sum(range(3, 10))
    found, _ = both.gather(["g", "a"])
    assert torch.equal(found.index_PK, concatenate([exact_of("g"), exact_of("a")]).index_PK)
    with pytest.raises(DataError, match="more than once: 'a', 'b', 'c'"):
        TokenTargets(files.read, ["worker-0", "worker-0"])
    write(files, WORDS[3:], prefix="other", teacher_digest="u")
    with pytest.raises(DataError, match=r"differ in teacher_digest: \['t', 'u'\]"):
        TokenTargets(files.read, ["worker-0", "other"])


def test_a_broken_off_stream_is_no_targets() -> None:
    files = Files()
    with pytest.raises(KeyboardInterrupt), TokenTargetsWriter(
        files.__setitem__, teacher_digest="t", members=[0, 1], vocabulary=50, k=8, shard_positions=1
    ) as writer:
        writer.add("a", "h", logits_of("a"))
        raise KeyboardInterrupt
    assert list(files) == ["tokens-00000.safetensors"]
    with pytest.raises(StoreError, match=r"tokens\.json is missing") as caught:
        TokenTargets(files.read)
    assert "not complete" in caught.value.hint


def test_what_does_not_fit_is_refused_when_written() -> None:
    files = Files()
    writer = TokenTargetsWriter(files.__setitem__, teacher_digest="t", members=[0], vocabulary=50, k=80)
    assert writer.k == 50
    with pytest.raises(DataError, match="no example has targets"):
        writer.close()
    writer.add("a", "h", torch.zeros(1, 2, 50))
    with pytest.raises(DataError, match="'a' was added before"):
        writer.add("a", "h", torch.zeros(1, 2, 50))
    with pytest.raises(DataError, match="logits over 49 tokens"):
        writer.add("b", "h", torch.zeros(1, 2, 49))
    with pytest.raises(DataError, match="not a number"):
        writer.add("b", "h", torch.full((1, 2, 50), math.nan))
    with pytest.raises(DataError, match="0 positions"):
        writer.add("b", "h", torch.zeros(1, 0, 50))


def test_what_does_not_fit_is_refused_when_read() -> None:
    files = Files()
    write(files, WORDS)
    targets = TokenTargets(files.read)
    contents = {word: content_hash(word) for word in WORDS}
    fits: dict = {"teacher_digest": "t", "vocabulary": 50, "temperature": 1.0, "content_hash_of": contents}
    targets.check(**fits)
    for changed, message in (
        ({"teacher_digest": "u"}, "teacher: the targets have 't', the student asks for 'u'"),
        ({"vocabulary": 51}, "vocabulary: the targets have 50, the student asks for 51"),
        ({"temperature": 2.0}, "temperature: the targets have 1.0"),
        ({"content_hash_of": {**contents, "z": "h"}}, "no targets for 1 of 8 examples: 'z'"),
        ({"content_hash_of": {**contents, "b": "h"}}, "not what the teacher read under their ids: 'b'"),
    ):
        with pytest.raises(DataError, match=message):
            targets.check(**{**fits, **changed})
    with pytest.raises(DataError, match="no targets for 1 of 2 examples: 'z'"):
        targets.gather(["a", "z"])
    with pytest.raises(DataError, match="under their ids: 'a'"):
        targets.gather(["a"], ["h"])
    with pytest.raises(DataError, match="no ids"):
        targets.gather([])


def test_damaged_and_missing_files_are_refused() -> None:
    files = Files()
    write(files, WORDS)
    shard = "tokens-00000.safetensors"
    for content in (files[shard][:-1], bytes([files[shard][0] ^ 1]) + files[shard][1:], b""):
        with pytest.raises(StoreError, match=f"{shard} is damaged: its checksum differs"):
            TokenTargets(Files({**files, shard: content}).read).gather(["a"])
    with pytest.raises(StoreError, match=f"{shard} is missing"):
        TokenTargets(Files({"tokens.json": files["tokens.json"]}).read).gather(["a"])
    with pytest.raises(StoreError, match=r"tokens\.json is damaged"):
        TokenTargets(Files({**files, "tokens.json": b"{"}).read)
    facts = json.loads(files["tokens.json"])
    del facts["shards"]
    with pytest.raises(StoreError, match="damaged: no 'shards'"):
        TokenTargets(Files({**files, "tokens.json": json.dumps(facts).encode()}).read)
