"""Multiple choice and language modeling on SmolLM2: scores equal a computation by hand, batched or alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from joined_batches import join
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from raylora.data.catalog import assets
from raylora.data.task import BadRow, Task, pad_id
from raylora.data.tasks import language_modeling as language_modeling
from raylora.data.tasks import multiple_choice
from raylora.errors import DataError

ROWS = [
    {"question": "The capital of France is", "choices": ["Paris", "the city of Rome"], "answer": 0},
    {
        "question": "When it gets colder outside , the water in the lake will",
        "choices": ["boil", "freeze"],
        "answer": 1,
    },
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder("smollm2-135m"))
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    folder = assets.model_folder("smollm2-135m")
    return AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=4).eval()  # the first layers are enough


def scores_of(task: Task, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    batch = task.collate([task.tokenize(row, str(n), tokenizer)[0] for n, row in enumerate(rows)], tokenizer)
    with torch.no_grad():
        return task.scores(model(**batch.model_inputs(), **task.forward_kwargs(batch)).logits, batch)


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)


def test_answer_token_equals_the_letters_logits(model: Any, tokenizer: Any) -> None:
    task = multiple_choice.build(multiple_choice.Spec(options=2))
    prompt = "Question: The capital of France is\nA. Paris\nB. the city of Rome\nAnswer:"
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in (" A", " B")]
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    scores = scores_of(task, model, tokenizer, ROWS)
    torch.testing.assert_close(scores[0], logits[[ids[0] for ids in letters]], atol=1e-4, rtol=1e-5)
    assert [len(ids) for ids in letters] == [1, 1] and scores.shape == (2, 2)


@pytest.mark.parametrize("normalize", ["none", "length"])
def test_option_text_equals_summed_log_probabilities(model: Any, tokenizer: Any, normalize: Any) -> None:
    spec = multiple_choice.Spec(options=2, scoring="option_text", prompt="{question}", normalize=normalize)
    scores = scores_of(multiple_choice.build(spec), model, tokenizer, ROWS)
    for row, row_scores in zip(ROWS, scores, strict=True):
        prompt = tokenizer(row["question"])["input_ids"]
        for choice, score in zip(row["choices"], row_scores, strict=True):
            option = tokenizer(" " + choice, add_special_tokens=False)["input_ids"]
            logp = logprobs(model, prompt + option)
            by_hand = sum(logp[len(prompt) - 1 + n, token] for n, token in enumerate(option))
            by_hand = by_hand / len(option) if normalize == "length" else by_hand
            assert score.item() == pytest.approx(by_hand.item(), abs=1e-3)


@pytest.mark.parametrize("scoring", ["answer_token", "option_text"])
def test_a_row_scores_the_same_alone_batched_and_joined(model: Any, tokenizer: Any, scoring: Any) -> None:
    task = multiple_choice.build(multiple_choice.Spec(options=2, scoring=scoring))
    alone = torch.cat([scores_of(task, model, tokenizer, [row]) for row in ROWS])
    torch.testing.assert_close(scores_of(task, model, tokenizer, ROWS), alone, atol=1e-4, rtol=1e-5)
    batches = [task.collate([task.tokenize(row, "x", tokenizer)[0]], tokenizer) for row in ROWS]
    joined = join(batches, pad_id(tokenizer), "left")
    with torch.no_grad():
        kept = model(**joined.model_inputs(), **task.forward_kwargs(joined)).logits
        every = model(**joined.model_inputs()).logits
    assert kept.shape[1] < every.shape[1]
    torch.testing.assert_close(task.scores(kept, joined), alone, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(task.scores(every, joined), alone, atol=1e-4, rtol=1e-5)
    assert joined.labels_N is not None and joined.labels_N.tolist() == [0, 1]
    assert task.loss(alone, joined).shape == (2,)


@pytest.mark.parametrize("scoring", ["answer_token", "option_text"])
def test_truncation_keeps_the_options_and_the_end_of_the_question(tokenizer: Any, scoring: Any) -> None:
    task = multiple_choice.build(multiple_choice.Spec(options=2, scoring=scoring, max_length=40))
    row = ROWS[0] | {"question": "long " * 100 + "the end is"}
    example, truncated = task.tokenize(row, "x", tokenizer)
    text = tokenizer.decode(list(example.sequences[0]))
    assert truncated and max(map(len, example.sequences)) == 40
    assert text.startswith("Question: long") or text.startswith("Question:long")
    assert "the end is\nA. Paris\nB. the city of Rome\nAnswer:" in text
    for sequence, span, choice in zip(example.sequences, example.spans, row["choices"], strict=False):
        assert tokenizer.decode(list(sequence[span:])) == f" {choice}"
    with pytest.raises(BadRow, match="without its question"):
        short = multiple_choice.Spec(options=2, scoring=scoring, max_length=16)
        multiple_choice.build(short).tokenize(row, "x", tokenizer)


@pytest.mark.parametrize(
    ("answer", "index"), [(1, 1), ("1", 1), ("B", 1), ("b", 1), ("freeze", 1), ("boil", 0), (" A ", 0)]
)
def test_answers_by_index_letter_or_text(answer: Any, index: int) -> None:
    assert multiple_choice.build(multiple_choice.Spec(options=2)).label(ROWS[1] | {"answer": answer}) == index


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"answer": 2}, "answer 2 is not one index"),
        ({"answer": "C"}, "answer 'C' is not one index"),
        ({"answer": None}, "answer None is not one index"),
        ({"choices": ["B", "A"], "answer": "A"}, "answer 'A' is not one index"),  # the letter or the text?
        ({"choices": ["x", "x"], "answer": "x"}, "answer 'x' is not one index"),
        ({"choices": ["x"]}, "1 choices, but task.options is 2"),
        ({"choices": "ab"}, "'choices' is not a list"),
        ({"choices": None}, "no 'choices'"),
        ({"choices": ["x", " "]}, "a choice is empty"),
        ({"question": " "}, "'question' is empty"),
    ],
)
def test_bad_rows(tokenizer: Any, change: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRow, match=why):
        multiple_choice.build(multiple_choice.Spec(options=2)).tokenize(ROWS[0] | change, "x", tokenizer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "{options} Answer:"}, "must hold {question} once"),
        ({"prompt": "{question} {context} {options}"}, "no fields but"),
        ({"prompt": "{question} Answer:"}, "needs {options}"),
        ({"normalize": "length"}, "for scoring: option_text only"),
    ],
)
def test_prompts_that_cannot_work(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        multiple_choice.Spec(options=2, **fields)


def test_braces_in_a_question_stay_text(tokenizer: Any) -> None:
    row = ROWS[0] | {"question": "What is {options} or {0}?"}
    example, _ = multiple_choice.build(multiple_choice.Spec(options=2)).tokenize(row, "x", tokenizer)
    assert "What is {options} or {0}?\nA. Paris" in tokenizer.decode(list(example.sequences[0]))


def test_letters_that_are_no_distinct_tokens_are_refused(tokenizer: Any) -> None:
    multiple_choice.build(multiple_choice.Spec(options=26)).check(tokenizer)
    glued = multiple_choice.Spec(options=2, prompt="{question}\n{options}\nAnswer=\t")
    task = multiple_choice.build(glued)

    class Merging:
        """A tokenizer that makes one token of a whole text."""

        model_max_length = 512

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

    with pytest.raises(DataError, match="does not write the answer 'A' as one token"):
        task.check(Merging())  # type: ignore[arg-type]


def test_blocks_hold_every_token_and_loss_is_their_mean_nll(model: Any, tokenizer: Any) -> None:
    task = language_modeling.build(language_modeling.Spec(max_length=8))
    text = "The quick brown fox jumps over the lazy dog, and then it sleeps."
    ids = tokenizer(text)["input_ids"]
    example, truncated = task.tokenize({"text": text}, "row", tokenizer)
    blocks = task.blocks(example)
    assert not truncated and [block.id for block in blocks] == ["row#0", "row#1"]
    assert [token for block in blocks for token in block.sequences[0]] == ids
    batch = task.collate(blocks, tokenizer)
    with torch.no_grad():
        logits = model(**batch.model_inputs(), **task.forward_kwargs(batch)).logits
    logp, mask = task.token_logprobs(logits, batch)
    loss = task.loss(task.scores(logits, batch), batch)
    for row, block in enumerate(blocks):
        tokens = list(block.sequences[0])
        by_hand = logprobs(model, tokens)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].float()
        torch.testing.assert_close(logp[row][mask[row]], by_hand, atol=1e-4, rtol=1e-4)
        assert loss[row].item() == pytest.approx(-by_hand.mean().item(), abs=1e-4)
    assert logp.shape == mask.shape == batch.input_ids_BT.shape and not logp[~mask].any()


def test_a_single_token_is_no_text_to_model(tokenizer: Any) -> None:
    with pytest.raises(BadRow, match="nothing to predict"):
        language_modeling.build(language_modeling.Spec()).tokenize({"text": "a"}, "x", tokenizer)


@pytest.mark.slow
def test_the_converted_language_model_is_whole(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets.model_folder("smollm2-135m")).eval()
    ids = tokenizer("The capital of France is")["input_ids"]
    assert tokenizer.decode(logprobs(model, ids)[-1].argmax()) == " Paris"
