"""Ensembles that write: against transformers' own loop, against a slow reference in float64, and against themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from run_helpers import run

from raylora.adapters.packed import make_pack, stack
from raylora.data.task import Example
from raylora.engine.generation import reading
from raylora.engine.generation.generator import Generator, sampling
from raylora.engine.generation.mixture import draw, mix, uniforms
from raylora.engine.training.predict import predict
from raylora.ensemble.answer_metrics import normalized
from raylora.ensemble.uncertainty import entropy
from raylora.errors import DataError, UsageError
from raylora.serve.predictor import load_ensemble
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
KINDS = ["llama", "gpt2", "gemma3"]
PROMPTS = ["Where is the ball?", "A much longer question about many things, and what follows from them: why?", "Hi"]


@pytest.fixture
def make_writer(make_parts: Make, tiny_model: Callable[[str], str]) -> Make:
    """Return a function from an architecture to its parts and some trained members on chats."""
    def make(kind: str = "llama", members: int = 3, noise: float = 0.3, **changes: Any) -> Any:
        parts = make_parts(**{
            "base__source": tiny_model(kind), "adapter__target_modules": "all-linear",
            "task": {"kind": "instruction", "max_length": 112}, "evaluation__out_of_distribution": {},
            "data": {"train": {"source": "pypi:soc-codes"}, "train_rows": 4, "validation_rows": 2, "test_rows": 2},
            "ensemble__members": members, **changes,
        })
        return parts, [parts.member(unit, trained=noise) for unit in parts.units]

    return make


def generator(parts: Any, members: list[Any], rule: str = "mean_probabilities") -> Generator:
    return Generator(parts.model, stack(members), rule)


def ids_of(answers: list[list[Any]]) -> list[list[int]]:
    return [[token.id for token in one.tokens] for group in answers for one in group]


def settings(**changes: Any) -> Any:
    usual = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": 0, "each_member": False}
    return sampling(**{**usual, **changes})


# --- against others --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_identical_members_write_what_transformers_writes(
    kind: str, make_writer: Make, tiny_model: Callable[[str], str]
) -> None:
    parts, members = make_writer(kind, noise=0.0)  # LoRA starts as the base itself
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(kind), attn_implementation="eager")
    found = list(generator(parts, members).answers(PROMPTS, settings(max_new_tokens=20)))
    for prompt, (answer,) in zip(PROMPTS, found, strict=True):
        asked = parts.task.prompt({"prompt": prompt}, parts.base.tokenizer)
        expected = model.generate(
            torch.tensor([asked]), max_new_tokens=20, do_sample=False, pad_token_id=parts.base.tokenizer.pad_token_id,
            eos_token_id=parts.task.ends(parts.base.tokenizer),
        )[0, len(asked) :]
        assert [token.id for token in answer.tokens] == expected.tolist()


def alone(parts: Any, member: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Return one member's next-token log-probabilities after these tokens, float64, without a cache."""
    example = Example("x", (tuple(ids),), None, (1,))
    batch = parts.task.collate([example], parts.base.tokenizer)
    pack = make_pack(parts.adapter, parts.base.sites, stack([member]))
    with torch.no_grad(), parts.base.slot.use(pack):
        logits = parts.base.model(**batch.model_inputs(), use_cache=False).logits
    return torch.log_softmax(logits[0, -1].double(), dim=-1)


def reference(parts: Any, members: list[Any], prompt: list[int], tokens: int) -> list[tuple[int, float, float, float]]:
    """Write greedily, every member by itself and without a cache: token, log-probability, entropy, disagreement."""
    ids, found = list(prompt), []
    for _ in range(tokens):
        logp_MV = torch.stack([alone(parts, member, ids) for member in members])
        p_V = logp_MV.exp().mean(dim=0)
        token = int(p_V.argmax())
        entropies = [float(-(logp_V.exp() * logp_V).sum()) for logp_V in (p_V.log(), *logp_MV)]
        found.append((token, math.log(p_V[token]), entropies[0], entropies[0] - sum(entropies[1:]) / len(members)))
        ids.append(token)
        if token in parts.task.ends(parts.base.tokenizer):
            break
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_different_members_equal_a_slow_reference(kind: str, make_writer: Make) -> None:
    parts, members = make_writer(kind)
    found = list(generator(parts, members).answers(PROMPTS, settings()))
    disagreed = 0.0
    for prompt, (answer,) in zip(PROMPTS, found, strict=True):
        expected = reference(parts, members, parts.task.prompt({"prompt": prompt}, parts.base.tokenizer), 12)
        assert [token.id for token in answer.tokens] == [token for token, *_ in expected]
        for token, (_, logprob, uncertainty, shared) in zip(answer.tokens, expected, strict=True):
            assert token.logprob == pytest.approx(logprob, abs=1e-4)
            assert token.entropy == pytest.approx(uncertainty, abs=1e-4)
            assert token.mutual_information == pytest.approx(shared, abs=1e-4)
            disagreed += shared
    assert disagreed > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_each_member_writes_what_it_would_alone(kind: str, make_writer: Make) -> None:
    parts, members = make_writer(kind)
    together = list(generator(parts, members).answers(PROMPTS, settings(each_member=True)))
    assert [[one.member for one in answers] for answers in together] == [[0, 1, 2]] * len(PROMPTS)
    for number, member in enumerate(members):
        own = list(generator(parts, [member]).answers(PROMPTS, settings()))
        assert ids_of(own) == [[t.id for t in answers[number].tokens] for answers in together]
        assert together[0][number].tokens[0].mutual_information is None


