"""The output layer in chunks of positions: the same losses and gradients as from the logits of all at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from raylora.adapters.packed import stack
from raylora.data.task import Batch
from raylora.distill import TopK
from raylora.distill.losses import topk_kl
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.model.token_head import ChunkedHead, WholeHead, find_token_head
from raylora.engine.model.token_losses import PositionLoss, negative_log_likelihood, next_tokens, with_divergence
from raylora.spec.members import KLSpec

CPU = torch.device("cpu")
SMALL = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
LANGUAGE = {"task": {"kind": "language_modeling", "max_length": 24}}
Make = Callable[..., Any]


def small_model(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(vocab_size=99, n_embd=16, n_layer=3, n_head=2, n_positions=64)
    elif kind.startswith("gemma"):
        own = {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8, **changes}
        config = {"gemma2": transformers.Gemma2Config, "gemma3": transformers.Gemma3TextConfig}[kind](**SMALL, **own)
    else:
        config = {"llama": transformers.LlamaConfig, "cohere": transformers.CohereConfig}[kind](
            **SMALL, intermediate_size=32, num_key_value_heads=1, **changes
        )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gemma3"])
def test_the_hidden_states_are_those_of_the_models_own_forward(kind: str) -> None:
    model = small_model(kind, **({"final_logit_softcapping": 0.01} if kind == "gemma2" else {}))
    head = find_token_head(model, {"use_cache": False}, CPU)
    assert isinstance(head, ChunkedHead)
    ids_BT = torch.arange(20).view(2, 10)
    asked_BT = torch.rand(2, 9) < 0.5
    with torch.no_grad():
        expected = model(ids_BT).logits
        states_PD = head.states(lambda: model(ids_BT).logits, asked_BT)
        torch.testing.assert_close(head.logits(states_PD), expected[:, :-1][asked_BT])
        assert torch.equal(model(ids_BT).logits, expected), "the model is itself again"


def test_other_ways_to_make_logits_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    scaled = small_model("cohere", logit_scale=0.25)
    assert isinstance(find_token_head(scaled, {"use_cache": False}, CPU), WholeHead)
    assert "changed after the output layer" in caplog.text
    changed = small_model("llama")
    changed.lm_head = torch.nn.Sequential(changed.lm_head)
    assert isinstance(find_token_head(changed, {"use_cache": False}, CPU), WholeHead)
    assert "not one frozen linear layer" in caplog.text


# --- against float64 ------------------------------------------------------------------------------------
class Alone(torch.nn.Module):
    """An output layer that is a whole model."""

    def __init__(self, weight_VD: torch.Tensor, bias_V: torch.Tensor) -> None:
        super().__init__()
        self.config = transformers.LlamaConfig()
        self.lm_head = torch.nn.Linear(*weight_VD.T.shape, dtype=weight_VD.dtype).requires_grad_(False)
        self.lm_head.weight.data, self.lm_head.bias.data = weight_VD, bias_V

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head


def loss_of(name: str, batch: Any, reference_PV: torch.Tensor) -> PositionLoss:
    if name == "top k":
        best = reference_PV.float().log_softmax(-1).topk(5)
        tail_P = (1 - best.values.exp().sum(-1)).log()
        targets, labels_P = TopK(best.indices, best.values, tail_P, reference_PV.shape[-1]), next_tokens(batch)
        loss = topk_kl.build(topk_kl.Spec(task_weight=0.3))
        return lambda logits_CV, chunk: loss.per_example(logits_CV, targets[chunk], labels_P[chunk])
    likelihood = negative_log_likelihood(batch)
    if name == "likelihood":
        return likelihood
    kl = KLSpec(beta=0.7, direction="reverse" if name.startswith("reverse") else "forward")
    return with_divergence(likelihood, lambda chunk: reference_PV[chunk], kl)


def assert_equals_float64(
    name: str, rows: int, cap: float | None = None, prepare: Callable[[Any], None] = lambda model: None
) -> None:
    """Compare a head's losses and gradients, in chunks of so many rows, with those of all logits in float64.

    Args:
        cap: what the logits are softcapped by.
        prepare: changes how a model passes its output layer.
    """
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids_BT = torch.randint(0, 99, (3, 12), generator=generator)
    mask_BT = torch.rand(3, 12, generator=generator) < 0.6
    batch = Batch(["a", "b", "c"], ids_BT, torch.ones_like(ids_BT), None, target_mask_BT=mask_BT)
    weight_VD, bias_V, hidden_BTD, scale_P = drawn(99, 8), drawn(99), drawn(3, 12, 8), drawn(int(mask_BT[:, 1:].sum()))
    asked_BT, reference_PV = mask_BT[:, 1:], drawn(len(scale_P), 99)

    whole_BTD = hidden_BTD.clone().requires_grad_()
    logits_PV = F.linear(whole_BTD, weight_VD, bias_V)[:, :-1][asked_BT]
    capped_PV = logits_PV if cap is None else torch.tanh(logits_PV / cap) * cap
    expected_P = loss_of(name, batch, reference_PV)(capped_PV, slice(None))
    (expected,) = torch.autograd.grad((expected_P * scale_P).sum(), whole_BTD)
    assert not expected[:, :-1][~asked_BT].any() and not expected[:, -1].any()

    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-4)):
        model = Alone(weight_VD.to(dtype), bias_V.to(dtype))
        prepare(model)
        head = ChunkedHead(model, 99, CPU)
        head.rows, head.softcap = rows, cap
        leaf_BTD = hidden_BTD.to(dtype).requires_grad_()
        loss = loss_of(name, batch, reference_PV.to(dtype))
        loss_P = head.losses(lambda leaf=leaf_BTD, model=model: model.lm_head(leaf), asked_BT, loss)
        (found,) = torch.autograd.grad((loss_P * scale_P).sum(), leaf_BTD)
        torch.testing.assert_close(loss_P.double(), expected_P.double(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            assert torch.equal(head.losses(lambda leaf=leaf_BTD, m=model: m.lm_head(leaf), asked_BT, loss), loss_P)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("name", ["likelihood", "divergence", "reverse divergence", "top k"])
def test_losses_and_gradients_equal_a_reference_in_float64(name: str, rows: int) -> None:
    assert_equals_float64(name, rows)


def test_what_is_not_asked_is_not_computed_and_what_is_not_a_number_is_seen() -> None:
    model = Alone(torch.randn(50, 8), torch.randn(50))
    mask_BT = torch.tensor([[False, True, True, False, True]])
    batch = Batch(["a"], torch.arange(5)[None], torch.ones(1, 5), None, target_mask_BT=mask_BT)
    head = ChunkedHead(model, 50, CPU)
    for position, is_asked in ((0, True), (1, True), (2, False), (3, True), (4, False)):
        for bad in (math.nan, math.inf):
            hidden_BTD = torch.randn(1, 5, 8)
            hidden_BTD[0, position] = bad
            hidden_BTD.requires_grad_()
            loss_P = head.losses(
                lambda hidden=hidden_BTD: model.lm_head(hidden), mask_BT[:, 1:], negative_log_likelihood(batch)
            )
            (gradient,) = torch.autograd.grad(loss_P.sum(), hidden_BTD)
            assert bool(loss_P.isfinite().all()) is bool(gradient.isfinite().all()) is (not is_asked)


# --- members --------------------------------------------------------------------------------------------
def both_ways(parts: Any, rows: int = 16) -> list[PackedModel]:
    """Return the packed model with its output layer in small chunks, and with the logits of all positions."""
    assert isinstance(parts.base.token_head, ChunkedHead)
    parts.base.token_head.rows = rows
    return [parts.model, PackedModel(replace(parts.base, token_head=WholeHead()), parts.adapter, parts.task)]


CASES: dict[str, dict[str, Any]] = {
    "llama": {"base__source": "llama"},
    "gpt2 with dropout": {"base__source": "gpt2", "adapter__dropout": 0.1},
    "nf4, blocks run again": {"base__source": "llama", "base__quantization": "nf4", "placement__recompute": True},
}


@pytest.mark.parametrize("kl", [None, KLSpec(beta=0.5), KLSpec(beta=0.5, direction="reverse")])
@pytest.mark.parametrize("name", CASES)
def test_members_are_the_same_as_from_whole_logits_and_alone(
    name: str, kl: KLSpec | None, make_parts: Make, tiny_model: Any
) -> None:
    changes = {**CASES[name], "base__source": tiny_model(CASES[name]["base__source"])}
    parts = make_parts(
        **changes, **LANGUAGE, ensemble__members=4, adapter__target_modules="all-linear",
    )
    members = [parts.member(unit, trained=0.1) for unit in parts.units]
    batches, seeds = [parts.batch(3 * k, 3) for k in range(4)], [5, 6, 7, 8]
    found, expected = (
        model.gradients(stack(members), parts.pack(*batches), seeds, kl) for model in both_ways(parts)
    )
    assert found.losses_K == pytest.approx(expected.losses_K, rel=1e-5)
    for k in range(4):
        torch.testing.assert_close(found.gradients[k], expected.gradients[k], rtol=1e-3, atol=1e-5)
        alone = parts.model.gradients(stack([members[k]]), parts.pack(batches[k]), [seeds[k]], kl)
        assert found.losses_K[k] == pytest.approx(alone.losses_K[0], rel=1e-5)
        torch.testing.assert_close(found.gradients[k], alone.gradients[0], rtol=1e-3, atol=1e-5)


def test_scores_are_the_tokens_log_probabilities(make_parts: Make, tiny_model: Any) -> None:
    parts = make_parts(base__source=tiny_model("llama"), adapter={"kind": "lora"}, **LANGUAGE)
    stacked = stack([parts.member(unit, trained=0.1) for unit in parts.units])
    (found, _), (expected, joined) = (model.scores(stacked, parts.batch()) for model in both_ways(parts))
    torch.testing.assert_close(found, expected)
    with parts.base.slot.use(parts.model.step_tensors(stacked).pack), torch.no_grad():
        logits = parts.base.model(**joined.model_inputs()).logits
    torch.testing.assert_close(found, parts.task.scores(logits, joined))


def test_the_logits_of_all_positions_never_exist(make_parts: Make, tiny_model: Any) -> None:
    parts = make_parts(base__source=tiny_model("llama"), adapter={"kind": "lora"}, **LANGUAGE)
    stacked = stack([parts.member(unit) for unit in parts.units])
    batch = parts.pack(parts.batch(0, 8), parts.batch(8, 8))
    vocabulary, weight = len(parts.base.tokenizer), parts.base.model.lm_head.weight.data_ptr()
    largest: list[int] = []

    class Watch(TorchDispatchMode):
        """Notes the size of whatever is computed over the vocabulary."""

        def __torch_dispatch__(self, function: Any, types: Any, positional: Any = (), named: Any = None) -> Any:
            made = function(*positional, **(named or {}))
            if isinstance(made, torch.Tensor) and made.shape[-1:] == (vocabulary,) and made.data_ptr() != weight:
                largest.append(made.numel())
            return made

    peaks = []
    for model in both_ways(parts):
        largest.clear()
        with Watch():
            model.gradients(stacked, batch, [1, 2], KLSpec(beta=0.1))
        peaks.append(max(largest))
    assert peaks[0] == 16 * vocabulary
    assert peaks[1] >= int(batch.target_mask_BT[:, 1:].sum()) * vocabulary > peaks[0]


def test_whole_models_and_classes_have_whole_logits(make_parts: Make, tiny_model: Any) -> None:
    assert isinstance(make_parts().base.token_head, WholeHead)
    trained = make_parts(base__source=tiny_model("llama"), adapter={"kind": "full"}, **LANGUAGE)
    assert isinstance(trained.base.token_head, WholeHead)
    member, batch = stack([trained.member(trained.units[0])]), trained.pack(trained.batch())
    assert trained.model.gradients(member, batch, [1], KLSpec(beta=0.1)).losses_K[0] > 0
