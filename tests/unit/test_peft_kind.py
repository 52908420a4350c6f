"""PEFT methods as members: PEFT's own numbers, in a run, in its files and back in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from pydantic import ValidationError
from run_helpers import assert_bit_equal, members, run, stop_at
from sweeps import sweep

from raylora.adapters import lora
from raylora.adapters import peft as kind
from raylora.adapters.export import from_peft, to_peft
from raylora.adapters.packed import stack
from raylora.engine.model.member_tensors import frozen_tensors_of
from raylora.engine.model.serialization import from_bytes, to_bytes
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.errors import BaseError, Interrupted
from raylora.serve.predictor import load_ensemble
from raylora.store.run_store import RunStore

Make = Callable[..., Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) (basis|randlora)_A:UserWarning"),  # true, and meant
]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "LORA", "options": {"r": 4, "lora_alpha": 8}},
    "rslora": {"method": "LORA", "options": {"r": 4, "lora_alpha": 8, "use_rslora": True}},
    "dora": {"method": "LORA", "options": {"r": 4, "lora_alpha": 8, "use_dora": True}},
    "pissa": {"method": "LORA", "options": {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"}},
    "olora": {"method": "LORA", "options": {"r": 4, "lora_alpha": 8, "init_lora_weights": "olora"}},
    "orthogonal": {"method": "LORA", "options": {"r": 4, "lora_alpha": 8, "init_lora_weights": "orthogonal"}},
    "vera": {"method": "VERA", "options": {"r": 16, "d_initial": 0.3}},
    "vblora": {"method": "VBLORA", "options": {"r": 2, "num_vectors": 12, "vector_length": 8, "topk": 2}},
    "randlora": {"method": "RANDLORA", "options": {"r": 8, "randlora_alpha": 16}},
    "loha": {"method": "LOHA", "options": {"r": 4, "alpha": 32}},
    "lokr": {"method": "LOKR", "options": {"r": 4, "alpha": 8}},
    "hira": {"method": "HIRA", "options": {"r": 4}},
    "miss": {"method": "MISS", "options": {"r": 4}},
    "gralora": {"method": "GRALORA", "options": {"r": 4, "gralora_k": 2}},
    "fourierft": {"method": "FOURIERFT", "options": {"n_frequency": 40, "scaling": 50.0}},
    "ia3": {"method": "IA3"},
    "oft": {"method": "OFT", "options": {"oft_block_size": 8}},
    "hra": {"method": "HRA", "options": {"r": 4}},
    "road": {"method": "ROAD", "options": {"group_size": 8}},
}


def adapter_keys(name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "peft", "target_modules": ["query", "value"], **METHODS[name], **more}


def whole(parts: Any, unit: Any, trained: float = 0.0) -> dict[str, torch.Tensor]:
    """Return a member with what it needs but does not train."""
    return parts.member(unit, trained) | frozen_tensors_of(parts.base, parts.adapter, unit.stream("fixed"))


def own(parts: Any, member: dict[str, torch.Tensor], unit: Any) -> dict[str, torch.Tensor]:
    frozen_tensors = frozen_tensors_of(parts.base, parts.adapter, unit.stream("fixed"))
    return {n: t for n, t in member.items() if n not in frozen_tensors}


def logits_of(parts: Any, members: list[dict[str, torch.Tensor]], batch: Any) -> torch.Tensor:
    return parts.model.scores(stack(members), batch)[0].view(len(members), 4, -1)


def in_peft(parts: Any, folder: Path, source: str) -> Any:
    base = getattr(transformers, parts.task.auto_class).from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager", **parts.task.model_kwargs()
    )
    return peft.PeftModel.from_pretrained(base, folder).eval()


# --- PEFT computes the same ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sweep(METHODS, ["lora", "dora", "vera", "oft", "ia3", "hira"]))
def test_peft_loads_a_member_and_predicts_the_same(
    name: str, make_parts: Make, tiny_model: Any, tmp_path: Path
) -> None:
    parts = make_parts(adapter=adapter_keys(name))
    unit, batch = parts.units[0], parts.batch()
    member = whole(parts, unit, trained=0.3)
    logits = logits_of(parts, [member], batch)[0]
    trained = own(parts, member, unit)
    files = to_peft(
        trained, parts.spec.adapter, parts.base.sites, parts.base.layers.all.target_modules, "SEQ_CLS",
        parts.base.export_name,
    )
    assert files.config is not None and files.config["peft_type"] == METHODS[name]["method"]
    (tmp_path / "adapter_model.safetensors").write_bytes(to_bytes(files.tensors))
    (tmp_path / "adapter_config.json").write_bytes(files.config_bytes())
    loaded = in_peft(parts, tmp_path, tiny_model("bert"))
    with torch.no_grad():
        expected = loaded(**batch.model_inputs()).logits
    plain = logits_of(parts, [{n: t for n, t in member.items() if n.startswith("head:")}], batch)[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.01
    back = from_peft(files.tensors, files.config)
    assert all(torch.equal(back[n], trained[n]) for n in trained)
    saved = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert saved.keys() == files.tensors.keys()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("name", sweep(["lora", "dora", "vera", "vblora", "randlora"], ["dora", "vera"]))
def test_other_architectures_and_transposed_layers_too(
    name: str, architecture: str, make_parts: Make, tiny_model: Any, tmp_path: Path
) -> None:
    parts = make_parts(
        base__source=tiny_model(architecture), adapter=adapter_keys(name) | {"target_modules": "all-linear"},
        task={"kind": "language_modeling", "max_length": 24},
    )
    unit, batch = parts.units[0], parts.batch()
    member = whole(parts, unit, trained=0.1)
    scores = parts.model.scores(stack([member]), batch)[0]
    at = parts.base.layers.all
    files = to_peft(own(parts, member, unit), parts.spec.adapter, at.sites, at.target_modules, "CAUSAL_LM", "x")
    (tmp_path / "adapter_model.safetensors").write_bytes(to_bytes(files.tensors))
    (tmp_path / "adapter_config.json").write_bytes(files.config_bytes())
    with torch.no_grad():
        logits = in_peft(parts, tmp_path, tiny_model(architecture))(**batch.model_inputs()).logits
    torch.testing.assert_close(scores, parts.task.scores(logits, batch), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_fresh_member_is_the_base_but_for_two_methods(make_parts: Make) -> None:
    """VB-LoRA starts from a bank of small vectors, FourierFT from random frequencies: that is how PEFT has them."""
    for name in METHODS:
        parts = make_parts(adapter=adapter_keys(name))
        member, batch = whole(parts, parts.units[0]), parts.batch()
        heads = {n: t for n, t in member.items() if n.startswith("head:")}
        plain = logits_of(parts, [heads], batch)
        change = (logits_of(parts, [member], batch) - plain).abs().max()
        assert change < 1e-4 if name not in ("vblora", "fourierft") else 0 < change < 1, name


def test_peft_lora_is_raylora_lora(make_parts: Make) -> None:
    parts = make_parts(adapter=adapter_keys("lora"), ensemble__members=3)
    members = [whole(parts, unit, trained=0.2) for unit in parts.units]
    batches = [parts.batch(4 * k) for k in range(3)]
    one = parts.model.gradients(stack(members), parts.pack(*batches), [1, 2, 3])
    parts.adapter = lora.build(lora.Spec(rank=4, alpha=8))
    two = parts.model.gradients(stack(members), parts.pack(*batches), [1, 2, 3])
    assert one.losses_K == pytest.approx(two.losses_K, rel=1e-6)
    for k in range(3):
        assert one.gradients[k].keys() == two.gradients[k].keys()
        for name, gradient in two.gradients[k].items():
            torch.testing.assert_close(one.gradients[k][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dora", "pissa", "vera", "vblora", "randlora", "loha", "hira", "oft", "hra", "ia3"])
def test_gradients_are_those_of_peft(name: str, make_parts: Make, tiny_model: Any, tmp_path: Path) -> None:
    parts = make_parts(adapter=adapter_keys(name))
    unit, batch = parts.units[0], parts.batch()
    member = whole(parts, unit, trained=0.1)
    trained = own(parts, member, unit)
    frozen_tensors = {n: t for n, t in member.items() if n not in trained}
    found = parts.model.gradients(
        parts.model.step_tensors(stack([trained]), stack([frozen_tensors])), parts.pack(batch), [1]
    ).gradients[0]
    files = to_peft(trained, parts.spec.adapter, parts.base.sites, parts.base.layers.all.target_modules, "SEQ_CLS", "x")
    (tmp_path / "adapter_model.safetensors").write_bytes(to_bytes(files.tensors))
    (tmp_path / "adapter_config.json").write_bytes(files.config_bytes())
    base = in_peft(parts, tmp_path, tiny_model("bert")).get_base_model()
    by_memory = {}
    for parameter_name, parameter in base.named_parameters():
        if not parameter_name.endswith(("base_layer.weight", "base_layer.bias")):
            by_memory[parameter_name.replace(".default", "").removesuffix(".weight")] = parameter.requires_grad_()
    torch.nn.functional.cross_entropy(base(**batch.model_inputs()).logits, batch.labels_N).backward()
    compared = 0
    for tensor_name, gradient in found.items():
        if tensor_name in by_memory:
            torch.testing.assert_close(gradient, by_memory[tensor_name].grad, rtol=1e-3, atol=1e-5)
            compared += 1
    assert compared >= 4


def test_a_change_that_depends_on_the_weight_is_not_written_as_one(make_parts: Make) -> None:
    for name in ("dora", "oft", "ia3"):
        parts = make_parts(adapter=adapter_keys(name))
        with pytest.raises(BaseError, match="depends on the frozen one"):
            parts.adapter.delta_weight(whole(parts, parts.units[0]), parts.base.sites[0])


# --- in a run --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sweep(["dora", "rslora", "pissa", "vera", "vblora", "randlora"], ["dora"]))
def test_a_run_of_two_members_and_its_folders_in_peft(name: str, make_spec: Make, tiny_model: Any) -> None:
    spec = make_spec(adapter=adapter_keys(name), placement={"workers": 1, "cpus_per_worker": 1})
    prepared = prepare(spec)
    assert [list(pack) for pack in prepared.plan.packs] == [["member-000"], ["member-001"]]
    assert any("one member per forward" in reason for reason in prepared.plan.reasons)
    metrics = run_in_process(prepared)
    assert metrics["run"]["members_done"] == 2
    store = RunStore.for_spec(spec)
    loaded = load_ensemble(store.uri, gpus=0, calibrated=False)
    texts = ["a wonderful film", "dull and far too long", "i have seen worse"]
    predicted = loaded.predict(texts)
    tokens = loaded.base.tokenizer(texts, padding=True, return_tensors="pt")
    for m in range(2):
        files = store.load_result(f"members/member-{m:03d}")
        assert all(torch.isfinite(t).all() for t in from_bytes(files["adapter_model.safetensors"]).values())
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            tiny_model("bert"), dtype=torch.float32, attn_implementation="eager", **loaded.task.model_kwargs())
        folder = Path(store.uri.removeprefix("file://")) / "members" / f"member-{m:03d}"
        with torch.no_grad():
            probabilities = peft.PeftModel.from_pretrained(base, folder).eval()(**tokens).logits.softmax(-1)
        for row, prediction in zip(probabilities.tolist(), predicted, strict=True):
            assert list(prediction.member_probabilities[m].values()) == pytest.approx(row, abs=1e-4)


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_bit_equal_members(make_spec: Make) -> None:
    changes: dict[str, Any] = {
        "adapter": adapter_keys("dora", dropout=0.1), "checkpointing": {"every_steps": 2},
        "optimization": {"lr": 0.005, "steps": 4, "micro_batch": 4},
    }

    one, two = make_spec(name="whole", **changes), make_spec(name="broken", **changes)
    run_in_process(prepare(one))
    with pytest.raises(Interrupted):
        run(two, stop_at(3))
    run_in_process(prepare(two))
    assert_bit_equal(members(one), members(two))


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "vblora"])
def test_members_side_by_side_are_the_members_alone(name: str, make_parts: Make, trajectory: Any) -> None:
    """Training takes one at a time; evaluation and prediction put all of them into one forward."""
    parts = make_parts(adapter=adapter_keys(name, dropout=0.1), ensemble__members=3,
                       optimization={"lr": 0.01, "steps": 3, "micro_batch": 4, "eps": 1e-6, "warmup": 0.0})
    packed = trajectory(parts.trainer())
    for unit in parts.units:
        alone = trajectory(parts.trainer([unit]))
        for step in range(3):
            for tensor in packed[step][unit.name]:
                torch.testing.assert_close(
                    packed[step][unit.name][tensor], alone[step][unit.name][tensor], rtol=1e-5, atol=1e-5)


def test_a_plan_says_when_members_start_alike(make_spec: Make) -> None:
    assert prepare(make_spec(adapter=adapter_keys("pissa"))).notes[0].startswith("members start alike from pissa")
    assert not prepare(make_spec(adapter=adapter_keys("dora"))).notes


def test_members_start_apart_where_the_method_draws(make_parts: Make) -> None:
    parts = make_parts(adapter=adapter_keys("lora"))
    one, two = (parts.member(unit)["bert.encoder.layer.0.attention.self.query.lora_A"] for unit in parts.units)
    assert (one - two).norm() / one.norm() > 0.5


@pytest.mark.parametrize(("quantization", "dtype"), [("nf4", "bfloat16"), ("int8", "float32")])
@pytest.mark.parametrize(
    "name", sweep([name for name in METHODS if name not in ("pissa", "olora", "loha", "lokr", "hira", "hra")],
                  ["lora", "dora", "vera", "oft"])
)
def test_a_quantized_base_carries_them_and_is_not_written_to(
    name: str, quantization: str, dtype: str, make_parts: Make, trajectory: Any
) -> None:
    parts = make_parts(adapter=adapter_keys(name), base__quantization=quantization, base__dtype=dtype,
                       optimization={"lr": 0.005, "steps": 2, "micro_batch": 4})
    before = {n: p.detach().clone() for n, p in parts.base.model.named_parameters()}
    steps = trajectory(parts.trainer(parts.units[:1]))
    inner = [n for n in steps[0][parts.units[0].name] if not n.startswith("head:")]
    assert any((steps[1][parts.units[0].name][n] - steps[0][parts.units[0].name][n]).any() for n in inner)
    after = dict(parts.base.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and not after[n].requires_grad for n in before)
    assert parts.base.slot.pack is None


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_decomposed_start_leaves_the_shared_base_alone(name: str, make_parts: Make, trajectory: Any) -> None:
    parts = make_parts(adapter=adapter_keys(name), optimization={"lr": 0.005, "steps": 2, "micro_batch": 4})
    before = {n: p.detach().clone() for n, p in parts.base.model.state_dict().items()}
    trajectory(parts.trainer(parts.units[:1]))
    after = parts.base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.slow
def test_monte_carlo_dropout_beside_it(make_spec: Make) -> None:
    spec = make_spec(adapter=adapter_keys("dora"), ensemble__members=1,
                     baselines={"mc_dropout": {"dropout": 0.3, "passes": 3}}, optimization__steps=2)
    metrics = run_in_process(prepare(spec))
    assert metrics["run"]["phase"] == "succeeded"


# --- what is refused -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("keys", "says"), [
    ({"method": "LORAA"}, "did you mean 'LORA'"),
    ({"method": "PREFIX_TUNING"}, "known: FOURIERFT, GRALORA, HIRA, HRA, IA3, LOHA"),
    ({"method": "LORA", "options": {"rr": 3}}, "options.rr is not a setting of LORA"),
    ({"method": "LORA", "options": {"lora_dropout": 0.1}}, "use adapter.dropout"),
    ({"method": "LORA", "options": {"modules_to_save": ["x"]}}, "not a setting of LORA"),
    ({"method": "LORA", "options": {"init_lora_weights": "eva"}}, "'eva' needs calibration data"),
    ({"method": "LORA", "options": {"init_lora_weights": "pissa_niter_4"}}, "is not the same twice"),
    ({"method": "LORA", "options": {"init_lora_weights": "loftq"}}, "changes the quantized base"),
    ({"method": "LORA", "options": {"init_lora_weights": "pissa", "use_dora": True}}, "leave one out"),
])
def test_what_a_member_cannot_be_is_refused_by_name(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.Spec(**keys)
    assert says in str(caught.value)


@pytest.mark.parametrize(("changes", "says"), [
    ({"adapter": adapter_keys("vblora", options={"vector_length": 5})}, "must be divisible by `vector_length` 5"),
    ({"adapter": adapter_keys("lora", options={"r": 64})}, "at most 32"),
    ({"adapter": adapter_keys("lora", options={"r": 0})}, "should be a positive integer"),
    ({"adapter": adapter_keys("hra"), "base__quantization": "int8"}, "int8: PEFT's HRA reads the weight itself"),
    ({"adapter": adapter_keys("pissa"), "base__quantization": "nf4"}, "nf4: PEFT loads what started from pissa only"),
])
def test_what_does_not_fit_the_base_is_refused_before_anything_starts(
    changes: dict[str, Any], says: str, make_spec: Make
) -> None:
    with pytest.raises(BaseError) as caught:
        prepare(make_spec(**changes))
    assert says in str(caught.value)
