"""Classification: labels, pairs, and padding that changes nothing, on an encoder and on a decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from joined_batches import join
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from raylora.data.catalog import assets
from raylora.data.task import BadRow, Batch, pad_id
from raylora.data.tasks.classification import Classification, Spec, build
from raylora.errors import DataError

TEXTS = ["short", "a film of some length that nobody should miss , really", "dull"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(assets.model_folder("minilm-l6"))


def batch_of(task: Classification, tokenizer: Any, texts: list[str]) -> Batch:
    examples = [task.tokenize({"text": text, "label": 0}, str(n), tokenizer)[0] for n, text in enumerate(texts)]
    return task.collate(examples, tokenizer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of 'labels'"),
        ({"labels": ["a", "b"], "num_labels": 2}, "exactly one of 'labels'"),
        ({"labels": ["a"]}, "at least two names"),
        ({"labels": ["a", "a"]}, "all different"),
        ({"num_labels": 1}, "greater than or equal to 2"),
    ],
)
def test_labels_are_declared_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Spec(**fields)


@pytest.mark.parametrize(("label", "index"), [("neg", 0), ("pos", 1), (1, 1), ("1", 1), (True, 1), (0.0, 0)])
def test_labels_by_name_or_index(label: Any, index: int) -> None:
    assert build(Spec(labels=["neg", "pos"])).label({"label": label}) == index


def test_a_name_that_looks_like_an_index_is_a_name() -> None:
    assert build(Spec(labels=["1", "0"])).label({"label": "0"}) == 1


@pytest.mark.parametrize("label", [2, -1, "2", "other", None, "", 0.5, float("nan")])
def test_labels_that_are_no_class(label: Any) -> None:
    with pytest.raises(BadRow):
        build(Spec(labels=["neg", "pos"])).label({"label": label})


def test_model_kwargs_name_the_outputs() -> None:
    kwargs = build(Spec(labels=["neg", "pos"])).model_kwargs()
    assert kwargs["num_labels"] == 2 and kwargs["id2label"] == {0: "neg", 1: "pos"}


def test_pairs_have_token_types_and_lose_tokens_of_the_longer_text(tokenizer: Any) -> None:
    task = build(Spec(num_labels=2, max_length=12))
    row = {"text": "one two", "text_pair": "a b c d e f g h i j k", "label": 1}
    example, truncated = task.tokenize(row, "x", tokenizer)
    assert truncated and len(example.sequences[0]) == 12 and example.label == 1
    assert "one two [SEP]" in tokenizer.decode(list(example.sequences[0]))
    assert example.token_types is not None and set(example.token_types[0]) == {0, 1}


def test_padding_does_not_change_the_logits_of_an_encoder(tokenizer: Any) -> None:
    torch.manual_seed(0)
    task = build(Spec(num_labels=3))
    model = AutoModelForSequenceClassification.from_pretrained(assets.model_folder("minilm-l6"), **task.model_kwargs())
    model.eval()
    single = [batch_of(task, tokenizer, [text]) for text in TEXTS]
    longer = batch_of(task, tokenizer, ["word " * 60])
    with torch.no_grad():
        alone = torch.cat([task.scores(model(**batch.model_inputs()).logits, batch) for batch in single])
        joined = join([*single, longer], pad_id(tokenizer), task.padding_side(is_decoder=False))
        padded = task.scores(model(**joined.model_inputs()).logits, joined)
    assert joined.input_ids_BT.shape == (4, 62) and joined.position_ids_BT is None and len(joined) == 4
    torch.testing.assert_close(padded[:3], alone, atol=1e-5, rtol=1e-5)
    assert task.loss(padded, joined).shape == (4,)


def test_padding_does_not_change_the_logits_of_a_decoder(tokenizer: Any) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder("smollm2-135m"))
    task = build(Spec(num_labels=2))
    tokenizer.padding_side = task.padding_side(is_decoder=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=pad_id(tokenizer), num_labels=2,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    single = [batch_of(task, tokenizer, [text]) for text in TEXTS]
    joined = join(single, pad_id(tokenizer), "left")
    with torch.no_grad():
        alone = torch.cat([model(**batch.model_inputs()).logits for batch in single])
        padded = model(**joined.model_inputs()).logits
    assert joined.position_ids_BT is not None and joined.position_ids_BT[0, -1] == len(TEXTS[0].split()) - 1
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_joining_equals_collating_at_once(tokenizer: Any) -> None:
    task = build(Spec(num_labels=2))
    joined = join([batch_of(task, tokenizer, [text]) for text in TEXTS], pad_id(tokenizer), "right")
    whole = batch_of(task, tokenizer, TEXTS)
    assert torch.equal(joined.input_ids_BT, whole.input_ids_BT)
    assert torch.equal(joined.attention_mask_BT, whole.attention_mask_BT)
    assert joined.token_type_ids_BT is not None and whole.token_type_ids_BT is not None
    assert torch.equal(joined.token_type_ids_BT, whole.token_type_ids_BT)
    assert joined.labels_N is not None and joined.labels_N.dtype == torch.int64


def test_losses_are_per_example_in_float32_and_need_labels(tokenizer: Any) -> None:
    task = build(Spec(num_labels=2))
    batch = batch_of(task, tokenizer, TEXTS)
    scores = task.scores(torch.randn(3, 2, dtype=torch.bfloat16), batch)
    loss = task.loss(scores, batch)
    expected = -torch.log_softmax(scores, -1)[:, 0]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    example, _ = task.tokenize({"text": "x"}, "x", tokenizer)
    with pytest.raises(DataError, match="have no labels"):
        task.loss(scores[:1], task.collate([example], tokenizer))


def test_a_batch_moves_as_a_whole(tokenizer: Any) -> None:
    moved = batch_of(build(Spec(num_labels=2)), tokenizer, TEXTS).to("meta")
    assert all(tensor.device.type == "meta" for tensor in moved.model_inputs().values())
    assert moved.labels_N is not None and moved.labels_N.device.type == "meta" and moved.ids == ["0", "1", "2"]