def test_members_that_are_whole_models_write_too(make_writer: Make, make_parts: Make) -> None:
    parts, members = make_writer(noise=0.05, adapter={"kind": "full"})
    found = list(generator(parts, members).answers(PROMPTS[:2], settings(max_new_tokens=6)))
    each = [list(generator(parts, [member]).answers(PROMPTS[:2], settings(max_new_tokens=1))) for member in members]
    for row in range(2):
        first = [own[row][0].tokens[0] for own in each]
        assert found[row][0].tokens[0].entropy >= sum(token.entropy for token in first) / len(first) - 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_two_ways_to_answer_share_the_prompts_and_nothing_else(
    kind: str, make_writer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, members = make_writer(kind)
    ask, task = generator(parts, members), parts.task
    asked = [task.prompt({"prompt": prompt}, parts.base.tokenizer) for prompt in PROMPTS]
    ways = [settings(), settings(each_member=True, max_new_tokens=5), settings(temperature=1.3, seed=4)]
    apart = [ask.written(asked, PROMPTS, way) for way in ways]
    read: list[int] = []
    real = reading.pass_lanes

    def counted(base: Any, lanes: Any, inputs: Any, keep: int) -> torch.Tensor:
        read.append(inputs["input_ids"].shape[1])
        return real(base, lanes, inputs, keep)

    monkeypatch.setattr(reading, "pass_lanes", counted)
    assert ask.voices(asked, PROMPTS, ways) == apart  # to the last bit
    assert sum(length > 1 for length in read) == 1 and len(read) > 20


# --- against itself --------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_does_not_depend_on_its_neighbors(temperature: float, make_writer: Make) -> None:
    parts, members = make_writer("gemma3")
    ask = generator(parts, members)
    rows = [{"id": f"row-{n}", "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
    how = settings(temperature=temperature, seed=3)
    together = ids_of(list(ask.answers(rows, how)))
    assert together == ids_of(list(ask.answers(rows, how, batch=1)))
    assert together[::-1] == ids_of(list(ask.answers(rows[::-1], how, batch=2)))
    if temperature:
        assert together != ids_of(list(ask.answers(rows, settings(temperature=temperature, seed=4))))


def test_given_answers_score_as_in_an_evaluation(make_writer: Make) -> None:
    parts, members = make_writer()
    ask = generator(parts, members)
    said = ("a", "b c", "d e f")
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(PROMPTS, said, strict=True)]
    examples = [parts.task.tokenize(row, str(n), parts.base.tokenizer)[0] for n, row in enumerate(rows)]
    values_MP, ids = predict(parts.model, stack(members), examples, 8)
    for number, answer in enumerate(ask.score(rows)):
        own_MP = values_MP[:, [one == str(number) for one in ids]].double()
        logp_P = own_MP.logsumexp(0) - math.log(len(members))
        assert answer.text == rows[number]["completion"] and answer.finish == "given"
        assert [token.logprob for token in answer.tokens] == pytest.approx(logp_P.tolist(), abs=1e-4)
        whole = math.log(len(members)) - float(own_MP.sum(dim=1).logsumexp(0))
        assert answer.sequencewise_nll == pytest.approx(whole, abs=1e-4)


def test_a_stream_says_what_the_answer_says(make_writer: Make) -> None:
    parts, members = make_writer()
    ask = generator(parts, members)
    (whole,) = next(iter(ask.answers(PROMPTS[:1], settings(max_new_tokens=30))))
    pieces = list(ask.stream(PROMPTS[0], settings(max_new_tokens=30)))
    assert "".join(piece.text for piece in pieces) == whole.text and len(pieces) >= len(whole.tokens)
    assert tuple(piece.token for piece in pieces[: len(whole.tokens)]) == whole.tokens
    cut = whole.text[len(whole.text) // 3 : len(whole.text) // 3 + 4]
    (short,) = next(iter(ask.answers(PROMPTS[:1], settings(max_new_tokens=30), stop=[cut])))
    assert short.finish == "stop" and short.text == whole.text[: whole.text.index(cut)]
    shown = "".join(piece.text for piece in ask.stream(PROMPTS[0], settings(max_new_tokens=30), stop=[cut]))
    assert shown == short.text  # nothing of a stop string is shown while it comes
    (long,) = next(iter(ask.answers(PROMPTS[:1], settings(max_new_tokens=30), stop=["never to come"])))
    assert long == whole


def test_agreement_is_the_share_of_members_with_the_same_answer(make_writer: Make) -> None:
    parts, members = make_writer()
    same = next(iter(generator(parts, [members[0]] * 3).answers(PROMPTS[:1], settings(), agreement=True)))
    assert same[0].agreement == 1.0
    ask = generator(parts, members)
    for (answer,), own in zip(
        ask.answers(PROMPTS, settings(), agreement=True), ask.answers(PROMPTS, settings(each_member=True)), strict=True
    ):
        assert answer.agreement == sum(normalized(one.text) == normalized(answer.text) for one in own) / 3


# --- what is drawn from ----------------------------------------------------------------------------------
def test_entropy_is_that_of_the_members_and_their_disagreement() -> None:
    logits_MNV = torch.randn(4, 5, 50, generator=torch.Generator().manual_seed(0)) * 3
    mixture = mix(logits_MNV)
    logp_MNV = torch.log_softmax(logits_MNV.double(), dim=-1)
    p_NV = logp_MNV.exp().mean(dim=0)
    torch.testing.assert_close(mixture.logp_NV.double().exp(), p_NV, atol=1e-6, rtol=1e-5)
    of_members_N = entropy(logp_MNV).mean(dim=0)
    sum_N = of_members_N + mixture.mutual_information_N
    torch.testing.assert_close(mixture.entropy_N.double(), sum_N, atol=1e-5, rtol=1e-5)
    by_logits = mix(logits_MNV, "mean_logits")
    torch.testing.assert_close(by_logits.logp_NV, torch.log_softmax(logits_MNV.mean(0), -1))
    torch.testing.assert_close(by_logits.mutual_information_N, mixture.mutual_information_N)
    impossible = mix(torch.tensor([[[0.0, -math.inf, 0.0]]] * 2))
    assert float(impossible.entropy_N) == pytest.approx(math.log(2)) and float(impossible.mutual_information_N) < 1e-6


def test_temperature_and_nucleus_are_the_mixtures() -> None:
    p_V = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    draws = 20_000
    uniform_N = uniforms(7, [str(n) for n in range(draws)], 0)

    def shares(temperature: float, top_p: float) -> list[float]:
        token_N = draw(p_V.log().expand(draws, -1), temperature, top_p, uniform_N)
        return (torch.bincount(token_N, minlength=4) / draws).tolist()

    assert shares(1.0, 1.0) == pytest.approx(p_V.tolist(), abs=0.015)
    assert shares(0.5, 1.0) == pytest.approx((p_V**2 / (p_V**2).sum()).tolist(), abs=0.015)
    assert shares(1.0, 0.6) == pytest.approx([0.5 / 0.8, 0.3 / 0.8, 0, 0], abs=0.015)
    assert shares(1.0, 0.5) == [1, 0, 0, 0] == shares(0.0, 1.0)
    assert torch.equal(uniform_N[:5], uniforms(7, list("01234"), 0)) and not torch.equal(
        uniform_N[:5], uniforms(7, list("01234"), 1))


# --- a run that answers ----------------------------------------------------------------------------------
def test_a_finished_run_answers(make_spec: Make, tiny_model: Callable[[str], str]) -> None:
    spec = make_spec(
        base__source=tiny_model("llama"), adapter__target_modules="auto", evaluation__out_of_distribution={},
        task={"kind": "instruction", "max_length": 112}, optimization={"lr": 0.01, "steps": 2, "micro_batch": 2},
        data={"train": {"source": "pypi:soc-codes"}, "train_rows": 4, "validation_rows": 2, "test_rows": 2},
    )
    run(spec)
    ensemble = load_ensemble(RunStore.for_spec(spec).uri)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (alone,) = ensemble.generate(chat, max_new_tokens=5)
    several = ensemble.generate([chat, "Hi", {"prompt": "Hi", "id": "mine"}], max_new_tokens=5, each_member=True)
    assert len(alone.tokens) <= 5 and [len(answers) for answers in several] == [2, 2, 2]
    assert several[2][0].id == "mine" and several[1][0].text == several[2][0].text
    assert {"nll", "mean_nll", "entropy", "mutual_information", "text", "tokens"} <= alone.record().keys()
    with pytest.raises(UsageError, match="has no classes to predict; ask it with generate"):
        ensemble.predict(["a"])
    bad: list[tuple[Any, str]] = [
        ([], "nothing to answer"), ("  ", "prompt 0: 'prompt' is empty"), (["a " * 5000], "more than the"),
    ]
    for prompts, why in bad:
        with pytest.raises(DataError, match=why):
            ensemble.generate(prompts, max_new_tokens=5)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"stop": [""]}):
        with pytest.raises(UsageError):
            ensemble.generate("a", **wrong)


def test_a_classifier_does_not_write(make_spec: Make, trained: Callable[[Any], str]) -> None:
    with pytest.raises(UsageError, match="has no model that writes"):
        load_ensemble(trained(make_spec())).generate("a")
