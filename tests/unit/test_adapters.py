"""Where adapters are attached, and that a member leaves raylora whole: PEFT loads it and says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers

from raylora.adapters import lora, none
from raylora.adapters.base import find_sites
from raylora.adapters.export import from_peft, to_peft
from raylora.adapters.packed import stack
from raylora.engine.model import sites
from raylora.engine.model.machine import compute_dtype
from raylora.engine.model.serialization import to_bytes
from raylora.engine.model.sites import find_heads
from raylora.errors import BaseError

Make = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's


def names(parts: Any) -> list[str]:
    return [site.name for site in parts.base.sites]


def test_what_auto_means_is_read_from_pefts_own_table() -> None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    assert sites._targets_of_peft() == KNOWN and KNOWN["bert"] == sites.default_targets("bert")
    assert sites.default_targets("modernbert") == ["Wqkv"] and sites.default_targets("nobody") == []



# --- sites -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "expected"), [
    ("bert", ["query", "value"]), ("roberta", ["query", "value"]), ("gpt2", ["c_attn"]),
    ("llama", ["q_proj", "v_proj"]),
])
def test_auto_is_the_attention_projections_of_every_block(
    kind: str, expected: list[str], make_parts: Make, tiny_model: Any
) -> None:
    parts = make_parts(base__source=tiny_model(kind), adapter__target_modules="auto")
    assert sorted({name.rpartition(".")[2] for name in names(parts)}) == expected
    assert len(names(parts)) == 2 * len(expected) and {site.block for site in parts.base.sites} == {0, 1}
    assert all(site.transposed == (kind == "gpt2") for site in parts.base.sites)


@pytest.mark.parametrize(("kind", "task", "count", "heads"), [
    ("bert", "cls", 13, ["classifier"]), ("bert_without_pooler", "cls", 12, ["bert.pooler.dense", "classifier"]),
    ("roberta", "cls", 12, ["classifier.dense", "classifier.out_proj"]), ("gpt2", "cls", 8, ["score"]),
    ("llama", "cls", 14, ["score"]), ("llama", "lm", 14, []), ("gpt2", "lm", 8, []),
])
def test_all_linear_is_every_layer_but_the_head(
    kind: str, task: str, count: int, heads: list[str], make_parts: Make, tiny_model: Any
) -> None:
    changes = {"task": {"kind": "language_modeling", "max_length": 24}} if task == "lm" else {}
    parts = make_parts(base__source=tiny_model(kind), adapter__target_modules="all-linear", **changes)
    assert len(names(parts)) == count and sorted(parts.base.heads) == heads
    assert not {n.rpartition(".")[2] for n in names(parts)} & {"classifier", "score", "lm_head", "out_proj"}
    shapes = {s.name: (s.in_features, s.out_features) for s in parts.base.sites}
    for name, shape in shapes.items():
        if name.endswith("c_attn"):
            assert shape == (32, 96)


def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_not_frozen_at_random(
    make_parts: Make, tiny_model: Any
) -> None:
    parts = make_parts(base__source=tiny_model("bert_without_pooler"))
    assert parts.base.fresh_heads == {"bert.pooler.dense", "classifier"}
    one, two = (parts.member(unit)["head:bert.pooler.dense.weight"] for unit in parts.units)
    assert one.shape == (32, 32) and one.std() == pytest.approx(0.1, rel=0.1) and (one - two).norm() > 1
    whole = make_parts(base__source=tiny_model("bert"))
    assert whole.base.fresh_heads == {"classifier"}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_pooler_that_the_checkpoint_lacks_is_not_quantized(kind: str, make_parts: Make, tiny_model: Any) -> None:
    parts = make_parts(base__source=tiny_model("bert_without_pooler"), base__quantization=kind)
    member = parts.member(parts.units[0])
    assert member["head:bert.pooler.dense.weight"].shape == (32, 32)
    scores = parts.model.scores(stack([member]), parts.batch())[0]
    assert scores.shape == (4, 2) and torch.isfinite(scores).all()


def test_the_last_blocks_only(make_parts: Make) -> None:
    parts = make_parts(adapter__layers={"last": 1})
    assert names(parts) == [f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "value")]
    assert parts.base.layers.all.target_modules == sorted(names(parts))


@pytest.mark.parametrize(("changes", "says"), [
    ({"adapter__target_modules": ["qurey"]}, ["'qurey' matches no linear", "dense, key, query, value", "'query'"]),
    ({"adapter__target_modules": ["embeddings"]}, ["matches no linear layer", "query"]),
    ({"adapter__rank": 40}, ["40 is more than bert.encoder.layer.0", "(32 x 32)", "at most 32"]),
    ({"adapter__layers": {"last": 3}}, ["last 3 of only 2 blocks", "at most 2"]),
    ({"adapter__layers": {"last": 0}}, ["adapter.layers"]),
    ({"adapter__layers": {"first": 1}}, ["adapter.layers"]),
    ({"adapter__layers": "some"}, ["adapter.layers"]),
])
def test_an_adapter_that_does_not_fit_is_refused_by_name(make_parts: Make, changes: dict[str, Any], says: list) -> None:
    with pytest.raises(BaseError) as caught:
        make_parts(**changes)
    for part in says:
        assert part in str(caught.value)


def test_a_target_is_a_name_or_an_ending_but_not_a_part_of_a_word(make_parts: Make) -> None:
    one = make_parts(adapter__target_modules=["bert.encoder.layer.1.attention.self.key"])
    assert names(one) == ["bert.encoder.layer.1.attention.self.key"]
    assert len(names(make_parts(adapter__target_modules=["attention.output.dense"]))) == 2
    with pytest.raises(BaseError):
        make_parts(adapter__target_modules=["uery"])


def test_an_unknown_architecture_needs_named_targets() -> None:
    model = transformers.BertModel(transformers.BertConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(BaseError, match="no default is known"):
        find_sites(model, lora.Spec(), [], [])


def test_heads_are_what_stands_beside_the_backbone(tiny_model: Any) -> None:
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(tiny_model("llama"))
        causal = transformers.AutoModelForCausalLM.from_config(config)
    assert find_heads(causal, []) == {}


def test_types_that_are_asked_for_are_used() -> None:
    cpu = torch.device("cpu")
    assert compute_dtype("float32", cpu) is torch.float32 and compute_dtype("bfloat16", cpu) is torch.bfloat16
    assert compute_dtype("auto", cpu) in (torch.float32, torch.bfloat16)


# --- PEFT ------------------------------------------------------------------------------------------------
PEFT_CASES = [
    ("bert", "cls", ["query", "value"], {}), ("bert", "cls", "all-linear", {}), ("bert", "cls", ["query"], {"last": 1}),
    ("bert_without_pooler", "cls", "all-linear", {}), ("roberta", "cls", "auto", {}),
    ("roberta", "cls", "all-linear", {}), ("gpt2", "cls", "auto", {}), ("gpt2", "lm", "all-linear", {}),
    ("llama", "cls", "all-linear", {}), ("llama", "lm", "auto", {}),
]


@pytest.mark.parametrize(("kind", "task", "targets", "layers"), PEFT_CASES)
def test_peft_loads_a_member_and_predicts_the_same(
    kind: str, task: str, targets: Any, layers: dict, make_parts: Make, tiny_model: Any, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"task": {"kind": "language_modeling", "max_length": 24}} if task == "lm" else {}
    if layers:
        changes["adapter__layers"] = layers
    parts = make_parts(base__source=tiny_model(kind), adapter__target_modules=targets, **changes)
    check_round_trip(parts, tiny_model(kind), tmp_path, 1e-5)


@pytest.mark.slow
def test_peft_loads_a_member_of_the_real_base(make_parts: Make, tmp_path: Path) -> None:
    from raylora.data.catalog.assets import model_folder

    parts = make_parts(base__source="pypi:minilm-l6", adapter__target_modules="all-linear")
    assert parts.base.export_name == "sentence-transformers/all-MiniLM-L6-v2"
    check_round_trip(parts, str(model_folder("minilm-l6")), tmp_path, 1e-5)


def check_round_trip(parts: Any, source: str, folder: Path, atol: float) -> None:
    member = parts.member(parts.units[0], trained=0.2)
    batch = parts.batch()
    scores = parts.model.scores(stack([member]), batch)[0]
    classifies = parts.task.auto_class == "AutoModelForSequenceClassification"
    kind = "SEQ_CLS" if classifies else "CAUSAL_LM"
    files = to_peft(
        member, parts.spec.adapter, parts.base.sites, parts.base.layers.all.target_modules, kind, parts.base.export_name
    )
    assert not files.config["base_model_name_or_path"].startswith("/")
    back = from_peft(files.tensors, files.config)
    assert back.keys() == member.keys() and all(torch.equal(back[n], member[n]) for n in member)
    (folder / "adapter_model.safetensors").write_bytes(to_bytes(files.tensors))
    (folder / "adapter_config.json").write_bytes(files.config_bytes())

    base = getattr(transformers, parts.task.auto_class).from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager", **parts.task.model_kwargs()
    )
    base.config.pad_token_id = parts.base.model.config.pad_token_id
    before = base.eval()(**batch.model_inputs()).logits
    loaded = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        expected = loaded(**batch.model_inputs()).logits
    torch.testing.assert_close(scores, parts.task.scores(expected, batch), rtol=1e-4, atol=atol)
    assert (before - expected).abs().max() > 0.01  # the member does change something
    loaded.save_pretrained(folder / "again", save_embedding_layers=False)
    saved = safetensors.torch.load_file(folder / "again" / "adapter_model.safetensors")
    assert saved.keys() == files.tensors.keys()
    assert all(torch.equal(saved[n], files.tensors[n]) for n in saved)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # true: there is only a head
@pytest.mark.parametrize("beside_lora", [True, False])
def test_a_head_without_adapter_loads_too(
    beside_lora: bool, make_parts: Make, tiny_model: Any, tmp_path: Path
) -> None:
    parts = make_parts(**({} if beside_lora else {"adapter": {"kind": "none"}}))
    assert bool(parts.base.sites) == beside_lora
    parts.adapter = none.build(none.Spec())
    member = {n: t for n, t in parts.member(parts.units[0], trained=0.2).items() if n.startswith("head:")}
    assert sorted(member) == ["head:classifier.bias", "head:classifier.weight"]
    batch = parts.batch()
    logits = parts.model.scores(stack([member]), batch)[0]
    files = to_peft(member, none.Spec(), parts.base.sites, parts.base.layers.all.target_modules, "SEQ_CLS", "x")
    (tmp_path / "adapter_model.safetensors").write_bytes(to_bytes(files.tensors))
    (tmp_path / "adapter_config.json").write_bytes(files.config_bytes())
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny_model("bert"), dtype=torch.float32, attn_implementation="eager", **parts.task.model_kwargs())
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, tmp_path).eval()(**batch.model_inputs()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_training_leaves_every_base_weight_as_it_was(make_parts: Make, trajectory: Any) -> None:
    parts = make_parts(adapter__target_modules="all-linear")
    before = {n: p.detach().clone() for n, p in parts.base.model.state_dict().items()}
    trajectory(parts.trainer())
    after = parts.base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert parts.base.slot.pack is None
