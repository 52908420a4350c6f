"""PRoLoRA, MELoRA, LoRA-XS and NOLA against their equations written out, and as members of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import Tensor

from raylora.adapters import lora, lora_xs, melora, nola, prolora
from raylora.adapters.base import Site
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.errors import BaseError
from raylora.serve.export import export_run
from raylora.serve.predictor import load_ensemble
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
SITE = Site("up", 24, 48, 0)
SPECS: dict[str, Any] = {
    "prolora": prolora.Spec(rank=7, unshared_rank=1, reduction=3, alpha=14, stride_b=1),
    "melora": melora.Spec(rank=2, minis=4, alpha=6),
    "lora_xs": lora_xs.Spec(rank=5, alpha=10),
    "nola": nola.Spec(rank=3, bases=6, alpha=6),
}
BUILD = {"prolora": prolora.build, "melora": melora.build, "lora_xs": lora_xs.build, "nola": nola.build}
RUNS = {
    "prolora": {"rank": 5, "unshared_rank": 1, "reduction": 2}, "melora": {"rank": 2, "minis": 4},
    "lora_xs": {"rank": 6}, "nola": {"rank": 4, "bases": 8},
}


def weight_of(name: str) -> Tensor:
    return torch.randn(SITE.out_features, SITE.in_features, generator=torch.Generator().manual_seed(3))


def trained(kind: str, seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """Return an adapter and a whole member of it, away from where it began."""
    adapter = BUILD[kind](SPECS[kind])
    generator = torch.Generator().manual_seed(seed)
    moved = {n: t + torch.randn(t.shape, generator=generator) for n, t in adapter.build([SITE], generator).items()}
    return adapter, moved | adapter.frozen_tensors([SITE], seed, weight_of)


# --- the equations, one number at a time -------------------------------------------------------------
def slow_prolora(t: dict[str, Tensor]) -> Tensor:
    shared, chunks, stride_a, stride_b = 6, 3, 2, 1
    width, height = 24 // chunks, 48 // chunks
    delta = t["up.unshared_B"] @ t["up.unshared_A"]
    for o in range(48):
        for i in range(24):
            for r in range(shared):
                a = t["up.shared_A"][(r - (i // width) * stride_a) % shared, i % width]
                b = t["up.shared_B"][o % height, (r - (o // height) * stride_b) % shared]
                delta[o, i] += a * b
    return 14 / 7 * delta


def slow_melora(t: dict[str, Tensor]) -> Tensor:
    delta = torch.zeros(48, 24)
    for block in range(4):
        product = t["up.mini_B"][block] @ t["up.mini_A"][block]
        delta[12 * block : 12 * block + 12, 6 * block : 6 * block + 6] = product
    return 6 / 2 * delta


def slow_lora_xs(t: dict[str, Tensor]) -> Tensor:
    u, s, vt = torch.linalg.svd(weight_of("up").double())
    signs = [vt[k, vt[k].abs().argmax()].sign() for k in range(5)]
    delta = torch.zeros(48, 24, dtype=torch.float64)
    for j in range(5):
        for k in range(5):
            left, right = signs[j] * u[:, j] * s[j], signs[k] * vt[k]
            delta += t["up.xs_M"][j, k] * torch.outer(left, right)
    return (10 / 5 * delta).float()


def slow_nola(t: dict[str, Tensor]) -> Tensor:
    a, b = torch.zeros(3, 24), torch.zeros(48, 3)
    for p in range(6):
        a += t["up.nola_a"][p] * t["up.bases_A"][p]
        b += t["up.nola_b"][p] * t["up.bases_B"][p]
    return 6 / 3 * b @ a


SLOW = {"prolora": slow_prolora, "melora": slow_melora, "lora_xs": slow_lora_xs, "nola": slow_nola}


@pytest.mark.parametrize("kind", SPECS)
def test_the_change_is_the_equation(kind: str) -> None:
    adapter, member = trained(kind)
    expected = SLOW[kind](member)
    torch.testing.assert_close(adapter.delta_weight(member, SITE), expected, rtol=1e-4, atol=1e-4)
    x = torch.randn(1, 5, 24)
    at_site = adapter.materialize({n: t[None] for n, t in member.items()}, [SITE])["up"]
    torch.testing.assert_close(adapter.packed_delta(x, at_site)[0], x[0] @ expected.T, rtol=1e-3, atol=1e-3)
    spec, pair = adapter.as_lora(member, [SITE])
    torch.testing.assert_close(lora.build(spec).delta_weight(pair, SITE), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "expected"), [
    ("prolora", 6 * (24 + 48) // 3 + 1 * (24 + 48)), ("melora", 2 * (24 + 48)), ("lora_xs", 5 * 5), ("nola", 2 * 6),
])
def test_the_number_of_parameters_is_the_formulas(kind: str, expected: int) -> None:
    adapter = BUILD[kind](SPECS[kind])
    assert sum(t.numel() for t in adapter.build([SITE], torch.Generator()).values()) == expected


def test_the_rank_of_the_change_is_what_each_method_promises() -> None:
    ranks = {kind: int(torch.linalg.matrix_rank(adapter.delta_weight(member, SITE)))
             for kind, (adapter, member) in ((kind, trained(kind)) for kind in SPECS)}
    assert ranks == {"prolora": 7, "melora": 8, "lora_xs": 5, "nola": 3}


def test_a_start_has_the_spread_of_loras() -> None:
    wide = Site("wide", 4096, 64, 0)
    generator = torch.Generator().manual_seed(0)
    std = (1 / 3 / 4096) ** 0.5
    shared = prolora.build(prolora.Spec(rank=8, reduction=4)).build([wide], generator)["wide.shared_A"]
    assert shared.shape == (7, 1024) and shared.std() == pytest.approx(std, rel=0.05)
    mini = melora.build(melora.Spec(minis=4)).build([wide], generator)["wide.mini_A"]
    assert mini.std() == pytest.approx((1 / 3 / 1024) ** 0.5, rel=0.05)
    random = nola.build(nola.Spec(bases=512, rank=1))
    member = random.build([wide], generator) | random.frozen_tensors([wide], 1, weight_of)
    a = torch.einsum("p,pri->ri", member["wide.nola_a"], member["wide.bases_A"])
    assert a.std() == pytest.approx(std, rel=0.15)


def test_one_chunk_and_one_mini_are_lora() -> None:
    for adapter, names in (
        (prolora.build(prolora.Spec(rank=4, unshared_rank=0, reduction=1, alpha=8)), ("shared_A", "shared_B")),
        (melora.build(melora.Spec(rank=4, minis=1, alpha=8)), ("mini_A", "mini_B")),
    ):
        one = adapter.build([SITE], torch.Generator().manual_seed(5))
        two = lora.build(lora.Spec(rank=4, alpha=8)).build([SITE], torch.Generator().manual_seed(5))
        assert torch.equal(one[f"up.{names[0]}"].view(4, 24), two["up.lora_A"])
        assert one[f"up.{names[1]}"].view(48, 4).shape == two["up.lora_B"].shape


def test_bases_are_the_members_own_and_factors_the_bases() -> None:
    random, square = BUILD["nola"](SPECS["nola"]), BUILD["lora_xs"](SPECS["lora_xs"])
    one, two = (random.frozen_tensors([SITE], seed, weight_of)["up.bases_A"] for seed in (1, 2))
    assert (one - two).norm() / one.norm() > 0.5
    one, two = (square.frozen_tensors([SITE], seed, weight_of)["up.xs_A"] for seed in (1, 2))
    assert torch.equal(one, two)
    flipped = square.frozen_tensors([SITE], 1, lambda name: -weight_of(name))
    assert torch.allclose(flipped["up.xs_A"], one, atol=1e-5), "the sign of a singular vector is no accident"


def test_what_a_person_should_know_is_said() -> None:
    assert "take 0 MB" in BUILD["nola"](SPECS["nola"]).notes([SITE])[0]
    big = [Site(f"{n}", 4096, 4096, n) for n in range(64)]
    assert "take 1074 MB" in nola.build(nola.Spec(rank=8, bases=64)).notes(big)[0]
    assert "start alike" in BUILD["lora_xs"](SPECS["lora_xs"]).notes([SITE])[0]


@pytest.mark.parametrize(("build", "spec", "says"), [
    (prolora.build, prolora.Spec(rank=8, reduction=5), ["reduction", "does not split into 5", "4 and 6"]),
    (prolora.build, prolora.Spec(rank=25, reduction=2), ["25 is more than up (48 x 24)", "at most 24"]),
    (melora.build, melora.Spec(minis=7), ["minis", "7 equal parts", "6 and 8"]),
    (melora.build, melora.Spec(minis=9, rank=1), ["8 and 12"]),
    (melora.build, melora.Spec(minis=100, rank=1), ["values that divide every adapted layer: 24"]),
    (melora.build, melora.Spec(minis=8, rank=4), ["a block of up (6 x 3)", "at most 3"]),
    (lora_xs.build, lora_xs.Spec(rank=30), ["30 is more than up", "at most 24"]),
    (nola.build, nola.Spec(rank=30), ["30 is more than up", "at most 24"]),
])
def test_what_does_not_fit_is_refused_with_what_does(build: Any, spec: Any, says: list[str]) -> None:
    with pytest.raises(BaseError) as caught:
        build(spec).check([SITE])
    for part in says:
        assert part in str(caught.value)


@pytest.mark.parametrize(("keys", "says"), [
    ({"rank": 4, "unshared_rank": 4}, "at most 3, or kind: lora"), ({"rank": 4, "reduction": 4}, "at most 3"),
])
def test_prolora_refuses_chunks_that_repeat(keys: dict[str, int], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        prolora.Spec(**keys)


# --- as members ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", SPECS)
def test_packed_equals_alone_after_every_step(kind: str, make_parts: Make, trajectory: Any) -> None:
    parts = make_parts(
        adapter={"kind": kind, "target_modules": ["query", "value"], "dropout": 0.1, **RUNS[kind]},
        ensemble__members=3, optimization={"lr": 0.01, "steps": 3, "micro_batch": 4, "eps": 1e-6, "warmup": 0.0},
    )
    packed = trajectory(parts.trainer())
    for unit in parts.units:
        alone = trajectory(parts.trainer([unit]))
        for step in range(3):
            one, two = packed[step][unit.name], alone[step][unit.name]
            assert one.keys() == two.keys()
            for name in one:
                torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5)
        inner = [n for n in one if not n.startswith("head:")]
        assert any((packed[2][unit.name][n] - packed[0][unit.name][n]).abs().max() > 1e-3 for n in inner)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_a_run_ends_well_and_its_members_predict_the_same_when_loaded(
    kind: str, make_spec: Make, tiny_model: Any
) -> None:
    spec = make_spec(adapter={"kind": kind, "target_modules": ["query", "value"], **RUNS[kind]})
    prepared = prepare(spec)
    metrics = run_in_process(prepared)
    assert metrics["run"]["phase"] == "succeeded" and metrics["run"]["members_done"] == 2
    store = RunStore.for_spec(spec)
    files = store.load_result("members/member-000")
    assert "adapter_config.json" not in files, "PEFT does not know this kind"
    check_reloaded(store)
    check_exported(store, tiny_model("bert"))


def check_exported(store: RunStore, source: str) -> None:
    """Load each member, written out as LoRA, with PEFT and compare what it says."""
    loaded = load_ensemble(store.uri, gpus=0, calibrated=False)
    texts = ["a wonderful film", "dull and far too long"]
    predicted = loaded.predict(texts)
    tokens = loaded.base.tokenizer(texts, padding=True, return_tensors="pt")
    for m, written in enumerate(export_run(store.uri)):
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, attn_implementation="eager", **loaded.task.model_kwargs())
        model = peft.PeftModel.from_pretrained(base, written.folder.removeprefix("file://")).eval()
        with torch.no_grad():
            rows = model(**tokens).logits.softmax(-1).tolist()
        for row, prediction in zip(rows, predicted, strict=True):
            assert list(prediction.member_probabilities[m].values()) == pytest.approx(row, abs=1e-4)


def check_reloaded(store: RunStore, atol: float = 1e-4) -> None:
    """Compare what a loaded ensemble says of the test rows with what was recorded of its members."""
    from raylora.engine.model.serialization import unpack_predictions
    from raylora.engine.training.predict import predict

    loaded = load_ensemble(store.uri, gpus=0, calibrated=False)
    recorded = [unpack_predictions(store.load_result(f"predictions/member-{m:03d}")) for m in range(loaded.members)]
    from raylora.data.sets import load_sets

    sets = load_sets(loaded.spec.data, loaded.spec.evaluation, loaded.task, loaded.base.tokenizer)
    values_MNC, ids = predict(loaded.model, loaded._stacked, sets.test.examples, 16)
    for m, one in enumerate(recorded):
        test = next(p for p in one if p.name == "test")
        assert test.ids == ids
        torch.testing.assert_close(values_MNC[m], test.values[0], rtol=1e-4, atol=atol)
    assert (values_MNC[0] - values_MNC[1]).abs().max() > 1e-3
