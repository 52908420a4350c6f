"""Members made of shards in the engine: packed, regularized, resumed, stored small, and written out for PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from run_helpers import assert_bit_equal, members, run, stop_at, weights
from sweeps import sweep
from typer.testing import CliRunner

import raylora
from raylora import registry
from raylora.adapters import lora, mos
from raylora.adapters.base import find_sites
from raylora.adapters.export import to_peft
from raylora.adapters.packed import stack
from raylora.cli import app
from raylora.data.catalog.assets import model_folder
from raylora.engine.model.member_tensors import frozen_tensors_of
from raylora.engine.model.packed_model import StepTensors
from raylora.engine.model.serialization import check_layout, from_bytes, layout_of, to_bytes
from raylora.engine.run.plan_run import prepare
from raylora.engine.training.predict import predict
from raylora.errors import Interrupted, RunDirectoryError, UsageError
from raylora.serve.export import export_run
from raylora.serve.predictor import load_ensemble, member_tensors
from raylora.spec import dump_spec
from raylora.spec.members import KLSpec
from raylora.store.run_store import RunStore
from raylora.store.seal import seal

Make = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's

MOS = {"kind": "mos", "rank": 3, "equivalent_rank": 2, "private_rank": 1, "shards": 4, "alpha": 8,
       "target_modules": ["query", "value"]}
EVERYTHING = {
    "ensemble__members": 4, "task__max_length": 40, "adapter": {**MOS, "dropout": 0.1},
    "optimization": {
        "lr": 0.005, "steps": 5, "micro_batch": 2, "accumulation": 2, "clip_norm": 0.05, "warmup": 0.5, "eps": 1e-6,
    },
    "ensemble__regularizers": {"kl": {"beta": 0.5}, "decay_a": 4.0, "decay_b": 1.0, "decay_head": 0.5},
}


def folder(spec: Any, name: str = "member-000") -> Path:
    store = RunStore.for_spec(spec)
    assert store.has_result(f"members/{name}")
    return Path(store.storage.path(f"members/{name}"))


def whole(parts: Any, unit: Any, trained: float = 0.2) -> dict[str, torch.Tensor]:
    return {**parts.member(unit, trained), **frozen_tensors_of(parts.base, parts.adapter, unit.stream("fixed"))}


# --- training ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "targets"), [("bert", ["query", "value"]), ("llama", "all-linear")])
def test_packed_equals_alone_after_every_step(
    kind: str, targets: Any, make_parts: Make, tiny_model: Any, trajectory: Any
) -> None:
    changes = {**EVERYTHING, "adapter": {**MOS, "dropout": 0.1, "target_modules": targets}}
    parts = make_parts(base__source=tiny_model(kind), **changes)
    packed = trajectory(parts.trainer())
    for unit in parts.units:
        alone = trajectory(parts.trainer([unit]))
        for step in range(5):
            one, two = packed[step][unit.name], alone[step][unit.name]
            assert one.keys() == two.keys() and any(n.startswith("pool.") for n in one)
            for name in one:
                torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n} {m}")
    last = packed[-1]
    pools = [n for n in last["member-000"] if n.startswith("pool.")]
    assert all((last["member-000"][n] - packed[0]["member-000"][n]).abs().max() > 1e-4 for n in pools)
    assert (last["member-000"][pools[0]] - last["member-001"][pools[0]]).norm() > 0.1


def test_with_all_rows_private_and_whole_training_is_loras(make_parts: Make, trajectory: Any) -> None:
    common = {"alpha": 8, "target_modules": ["query", "value"], "dropout": 0.1, "rank": 4}
    ours = make_parts(adapter={"kind": "mos", "equivalent_rank": 4, "private_rank": 4, "shards": 1, **common})
    last = trajectory(ours.trainer())[-1]
    theirs = make_parts(adapter={"kind": "lora", **common})
    expected = trajectory(theirs.trainer())[-1]
    for unit in ours.units:
        index = frozen_tensors_of(ours.base, ours.adapter, unit.stream("fixed"))
        for site in ours.base.sites:
            one = ours.adapter.delta_weight({**last[unit.name], **index}, site)
            two = theirs.adapter.delta_weight(expected[unit.name], site)
            assert two.norm() > 0.01
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_gradients_over_a_4_bit_base_are_each_members_own(make_parts: Make) -> None:
    parts = make_parts(
        base__quantization="nf4", base__dtype="bfloat16",
        adapter={**MOS, "dropout": 0.1, "target_modules": "all-linear"},
    )
    members = [parts.member(unit, trained=0.05) for unit in parts.units]
    frozen_tensors = [frozen_tensors_of(parts.base, parts.adapter, unit.stream("fixed")) for unit in parts.units]
    batches = [parts.batch(0), parts.batch(4)]
    packed = parts.model.gradients(
        parts.model.step_tensors(stack(members), stack(frozen_tensors)), parts.pack(*batches), [1, 2], KLSpec(beta=0.1)
    )
    for k in range(2):
        assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in packed.gradients[k].values())
        own = parts.model.step_tensors(stack(members[k : k + 1]), stack(frozen_tensors[k : k + 1]))
        alone = parts.model.gradients(own, parts.pack(batches[k]), [k + 1], KLSpec(beta=0.1))
        one, two = (torch.cat([g.flatten() for g in gradients.values()])
                    for gradients in (packed.gradients[k], alone.gradients[0]))
        assert (one - two).norm() / two.norm() < 0.02


def test_a_whole_run_its_folders_and_its_predictions_again(make_spec: Make) -> None:
    spec = make_spec(
        adapter=MOS, ensemble__members=3, optimization={"lr": 0.02, "epochs": 2, "micro_batch": 8},
        baselines={"checkpoints": 2, "last_layer": 1, "mc_dropout": {"dropout": 0.1, "passes": 2}},
    )
    metrics = run(spec)
    assert metrics["run"]["phase"] == "succeeded" and metrics["run"]["members_done"] == 3
    names = {path.name for path in folder(spec).iterdir()}
    assert names == {"adapter_model.safetensors", "member.json", "README.md", "MANIFEST.json"}
    assert "raylora export" in (folder(spec) / "README.md").read_text()
    pools = {n: list(t.shape) for n, t in weights(spec, "member-000").items() if n.startswith("pool.")}
    assert pools == {f"pool.{kind}.32x32.{side}": [2 * 2 * 4, 8] for kind in ("query", "value") for side in "AB"}
    layout = json.loads((folder(spec) / "member.json").read_text())["layout"]
    assert layout["shapes"] == pools and len(layout["fixed_sha256"]) == 64
    other = json.loads((folder(spec, "member-001") / "member.json").read_text())["layout"]
    assert other["fixed_sha256"] != layout["fixed_sha256"], "each member draws its own"

    store = RunStore.for_spec(spec)
    ensemble = load_ensemble(store.uri, gpus=0, calibrated=False)
    rows = [{"text": "A joy from start to end."}, {"text": "Dull."}]
    found = ensemble.predict(rows)
    examples, _ = zip(*(ensemble._tokenize(row, i) for i, row in enumerate(rows)), strict=True)
    batch = ensemble.task.collate(examples, ensemble.base.tokenizer)
    scores = ensemble.model.scores(ensemble._stacked, batch)[0]
    expected = scores.view(3, 2, 2).double().softmax(-1)
    for n in range(2):
        given = [list(m.values()) for m in found[n].member_probabilities]
        torch.testing.assert_close(torch.tensor(given).double(), expected[:, n], rtol=1e-4, atol=1e-5)
    committed = from_bytes(store.load_result("predictions/member-002")["predictions.safetensors"])
    prepared = prepare(spec)
    texts = prepared.sets.test.examples
    again = predict(ensemble.model, ensemble._stacked, texts, 64)[0]
    torch.testing.assert_close(again[2:3], committed["test/values"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", sweep([1, 3], [3]))
def test_an_interrupted_run_resumes_to_bit_equal_members(make_spec: Make, trained: Any, stop: int) -> None:
    changes = {
        "adapter": {**MOS, "dropout": 0.1}, "checkpointing": {"every_steps": 2, "num_to_keep": 2},
        "optimization": {"lr": 0.005, "steps": 6, "micro_batch": 8, "accumulation": 2, "clip_norm": 0.05},
        "ensemble__regularizers": {"kl": {"beta": 0.1}, "early_stopping": {"patience": 3}},
    }

    whole_run = make_spec(name="whole", **changes)
    trained(whole_run)
    broken = make_spec(name="broken")
    with pytest.raises(Interrupted):
        run(broken, stop_at(stop))
    run(broken)
    assert_bit_equal(members(whole_run), members(broken))


def test_validate_and_plan_say_which_layer_has_nothing_to_share(make_spec: Make, tmp_path: Path) -> None:
    spec = make_spec(adapter={**MOS, "target_modules": ["query", "bert.pooler.dense"]})
    assert len(prepare(spec).notes) == 1
    path = tmp_path / "spec.yaml"
    path.write_text(dump_spec(spec))
    for verb in ("validate", "plan"):
        done = CliRunner().invoke(app, [verb, str(path)])
        assert done.exit_code == 0, done.output
        said = " ".join(done.output.split())
        assert "bert.pooler.dense is the only adapted layer" in said and "plain LoRA of rank 2" in said
    plain = CliRunner().invoke(app, ["plan", str(path), "--set", "adapter.target_modules=[query]", "--json"])
    assert json.loads(plain.stdout)["notes"] == [] and json.loads(plain.stdout)["member_parameters"] == 2 * 2 * 64 + 66


def test_a_bad_number_is_refused_before_anything_starts(make_spec: Make, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(dump_spec(make_spec(adapter=MOS)))
    for change, says in (("rank=6", "a rank of at most 3"), ("shards=5", "use 4 or 8"), ("private_rank=9", "at most")):
        done = CliRunner().invoke(app, ["validate", str(path), "--set", f"adapter.{change}"])
        assert done.exit_code == 2 and says in done.output, done.output


def test_on_the_real_base_a_member_takes_an_eighth_of_loras_bytes() -> None:
    config = transformers.AutoConfig.from_pretrained(model_folder("minilm-l6"))
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    keys = {"target_modules": "all-linear", "rank": 6}
    specs = [lora.Spec(rank=8, target_modules="all-linear"), mos.Spec(equivalent_rank=1, private_rank=0, **keys)]
    sizes = []
    for spec in specs:
        sites = find_sites(model, spec, [], [])
        tensors = registry.load("adapter", spec.kind).build(spec).build(sites, torch.Generator().manual_seed(0))
        sizes.append(len(to_bytes(to_peft(tensors, spec, sites, ["query"], "SEQ_CLS", "x").tensors)))
    assert raylora.parameter_count(config, specs[0]) == 8 * raylora.parameter_count(config, specs[1])
    assert sizes[0] / sizes[1] > 7.9


# --- another draw, another base --------------------------------------------------------------------------------
@pytest.fixture
def finished(make_spec: Make, trained: Any) -> Any:
    spec = make_spec(adapter={**MOS, "target_modules": "all-linear"}, optimization__steps=2)
    trained(spec)
    return spec


def tamper(spec: Any, change: Callable[[dict[str, Any]], None]) -> str:
    """Change what a member says of itself, with manifests that verify."""
    store = RunStore.for_spec(spec)
    files = store.load_result("members/member-001")
    facts = json.loads(files["member.json"])
    change(facts["layout"])
    store.commit_result("members/member-001", {**files, "member.json": json.dumps(facts).encode()})
    seal(store.storage, ["member-000", "member-001"])
    return store.uri


@pytest.mark.parametrize("use", [lambda uri: load_ensemble(uri, gpus=0), lambda uri: export_run(uri)])
def test_a_member_is_not_put_together_with_another_draw_or_base(finished: Any, use: Callable[[str], Any]) -> None:
    use(tamper(finished, lambda layout: None))
    uri = tamper(finished, lambda layout: layout.update(fixed_sha256="0" * 64))
    with pytest.raises(RunDirectoryError, match="member-001: its seed no longer gives the tensors"):
        use(uri)
    uri = tamper(finished, lambda layout: layout["shapes"].update({"pool.query.32x32.A": [32, 8]}))
    with pytest.raises(RunDirectoryError, match=r"member-001: was trained on another base: pool.query.32x32.A is \[32"):
        use(uri)


def test_a_checkpoint_of_another_draw_is_not_continued(make_parts: Make) -> None:
    parts = make_parts(adapter=MOS)
    trainer = parts.trainer()
    states = {t.plan.name: t.saved(trainer.step) for t in trainer.states}
    parts.trainer(saved=states)
    states["member-001"][1]["layout"]["fixed_sha256"] = "0" * 64
    with pytest.raises(RunDirectoryError, match="the checkpoint of member-001: its seed no longer gives"):
        parts.trainer(saved=states)


def test_a_layout_tells_draws_by_value_and_computed_factors_by_shape() -> None:
    own = {"pool.A": torch.zeros(2, 3), "head:x": torch.zeros(1)}
    one = layout_of(own, {"index": torch.tensor([1, 2]), "factor": torch.tensor([1.0])})
    assert one is not None and one["shapes"] == {"pool.A": [2, 3]}
    check_layout("m", one, layout_of(own, {"index": torch.tensor([1, 2]), "factor": torch.tensor([1.1])}))
    with pytest.raises(RunDirectoryError):
        check_layout("m", one, layout_of(own, {"index": torch.tensor([2, 1]), "factor": torch.tensor([1.0])}))
    with pytest.raises(RunDirectoryError):
        check_layout("m", one, layout_of(own, {"index": torch.tensor([1, 2]), "factor": torch.ones(2)}))
    assert layout_of(own, {}) is None


# --- PEFT ------------------------------------------------------------------------------------------------------
EXPORTS = [
    ("bert", "classification", {}), ("bert", "classification", {"target_modules": "all-linear"}),
    ("bert", "classification", {"target_modules": ["query", "bert.pooler.dense"]}),  # one layer alone
    ("bert_without_pooler", "classification", {"target_modules": "all-linear"}),
    ("bert", "classification", {"kind": "lora", "rank": 4}),
    ("gpt2", "classification", {"target_modules": "all-linear"}),
    ("llama", "classification", {"target_modules": "all-linear"}),
    ("llama", "language_modeling", {"target_modules": "all-linear"}),
]


@pytest.mark.parametrize(("kind", "task", "adapter"), sweep(EXPORTS, [EXPORTS[i] for i in (0, 2, 5, 7)]))
def test_an_exported_member_says_the_same_in_peft(
    kind: str, task: str, adapter: dict[str, Any], make_spec: Make, make_parts: Make, tiny_model: Any, tmp_path: Path
) -> None:
    adapter = {**MOS, **adapter} if adapter.get("kind") != "lora" else {"target_modules": ["query"], **adapter}
    changes: dict[str, Any] = {"base__source": tiny_model(kind), "adapter": adapter, "ensemble__members": 1}
    if task == "language_modeling":
        changes["task"] = {"kind": task, "max_length": 24}
    changes["optimization"] = {"lr": 0.05, "steps": 3, "micro_batch": 8}
    spec = make_spec(**changes)
    run(spec)
    (written,) = export_run(RunStore.for_spec(spec).uri, out=str(tmp_path / "out"))
    assert written.folder == str(tmp_path / "out" / "member-000")
    if adapter["kind"] == "mos":
        assert written.size_bytes < written.exported_bytes
        assert json.loads((tmp_path / "out/member-000/adapter_config.json").read_text())["r"] == 3

    parts = make_parts(**changes)
    unit = parts.units[0]
    tensors = member_tensors(RunStore.for_spec(spec).load_result("members/member-000"))
    frozen_tensors = frozen_tensors_of(parts.base, parts.adapter, unit.stream("fixed"))
    batch = parts.batch()
    scores = parts.model.scores(stack([{**tensors, **frozen_tensors}]), batch)[0]
    base = getattr(transformers, parts.task.auto_class).from_pretrained(
        tiny_model(kind), dtype=torch.float32, attn_implementation="eager", **parts.task.model_kwargs())
    base.config.pad_token_id = parts.base.model.config.pad_token_id
    before = base.eval()(**batch.model_inputs()).logits
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, written.folder).eval()(**batch.model_inputs()).logits
    torch.testing.assert_close(scores, parts.task.scores(expected, batch), rtol=1e-5, atol=1e-5)
    assert (before - expected).abs().max() > 0.01


def test_export_on_the_command_line(make_spec: Make, tmp_path: Path) -> None:
    spec = make_spec(adapter=MOS, optimization__steps=1)
    run(spec)
    uri = RunStore.for_spec(spec).uri
    done = CliRunner().invoke(app, ["export", uri, "--format", "peft-lora", "--member", "member-001", "--json"])
    assert done.exit_code == 0, done.output
    (only,) = json.loads(done.stdout)
    assert only["member"] == "member-001" and only["folder"] == f"{uri}/export/member-001"
    assert only["size_bytes"] == (folder(spec, "member-001") / "adapter_model.safetensors").stat().st_size
    assert only["exported_bytes"] == Path(only["folder"], "adapter_model.safetensors").stat().st_size
    table = CliRunner().invoke(app, ["export", uri, "--out", str(tmp_path / "x")])
    assert table.exit_code == 0 and f"{only['size_bytes']:,}" in table.output and "member-000" in table.output
    assert prepare(spec).is_resume  # an export inside the run directory does not make it another run


@pytest.mark.parametrize(("arguments", "says"), [
    (["--member", "member-007"], "has no finished member 'member-007'"),
    (["--format", "gguf"], "known: base, base-packed, checkpoint, peft-lora"),
])
def test_what_cannot_be_exported_says_why(make_spec: Make, trained: Any, arguments: list[str], says: str) -> None:
    spec = make_spec(adapter=MOS, optimization__steps=1, ensemble__members=1)
    trained(spec)
    done = CliRunner().invoke(app, ["export", RunStore.for_spec(spec).uri, *arguments])
    assert done.exit_code == 2 and says in done.output
    with pytest.raises(UsageError):
        export_run(str(RunStore.for_spec(spec).uri) + "x")


# --- accumulation --------------------------------------------------------------------------------------------
def test_pools_are_gathered_once_per_optimizer_step(make_parts: Make, monkeypatch: Any) -> None:
    parts = make_parts(adapter=MOS, optimization={"steps": 3, "micro_batch": 2, "accumulation": 4})
    gathers: list[int] = []
    real = type(parts.adapter).materialize

    def counted(self: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled():  # not those of the validation
            gathers.append(1)
        return real(self, *arguments)

    monkeypatch.setattr(type(parts.adapter), "materialize", counted)
    parts.trainer().run(lambda t: None, lambda p: None, lambda: 0)
    assert len(gathers) == 3


def test_micro_batches_that_share_a_gather_have_the_gradients_they_have_alone(make_parts: Make) -> None:
    parts = make_parts(adapter=MOS)
    trained = stack([parts.member(unit, trained=0.2) for unit in parts.units])
    frozen_tensors = stack([frozen_tensors_of(parts.base, parts.adapter, unit.stream("fixed")) for unit in parts.units])
    step = StepTensors(parts.model, trained, frozen_tensors, micro_batches=2)
    for start in (0, 4):
        batches, seeds = [parts.batch(start)] * len(parts.units), [1] * len(parts.units)
        shared = parts.model.gradients(step, parts.pack(*batches), seeds)
        alone = parts.model.gradients(
            parts.model.step_tensors(trained, frozen_tensors), parts.pack(*batches), seeds
        )
        for one, other in zip(shared.gradients, alone.gradients, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
