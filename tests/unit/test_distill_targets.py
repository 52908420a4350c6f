"""Classification and regression targets: by id, never by position; what does not fit is refused by name."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from torch import Tensor

from raylora.distill import ClassificationTargets, Keys, RegressionTargets, content_hash, merge
from raylora.errors import DataError, StoreError

LABELS = ["negative", "neutral", "positive"]
IDS = [f"row-{n}" for n in range(20)]


def hashes(ids: list[str]) -> list[str]:
    return [content_hash(f"text of {example_id}") for example_id in ids]


def logits_of(ids: list[str], members: list[int]) -> Tensor:
    """Return logits that depend on the id and the member alone."""
    def one(example_id: str, member: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * member + int(example_id.partition("-")[2]))
        return 4 * torch.randn(3, generator=generator)
    return torch.stack([torch.stack([one(i, m) for m in members]) for i in ids])


def made(ids: list[str] = IDS, members: list[int] | None = None, **changed: object) -> ClassificationTargets:
    members = members or [0, 1]
    facts: dict = {"teacher_digest": "teacher-a", "members": members, "label_names": LABELS, **changed}
    return ClassificationTargets.from_outputs(Keys(ids, hashes(ids)), logits_of(ids, members), **facts)


def regression(ids: list[str] = IDS, members: tuple[int, ...] = (0, 1)) -> RegressionTargets:
    values_NM = logits_of(ids, list(members))[:, :, 0]
    return RegressionTargets.from_outputs(Keys(ids, hashes(ids)), values_NM, teacher_digest="t", members=members)


def same(a: ClassificationTargets, b: ClassificationTargets) -> bool:
    return a.keys.ids == b.keys.ids and torch.equal(a.values, b.values) and a.members == b.members


def test_shuffling_the_transfer_set_changes_nothing_that_is_returned_for_an_id() -> None:
    shuffled = random.Random(0).sample(IDS, len(IDS))
    straight, mixed = made(IDS), made(shuffled)
    assert not torch.equal(straight.values, mixed.values)
    for batch in (["row-3"], ["row-7", "row-0", "row-7"], shuffled):
        wanted_BMC = logits_of(batch, [0, 1])
        assert torch.equal(straight.gather(batch), mixed.gather(batch, hashes(batch)))
        assert torch.allclose(straight.gather(batch), wanted_BMC, rtol=1e-3)
    assert straight.gather(["row-3"]).dtype == torch.float32


def test_files_hold_everything_and_no_pickle() -> None:
    targets = made()
    files = targets.to_files()
    back = ClassificationTargets.from_files(files)
    assert same(back, targets) and back.label_names == tuple(LABELS) and back.teacher_digest == "teacher-a"
    assert back.keys.content_hashes == targets.keys.content_hashes and back.rounding_error == targets.rounding_error
    assert files.keys() == {"targets.safetensors", "targets.json"}
    assert json.loads(files["targets.json"])["format"] == 1
    assert len(files["targets.safetensors"]) < 20 * 2 * 3 * 2 + 200  # two bytes a logit and a header


def test_float16_error_is_measured_and_within_its_bound() -> None:
    logits_NMC = logits_of(IDS, [0, 1])
    targets = made()
    error_NMC = (targets.gather(IDS) - logits_NMC).abs()
    assert targets.rounding_error == pytest.approx(error_NMC.max().item()) and targets.rounding_error > 0
    assert (error_NMC <= logits_NMC.abs() / 2048 + 2**-25).all()
    before, after = torch.softmax(logits_NMC, -1), torch.softmax(targets.gather(IDS), -1)
    assert (before - after).abs().max() < 2e-3


def test_logits_beyond_float16_are_clipped_and_the_error_says_so() -> None:
    logits_NMC = torch.tensor([[[1e6, -math.inf, 0.0]]])
    targets = ClassificationTargets.from_outputs(
        Keys(["a"], ["h"]), logits_NMC, teacher_digest="t", members=[0], label_names=LABELS
    )
    assert targets.gather(["a"]).flatten().tolist() == [65504.0, -65504.0, 0.0]
    assert targets.rounding_error == pytest.approx(1e6 - 65504)


def test_a_member_that_predicts_nan_is_named() -> None:
    logits_NMC = logits_of(IDS, [4, 7])
    logits_NMC[3, 1, 0] = math.nan
    with pytest.raises(DataError, match=r"members \[7\] predict NaN"):
        ClassificationTargets.from_outputs(
            Keys(IDS, hashes(IDS)), logits_NMC, teacher_digest="t", members=[4, 7], label_names=LABELS
        )


def test_ids_that_the_teacher_has_not_seen_are_listed() -> None:
    with pytest.raises(DataError, match=r"no targets for 2 of 3 examples: 'other-1', 'other-2'") as caught:
        made().gather(["other-1", "row-1", "other-2"])
    assert "make targets for this data set" in caught.value.hint


def test_other_content_under_a_known_id_is_refused() -> None:
    contents = dict(zip(IDS, hashes(IDS), strict=True))
    made().keys.check(contents)
    contents["row-4"] = content_hash("another text")
    with pytest.raises(DataError, match="1 of 20 examples are not what the teacher read under their ids: 'row-4'"):
        made().check(teacher_digest="teacher-a", label_names=LABELS, content_hash_of=contents)
    with pytest.raises(DataError, match="'row-4'"):
        made().gather(["row-1", "row-4"], [contents["row-1"], contents["row-4"]])


def test_another_teacher_and_other_labels_are_refused_showing_both() -> None:
    contents = dict(zip(IDS, hashes(IDS), strict=True))
    made().check(teacher_digest="teacher-a", label_names=LABELS, content_hash_of=contents)
    with pytest.raises(DataError, match="'teacher-a', the student asks for 'teacher-b'"):
        made().check(teacher_digest="teacher-b", label_names=LABELS, content_hash_of=contents)
    both = "have 'negative', 'neutral', 'positive', the student asks for 'positive', 'neutral', 'negative'"
    with pytest.raises(DataError, match=both):
        made().check(teacher_digest="teacher-a", label_names=LABELS[::-1], content_hash_of=contents)


def test_keys_refuse_an_id_given_twice_and_a_missing_hash() -> None:
    with pytest.raises(DataError, match="more than once: 'a'"):
        Keys(["a", "b", "a"], ["1", "2", "3"])
    with pytest.raises(DataError, match="1 content hashes for 2 ids"):
        Keys(["a", "b"], ["1"])
    assert content_hash("x") == content_hash("x") != content_hash("y")
    assert content_hash("x") == "4adf4367f96e584f", "stored targets would no longer fit their data"


def test_shards_of_rows_merge_in_any_order_and_only_once() -> None:
    parts = [made(IDS[start::3]) for start in range(3)]
    for order in ([0, 1, 2], [2, 0, 1]):
        whole = merge([parts[n] for n in order])
        assert torch.equal(whole.gather(IDS), made().gather(IDS)) and whole.rounding_error == made().rounding_error
    with pytest.raises(DataError, match="more than once: 'row-0'"):
        merge([parts[0], parts[0]])
    with pytest.raises(DataError, match=r"differ in members: \(0, 1\) and \(2, 3\)"):
        merge([parts[0], made(IDS[1::3], [2, 3])])
    with pytest.raises(DataError, match="differ in teacher_digest: 'teacher-a' and 'teacher-b'"):
        merge([parts[0], made(IDS[1::3], teacher_digest="teacher-b")])
    with pytest.raises(DataError, match="differ in label_names"):
        merge([parts[0], made(IDS[1::3], label_names=["a", "b", "c"])])


def test_regression_values_are_kept_as_they_are() -> None:
    targets = regression()
    back = RegressionTargets.from_files(targets.to_files())
    assert back.gather(["row-5", "row-2"]).shape == (2, 2) and back.rounding_error == 0
    assert torch.equal(back.gather(IDS), logits_of(IDS, [0, 1])[:, :, 0])
    assert torch.equal(merge([regression(IDS[:5]), regression(IDS[5:])]).gather(IDS), back.gather(IDS))
    with pytest.raises(DataError, match=r"members \[0\] predict NaN or, for a regression, infinity"):
        RegressionTargets.from_outputs(Keys(["a"], ["h"]), torch.tensor([[math.inf]]), teacher_digest="t", members=[0])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"shape \(20, 2, 3\)") as caught:
        made(label_names=["no", "yes"])
    assert "(20, 2, 2)" in caught.value.hint
    with pytest.raises(DataError, match=r"members \[1, 0\]"):
        made(members=[1, 0])
    with pytest.raises(DataError, match="at least one shard"):
        merge([])


def test_damaged_missing_and_foreign_files_are_refused() -> None:
    files = made().to_files()
    tensors = files["targets.safetensors"]
    flipped = tensors[:-1] + bytes([tensors[-1] ^ 1])
    with pytest.raises(StoreError, match="checksum differs") as caught:
        ClassificationTargets.from_files({**files, "targets.safetensors": flipped})
    assert "make them again" in caught.value.hint
    for name in files:
        with pytest.raises(StoreError, match=f"{name} is missing"):
            ClassificationTargets.from_files({n: c for n, c in files.items() if n != name})
    with pytest.raises(StoreError, match=r"targets\.json is damaged"):
        ClassificationTargets.from_files({**files, "targets.json": files["targets.json"][:-30]})
    facts = json.loads(files["targets.json"])
    for changed in ({"ids": facts["ids"][1:]}, {"ids": ["row-1"] * 20}, {"members": [0]}, {"members": None}):
        with pytest.raises(StoreError, match="do not fit together"):
            ClassificationTargets.from_files({**files, "targets.json": json.dumps({**facts, **changed}).encode()})
    with pytest.raises(StoreError, match="of format 9"):
        ClassificationTargets.from_files({**files, "targets.json": json.dumps({**facts, "format": 9}).encode()})
    with pytest.raises(StoreError, match="holds classes targets of format 1, not value"):
        RegressionTargets.from_files(files)
