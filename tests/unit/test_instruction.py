"""Instruction tuning: which tokens count, what a row's loss is, and whole runs on chats."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from run_helpers import assert_bit_equal, members, run, stop_at
from typer.testing import CliRunner

from raylora.adapters.packed import stack
from raylora.cli import app
from raylora.data.sets import load_sets
from raylora.data.task import BadRow, LeftOut, collate_pack
from raylora.data.tasks import instruction
from raylora.data.tokenized import pack_sets, unpack_sets
from raylora.engine.distillation.compare import compare
from raylora.engine.distillation.plan import prepare_distillation
from raylora.engine.model.checkpoint import load_tokenizer
from raylora.engine.model.serialization import unpack_predictions
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.distillation_loss import load_targets
from raylora.engine.training.predict import predict
from raylora.errors import DataError, Interrupted
from raylora.spec import DistillSpec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
LONG = "".join(f"Fact {n} of many. " for n in range(60))


def chats(folder: Path, rows: int = 24) -> str:
    """Write chats of one and of two answers and prompts with completions, and return the file."""
    lines: list[dict[str, Any]] = []
    for n in range(rows):
        asked = [{"role": "user", "content": f"What is {n} plus {n % 5}?"}]
        answer = {"role": "assistant", "content": f"{n + n % 5}"}
        later = {"role": "assistant", "content": f"{n + n % 5 + 1}, {n}!"}
        more = [{"role": "user", "content": "And one more?"}, later]
        lines.append({"messages": [*asked, answer, *(more if n % 3 == 0 else [])]})
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def on_chats(tiny_model: Callable[[str], str], tmp_path: Path) -> dict[str, Any]:
    """Return what makes the small spec one of a tiny Llama on chats."""
    return {
        "base__source": tiny_model("llama"), "adapter__target_modules": "auto",
        "task": {"kind": "instruction", "max_length": 112}, "evaluation__out_of_distribution": {},
        "data": {"train": {"files": chats(tmp_path)}, "validation_rows": 4, "test_rows": 6},
        "optimization": {"lr": 0.01, "steps": 4, "micro_batch": 4, "warmup": 0.0},
    }


@pytest.fixture
def chat_spec(make_spec: Make, on_chats: dict[str, Any]) -> Make:
    """Return a function from changes to such a spec."""
    return lambda **changes: make_spec(**{**on_chats, **changes})


@pytest.fixture
def chat_parts(make_parts: Make, on_chats: dict[str, Any]) -> Make:
    """Return a function from changes to the loaded parts of such a spec."""
    return lambda **changes: make_parts(**{**on_chats, **changes})


def tokenize(tokenizer: Any, row: dict[str, Any], **settings: Any) -> Any:
    return instruction.build(instruction.Spec(**settings)).tokenize(row, "x", tokenizer)


# --- rows ------------------------------------------------------------------------------------------------
def test_long_prompts_lose_their_oldest_turns_and_then_their_beginning(chat_spec: Make) -> None:
    spec = chat_spec()
    tokenizer = load_tokenizer(spec.base, instruction.build(spec.task))
    row = {"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "An old question"},
        {"role": "assistant", "content": "An old answer"}, {"role": "user", "content": LONG + "And so?"},
        {"role": "assistant", "content": "The whole answer stays."},
    ]}
    with pytest.raises(BadRow, match=r"\d+ tokens, more than task.max_length 64: raise it, or set task.on_too_long"):
        tokenize(tokenizer, row, max_length=64)
    with pytest.raises(LeftOut):
        tokenize(tokenizer, row, max_length=64, on_too_long="skip")
    example, is_cut = tokenize(tokenizer, row, max_length=64, on_too_long="truncate_prompt")
    text = tokenizer.decode(list(example.sequences[0]))
    assert is_cut and len(example.sequences[0]) <= 64 and "old" not in text
    assert "<|im_start|>system\nBe brief.<|im_end|>" in text and "And so?<|im_end|>" in text
    ((first, last),) = example.target_ranges
    assert tokenizer.decode(list(example.sequences[0][first:last])) == "The whole answer stays.<|im_end|>"
    long_answer = {"prompt": "a", "completion": LONG}
    with pytest.raises(BadRow, match="its answer and template alone need more than task.max_length 64"):
        tokenize(tokenizer, long_answer, max_length=64, on_too_long="truncate_prompt")


def test_a_question_is_a_row_up_to_its_answer(chat_spec: Make) -> None:
    spec = chat_spec()
    task = instruction.build(instruction.Spec(max_length=64, on_too_long="truncate_prompt"))
    tokenizer = load_tokenizer(spec.base, task)
    asked = {"role": "user", "content": "What is 2 plus 2?"}
    chat = [asked, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And one more?"}]
    answer = {"role": "assistant", "content": "5"}
    whole, _ = task.tokenize({"messages": [*chat, answer]}, "x", tokenizer)
    for row in ({"messages": chat}, {"messages": [*chat, answer]}):
        alone, is_cut = task.question(row, "x", tokenizer)
        assert alone.sequences[0] == whole.sequences[0][: whole.target_ranges[-1][0]] and not is_cut
        assert alone.target_ranges == () and task.asked(row) == task.content({"messages": [*chat, answer]})
    for content in (LONG, "Anne. " + LONG):
        long = {"messages": [*chat[:2], {"role": "user", "content": f"{content} Why?"}]}
        alone, is_cut = task.question(long, "x", tokenizer)
        assert is_cut and len(alone.sequences[0]) <= 64
        said = tokenizer.decode(list(alone.sequences[0]))
        assert "Why?" in said and "2 plus 2" not in said
    for rule, error in (("error", BadRow), ("skip", LeftOut)):
        with pytest.raises(error, match="more than task.max_length 64"):
            instruction.build(instruction.Spec(max_length=64, on_too_long=rule)).question(long, "x", tokenizer)


def test_rows_that_only_ask_may_stand_in_a_foreign_set_alone(chat_spec: Make, tmp_path: Path) -> None:
    asks, mixed = tmp_path / "asks.jsonl", tmp_path / "mixed.jsonl"
    asks.write_text("".join(json.dumps({"prompt": f"Why is {n} odd?"}) + "\n" for n in (1, 3, 3, 5)))
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    mixed.write_text("".join(json.dumps({"messages": chat[:n]}) + "\n" for n in (1, 2)))
    spec = chat_spec(evaluation__out_of_distribution={"asks": {"files": str(asks)}, "mixed": {"files": str(mixed)}})
    task = instruction.build(spec.task)
    sets = load_sets(spec.data, spec.evaluation, task, load_tokenizer(spec.base, task))
    found = sets.out_of_distribution
    assert {name: (len(one.examples), one.only_asks) for name, one in found.items()} == {
        "asks": (3, True), "mixed": (1, True)  # what is asked twice counts once
    }
    assert "3 prompts without answers" in found["asks"].describe([]) and not sets.test.only_asks
    assert unpack_sets(pack_sets(sets)) == sets
    own = chat_spec(evaluation__out_of_distribution={}, data__test={"files": str(asks)})
    with pytest.raises(DataError, match="has no column 'completion'"):
        load_sets(own.data, own.evaluation, task, load_tokenizer(own.base, task))


def test_sets_say_what_was_cut_and_left_out(chat_spec: Make, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": f"{LONG} {n}?" if n % 4 == 0 else f"{n}?", "completion": f"{n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": {"files": str(path)}, "validation_rows": 8, "test_rows": 8}

    def sets_of(rule: str) -> Any:
        spec = chat_spec(data=data, task={"kind": "instruction", "max_length": 64, "on_too_long": rule})
        task = instruction.build(spec.task)
        return load_sets(spec.data, spec.evaluation, task, load_tokenizer(spec.base, task))

    with pytest.raises(DataError, match=r"long.jsonl:\d+: \d+ tokens, more than task.max_length 64"):
        sets_of("error")
    skipped, cut = sets_of("skip"), sets_of("truncate_prompt")
    assert sum(loaded.left_out for loaded in skipped.all()) == 10 == sum(loaded.truncated for loaded in cut.all())
    assert sum(len(loaded.examples) for loaded in skipped.all()) == 30
    assert any("too long and left out" in line for line in skipped.describe())
    assert unpack_sets(pack_sets(skipped)) == skipped and unpack_sets(pack_sets(cut)) == cut


def test_wrong_columns_and_rows_are_refused_with_their_place(chat_spec: Make, tmp_path: Path) -> None:
    other, empty = tmp_path / "other.jsonl", tmp_path / "empty.jsonl"
    other.write_text('{"instruction": "a", "completion": "b"}\n')
    empty.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    for path, why in ((other, "has no column 'prompt'"), (empty, "empty.jsonl:2: 'completion' is empty")):
        spec = chat_spec(data={"train": {"files": str(path)}, "validation_rows": 1, "test_rows": 1})
        task = instruction.build(spec.task)
        with pytest.raises(DataError, match=why):
            load_sets(spec.data, spec.evaluation, task, load_tokenizer(spec.base, task))


def test_a_preview_shows_what_is_learned(chat_spec: Make, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(chat_spec().model_dump_json())
    said = CliRunner().invoke(app, ["validate", str(path), "--preview", "3"])
    assert said.exit_code == 0, said.output
    shown = said.output.replace("\n", "")
    assert "of them in [[ ]] are learned]" in shown and "<|im_end|>]]" in shown


# --- losses ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_rows_loss_and_gradient_do_not_depend_on_its_neighbors(
    architecture: str, chat_parts: Make, tiny_model: Callable[[str], str]
) -> None:
    parts = chat_parts(base__source=tiny_model(architecture), adapter__target_modules="all-linear")
    one, two = (parts.member(unit, trained=0.1) for unit in parts.units)
    examples = parts.sets.train.examples
    row, others = examples[0], [e for e in examples[1:] if len(e.sequences[0]) != len(examples[0].sequences[0])]

    def gradients(*batches_K: list[Any]) -> Any:
        batch = collate_pack(parts.task, batches_K, parts.base.tokenizer)
        return parts.model.gradients(stack([one, two][: len(batches_K)]), batch, [1, 2][: len(batches_K)])

    alone, packed = gradients([row]), gradients([row], others[:1])
    beside = [gradients([row, other]).losses_K[0] for other in others[:3]]
    of_others = [gradients([other]).losses_K[0] for other in others[:3]]
    for both, other in zip(beside, of_others, strict=True):
        assert 2 * both - other == pytest.approx(alone.losses_K[0], abs=1e-4)
    assert packed.losses_K[0] == pytest.approx(alone.losses_K[0], abs=1e-5)
    for name, gradient in alone.gradients[0].items():
        torch.testing.assert_close(packed.gradients[0][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def logp_by_hand(model: Any, example: Any) -> torch.Tensor:
    """Return the log-probabilities of a row's learned tokens in float64, from a forward of it alone."""
    ids = list(example.sequences[0])
    with torch.no_grad():
        logp_TV = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return torch.stack([logp_TV[t - 1, ids[t]] for first, last in example.target_ranges for t in range(first, last)])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_token_mean_is_the_loss_of_most_trainers(
    accumulation: int, chat_parts: Make, tiny_model: Callable[[str], str]
) -> None:
    """The sum over all learned tokens of a step, over their number (num_items_in_batch of Trainer and of TRL)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama"), attn_implementation="eager").double()
    for token_mean in (True, False):
        parts = chat_parts(
            task={"kind": "instruction", "max_length": 112, "token_mean": token_mean},
            optimization={"lr": 0.01, "steps": 1, "micro_batch": 3, "accumulation": accumulation},
        )
        trainer = parts.trainer()
        orders = [state.order for state in trainer.states]
        with trainer.collator() as collator:
            progress = trainer.take_step(collator)
        for state, order in zip(trainer.states, orders, strict=True):  # LoRA starts as the base itself
            rows = [parts.sets.train.examples[i] for n in range(accumulation) for i in order.indices(n)]
            logp = [logp_by_hand(model, row) for row in rows]
            assert len({len(one) for one in logp}) > 1
            means = torch.stack([-one.mean() for one in logp]).mean()
            expected = -torch.cat(logp).mean() if token_mean else means
            assert progress.losses[state.plan.name] == pytest.approx(float(expected), abs=1e-4)


def test_an_exported_member_says_the_same_of_answers(chat_spec: Make, chat_parts: Make, tiny_model: Any) -> None:
    spec = chat_spec()
    run(spec)
    store, test = RunStore.for_spec(spec), chat_parts().sets.test.examples
    for name in members(store.uri):
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama"), attn_implementation="eager")
        model = peft.PeftModel.from_pretrained(base, f"{store.uri}/members/{name}").eval()
        sets = {one.name: one for one in unpack_predictions(store.load_result(f"predictions/{name}"))}
        expected = torch.cat([logp_by_hand(model, example) for example in test])
        torch.testing.assert_close(sets["test"].values[0].double(), expected, rtol=0, atol=1e-4)
        assert sets["test"].ids == [e.id for e in test for first, last in e.target_ranges for _ in range(first, last)]


# --- runs ------------------------------------------------------------------------------------------------
def test_a_run_learns_its_answers_by_heart_and_reports_both_mixtures(chat_spec: Make) -> None:
    spec = chat_spec(
        optimization={"lr": 0.05, "epochs": 8, "micro_batch": 4, "warmup": 0.0},
        ensemble__regularizers={"kl": {"beta": 0.01}, "early_stopping": {"patience": 20}, "decay_a": 0.01},
    )
    metrics = run(spec)
    history = metrics["training"]["member-000"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < losses[0] - 0.5 and any("validation_nll" in row for row in history)
    test = metrics["ensemble"]["eval"]["test"]
    assert test["perplexity"] == pytest.approx(math.exp(test["nll"])) and test["documents"] == 6
    # Of M members no mixture is worse than their mean, and the mixture of whole answers is 1/M of the best at least.
    means = [member["eval"]["test"]["sequencewise_nll"] for member in metrics["members"]]
    for key in ("sequencewise_nll", "tokenwise_nll"):
        assert test[key] <= sum(means) / len(means) + 1e-9
        low, high = test["intervals"][key]
        assert low <= test[key] <= high
    assert test["sequencewise_nll"] <= min(means) + math.log(len(means)) + 1e-9
    gains = metrics["gains"]["test"]["over_mean_member"]
    assert gains["sequencewise_nll"]["gain"] == pytest.approx(sum(means) / len(means) - test["sequencewise_nll"])


@pytest.mark.slow
def test_an_interrupted_run_ends_bit_equal(chat_spec: Make) -> None:
    spec = chat_spec(checkpointing={"every_steps": 1}, adapter__dropout=0.1)
    whole = chat_spec(name="whole", checkpointing={"every_steps": 1}, adapter__dropout=0.1)
    spec = spec.model_copy(update={"name": "stopped"})
    with pytest.raises(Interrupted):
        run(spec, stop_at(2))
    run(spec)
    run(whole)
    assert_bit_equal(members(RunStore.for_spec(spec).uri), members(RunStore.for_spec(whole).uri))


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {
            "kind": "mos", "rank": 3, "shards": 2, "equivalent_rank": 2, "target_modules": ["q_proj", "v_proj"],
        }},
        {"base__quantization": {"kind": "rtn", "bits": 3, "group_size": 32},
         "base__compensation": {"kind": "cloq", "rank": 4},
         "base__calibration": {"source": "pypi:bbc-news", "samples": 4, "length": 32, "held_out": 2},
         "adapter": {"kind": "lora", "rank": 4, "target_modules": "all-linear"}},
        {"placement__recompute": True, "adapter__dropout": 0.1},
    ],
    ids=["mos", "cloq", "recompute"],
)
def test_other_members_and_bases_are_trained_on_chats(changes: dict[str, Any], chat_spec: Make) -> None:
    metrics = run(chat_spec(optimization={"lr": 0.02, "epochs": 6, "micro_batch": 4, "warmup": 0.0}, **changes))
    losses = [row["loss"] for row in metrics["training"]["member-000"] if "loss" in row]
    assert metrics["run"]["phase"] == "succeeded" and losses[-1] < losses[0] - 0.3


@pytest.mark.slow
def test_a_student_learns_the_answers_tokens(chat_spec: Make, tiny_model: Callable[[str], str]) -> None:
    spec = chat_spec()
    run(spec)
    settings = DistillSpec.model_validate({
        "student": {
            "base": {"source": tiny_model("gpt2"), "dtype": "float32", "quantization": "none"},
            "adapter": {"kind": "lora", "rank": 2, "target_modules": "all-linear"},
        },
        "loss": {"kind": "topk_kl", "top_k": 64}, "costs": False,
    })
    work = prepare_distillation(RunStore.for_spec(spec).uri, settings)
    run_in_process(work.targets)
    for student in work.students():
        run_in_process(prepare(student))
    targets = load_targets(work.targets.store)
    task = instruction.build(spec.task)
    train = load_sets(spec.data, spec.evaluation, task, load_tokenizer(spec.base, task)).train.examples
    learned = {e.id: sum(last - first for first, last in e.target_ranges) for e in train}
    _, lengths = targets.gather(list(learned))
    assert lengths == list(learned.values())
    record = compare(work)
    assert record["contenders"]["student"]["eval"]["test"].keys() >= {"nll", "sequencewise_nll"}


def test_predictions_do_not_depend_on_the_batch(chat_parts: Make) -> None:
    parts = chat_parts()
    stacked = stack([parts.member(unit, trained=0.1) for unit in parts.units])
    together, ids = predict(parts.model, stacked, parts.sets.train.examples, 64)
    alone, same = predict(parts.model, stacked, parts.sets.train.examples, 1)
    assert ids == same
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
