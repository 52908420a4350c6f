"""Compressed members: singular vectors in mixed precision against float64, budgets, runs that predict."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import weights
from test_records import misfits

from raylora.adapters.base import HEAD
from raylora.control import Phase
from raylora.engine.run.compressed_members import compress_member, decompress_member
from raylora.engine.run.roster import read_state
from raylora.engine.run.verify import verify_run
from raylora.errors import RunDirectoryError, UsageError
from raylora.quant.pair import (
    WIDTHS,
    change_error,
    choose,
    pair_bytes,
    restored,
    round_vectors,
    singular_factors,
    whole_error,
)
from raylora.records import Compression
from raylora.serve.compress import compress_run
from raylora.serve.export import export_run
from raylora.serve.predictor import load_ensemble
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
TEXTS = ["A good film.", "A bad film, and far too long.", "The meeting is at noon."]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def member(seed: int = 0, rank: int = 6) -> dict[str, torch.Tensor]:
    """Return a member whose singular values fall, as trained ones do."""
    fall = 0.6 ** torch.arange(rank)
    tensors = {}
    for number, (inputs, outputs) in enumerate([(96, 80), (80, 128)]):
        tensors[f"l.{number}.lora_A"] = drawn(rank, inputs, seed=seed + number).float() * fall[:, None]
        tensors[f"l.{number}.lora_B"] = drawn(outputs, rank, seed=seed + 9 + number).float()
    return {**tensors, f"{HEAD}c.weight": drawn(2, 16, seed=seed + 20).float()}


# --- the numbers ----------------------------------------------------------------------------------------
def test_the_factors_are_those_of_the_whole_changes_decomposition() -> None:
    a_RI, b_OR = drawn(4, 48), drawn(40, 4, seed=1)
    u_RO, v_RI = singular_factors(a_RI.float(), b_OR.float())
    change_OI = b_OR.float().double() @ a_RI.float().double()
    torch.testing.assert_close(u_RO.T @ v_RI, change_OI)
    values_R = torch.linalg.svdvals(change_OI)[:4]
    torch.testing.assert_close(u_RO.square().sum(1), values_R)
    torch.testing.assert_close(v_RI.square().sum(1), values_R)
    torch.testing.assert_close(u_RO @ u_RO.T, values_R.diag(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("bits", WIDTHS)
def test_rounded_vectors_are_the_nearest_levels_of_a_good_scale(bits: int) -> None:
    rows_NS = drawn(5, 200) * torch.tensor([1.0, 1e-3, 30.0, 0.5, 0.0], dtype=torch.float64)[:, None]
    codes_NS, scales_N = round_vectors(rows_NS, bits)
    near_NS = restored(codes_NS, scales_N, bits).double()
    levels_L = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    for row, scale, near in zip(rows_NS[:4], scales_N[:4].double(), near_NS[:4], strict=True):
        distance = (row[:, None] - levels_L * scale).abs().amin(dim=1)
        torch.testing.assert_close((row - near).abs(), distance, atol=1e-6, rtol=1e-4)
        share = float((row - near).square().sum() / row.square().sum())
        assert share < {2: 0.15, 3: 0.045, 8: 2e-4}[bits]  # a Gaussian's least is 0.119, 0.037 and 1e-4
    assert not near_NS[4].any()


def test_errors_of_changes_are_those_of_the_matrices() -> None:
    u, v, near_u, near_v = drawn(3, 20), drawn(3, 30, seed=1), drawn(3, 20, seed=2), drawn(3, 30, seed=3)
    expected = [(torch.outer(u[n], v[n]) - torch.outer(near_u[n], near_v[n])).square().sum() for n in range(3)]
    torch.testing.assert_close(change_error(u, v, near_u, near_v), torch.stack(expected))
    lost, whole = whole_error(u, v, near_u, near_v)
    assert lost == pytest.approx(float((u.T @ v - near_u.T @ near_v).square().sum()))
    assert whole == pytest.approx(float((u.T @ v).square().sum()))


def test_bits_are_chosen_as_well_as_any_other_way_of_that_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(5, generator=generator).square().tolist()
    errors = [[v, 0.12 * v, 0.04 * v, 1e-4 * v] for v in values]
    costs = [[0, 24, 34, 84]] * 5
    for budget in (0, 30, 100, 170, 250, 420):
        chosen = choose(errors, costs, budget)
        spent = sum(own[c] for own, c in zip(costs, chosen, strict=True))
        error = sum(own[c] for own, c in zip(errors, chosen, strict=True))
        assert spent <= budget
        best = min(
            sum(own[c] for own, c in zip(errors, other, strict=True))
            for other in itertools.product(range(4), repeat=5)
            if sum(own[c] for own, c in zip(costs, other, strict=True)) <= budget
        )
        assert error <= best + max(values) * 0.13  # what no step could be bought for with what is left
        order = sorted(range(5), key=lambda n: -values[n])
        if budget == 420:
            assert chosen == [3] * 5
        assert chosen[order[0]] >= chosen[order[-1]]


# --- files ----------------------------------------------------------------------------------------------
def test_a_member_keeps_its_budget_and_loses_less_the_more_it_has() -> None:
    whole = member()
    size = sum(4 * t.numel() for t in whole.values())
    change = {n: whole[f"l.{n}.lora_B"].double() @ whole[f"l.{n}.lora_A"].double() for n in range(2)}
    lost = []
    for share in (0.12, 0.2, 0.3, 0.6):
        one = compress_member(whole, int(share * size))
        assert len(one.content) <= share * size
        again = decompress_member(one.content)
        assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in whole.items()}
        found = {n: again[f"l.{n}.lora_B"].double() @ again[f"l.{n}.lora_A"].double() for n in range(2)}
        square = sum(float((found[n] - change[n]).square().sum()) for n in range(2))
        norm = sum(float(change[n].square().sum()) for n in range(2))
        assert one.change_error == pytest.approx((square / norm) ** 0.5, rel=1e-4)
        lost.append(one.change_error)
        torch.testing.assert_close(again[f"{HEAD}c.weight"], whole[f"{HEAD}c.weight"], rtol=1e-3, atol=1e-5)
    assert lost == sorted(lost, reverse=True) and lost[0] < 0.5 and lost[-1] < 0.02
    assert sum(one.vectors.values()) == 12 and one.vectors[8] == 12
    mixed = compress_member(whole, int(0.15 * size)).vectors
    assert len([bits for bits, count in mixed.items() if count]) > 1


def test_more_bits_go_to_larger_singular_values() -> None:
    import safetensors.torch

    one = compress_member(member(rank=8), 3000)
    bits_LR = safetensors.torch.load(one.content)["bits"].view(2, 8).tolist()
    assert len(set(bits_LR[0])) > 1 and all(own == sorted(own, reverse=True) for own in bits_LR)
    assert pair_bytes(96, 80, 3) == 36 + 30 + 4 and pair_bytes(96, 80, 0) == 0


def test_mixed_precision_loses_less_than_one_width_for_all_in_as_many_bytes() -> None:
    whole = member(rank=8)
    u_RO, v_RI = singular_factors(whole["l.0.lora_A"], whole["l.0.lora_B"])
    costs = [[pair_bytes(96, 80, bits) for bits in (0, *WIDTHS)]] * 8
    lost = [change_error(u_RO, v_RI, torch.zeros_like(u_RO), torch.zeros_like(v_RI))] + [
        change_error(u_RO, v_RI, restored(*round_vectors(u_RO, b), b), restored(*round_vectors(v_RI, b), b))
        for b in WIDTHS
    ]
    errors = torch.stack(lost, dim=1).tolist()
    for index, bits in enumerate(WIDTHS[:2], 1):
        chosen = choose(errors, costs, 8 * pair_bytes(96, 80, bits))
        assert sum(own[c] for own, c in zip(errors, chosen, strict=True)) < 0.5 * sum(own[index] for own in errors)


# --- runs -----------------------------------------------------------------------------------------------
def test_a_compressed_run_predicts_is_reported_and_exports(make_spec: Make, trained: Make, tmp_path: Path) -> None:
    spec = make_spec(name="whole", adapter__target_modules="all-linear", adapter__rank=8, optimization__steps=12)
    run = trained(spec)
    done = compress_run(run, 0.4)
    assert done.folder == f"{run}-compressed"
    assert [one.member for one in done.members] == ["member-000", "member-001"]
    for one in done.members:
        stored = RunStore(done.folder).load_result(f"members/{one.member}")
        assert "adapter_model.safetensors" not in stored
        assert len(stored["compressed.safetensors"]) == one.compressed_bytes <= 0.4 * one.size_bytes
        assert 0 < one.change_error < 0.1
    assert verify_run(done.folder) and not [part for part in verify_run(done.folder) if part.problem]
    assert read_state(RunStore(done.folder)).phase is Phase.SUCCEEDED
    record = RunStore(done.folder).read_json("compression.json")
    assert not misfits(record, Compression)
    assert record["budget"] == 0.4 and record["of"] == "whole"
    metrics = [RunStore(folder).read_json("metrics.json") for folder in (run, done.folder)]
    test = {d.metric: d for d in done.differences if d.set == "test"}
    assert {"nll", "accuracy"} <= test.keys()
    for key in ("nll", "accuracy"):
        values = [m["ensemble"]["eval"]["test"][key] for m in metrics]
        assert [test[key].whole, test[key].compressed] == values
    assert 0 < abs(test["nll"].whole - test["nll"].compressed) < 0.02
    asked = [load_ensemble(folder, calibrated=False).predict(TEXTS) for folder in (run, done.folder)]
    for one, two in zip(*asked, strict=True):
        assert one.probabilities == pytest.approx(two.probabilities, abs=0.02)
        assert one.probabilities != two.probabilities
    (exported, _) = export_run(done.folder, out=str(tmp_path / "out"))
    tensors = weights(run)
    again = decompress_member(RunStore(done.folder).load_result("members/member-000")["compressed.safetensors"])
    files = RunStore(str(tmp_path / "out")).load_result("member-000")
    import safetensors.torch

    found = safetensors.torch.load(files["adapter_model.safetensors"])
    assert found.keys() == tensors.keys() and json.loads(files["adapter_config.json"])["r"] == 8
    site = "bert.encoder.layer.0.attention.self.query"
    assert torch.equal(found[f"base_model.model.{site}.lora_A.weight"], again[f"{site}.lora_A"])
    assert exported.size_bytes == done.members[0].compressed_bytes


def test_the_command_shows_sizes_and_what_the_ensemble_loses(make_spec: Make, trained: Make) -> None:
    from typer.testing import CliRunner

    from raylora.cli.app import app

    run = trained(make_spec(name="whole"))
    shown = CliRunner().invoke(app, ["compress", run, "--budget", "0.5"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "change lost" in shown.output and "NLL" in shown.output and f"wrote {run}-compressed" in shown.output
    refused = CliRunner().invoke(app, ["compress", run, "--json"])
    assert refused.exit_code == 2 and "is not empty" in refused.output


def test_what_cannot_be_compressed_is_refused_and_nothing_is_written(make_spec: Make, trained: Make) -> None:
    run = trained(make_spec(name="whole"))
    with pytest.raises(UsageError, match="--budget: 1.5 is no share"):
        compress_run(run, 1.5)
    with pytest.raises(UsageError, match=r"member-000: its head and the list of its layers alone take [\d,]+ of"):
        compress_run(run, 0.01)
    with pytest.raises(RunDirectoryError, match="there is no run here"):
        compress_run(f"{run}-nowhere", 0.5)
    mos = {"kind": "mos", "equivalent_rank": 2, "rank": 3, "private_rank": 1, "shards": 4, "target_modules": ["query"]}
    pools = trained(make_spec(name="pools", adapter=mos))
    with pytest.raises(UsageError, match="member-000: only members that have a pair of matrices for each layer"):
        compress_run(pools, 0.5)
    assert not list(Path(run).parent.glob("*-compressed"))
    compress_run(run, 0.6)
    with pytest.raises(RunDirectoryError, match="is not empty"):
        compress_run(run, 0.5)
