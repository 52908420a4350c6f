"""A sweep: what is tried, how it is ranked, and what is left behind for the run that follows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import assert_bit_equal, members, run, stop_at, weights
from typer.testing import CliRunner

import raylora
from raylora.cli import app
from raylora.engine.model import serialization
from raylora.engine.run.plan_run import prepare
from raylora.engine.run.sweep import sweep_spec
from raylora.errors import Interrupted, RunDirectoryError, SpecError
from raylora.spec import dump_spec, read_spec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
RATES = {"optimization.lr": [1e-5, 5e-3]}


def validation_nll(run: str, name: str) -> float:
    parts = serialization.unpack_predictions(RunStore(run).load_result(f"predictions/{name}"))
    (part,) = [one for one in parts if one.role == "validation"]
    logp_NC = torch.log_softmax(part.values[0].double(), dim=-1)
    return -float(logp_NC.gather(1, part.labels_N[:, None]).mean())


def test_settings_are_ranked_on_the_validation_rows_and_the_best_is_written_out(
    make_spec: Make, tmp_path: Path
) -> None:
    spec = make_spec(optimization__steps=20, ensemble__members=3, baselines__last_layer=1)
    found = raylora.sweep(spec, RATES, local=True)
    assert found.run.endswith("demo-sweep")
    best, other = found.tried
    assert best.settings == {"optimization.lr": 5e-3} and other.settings == {"optimization.lr": 1e-5}
    for one in found.tried:
        assert one.value == pytest.approx(validation_nll(found.run, one.members[0]), rel=1e-6)
        assert one.interval[0] < one.value < one.interval[1] and one.standard_error is None
    assert best.value < other.value
    folder = Path(found.run)
    assert json.loads((folder / "sweep.json").read_text())["tried"][0]["members"] == ["member-001"]
    assert (folder / "sweep.png").stat().st_size > 5000
    follow = read_spec(folder / "best.yaml")
    assert follow.optimization.lr == 5e-3 and follow.ensemble.members == 3 and follow.ensemble.vary is None
    assert follow.digest() == spec.with_settings(best.settings).digest() and follow.name == "demo"
    assert not RunStore(found.run).storage.list("baselines")
    before = weights(found.run, "member-001")
    again = raylora.sweep(spec, RATES, local=True)
    assert again.tried == found.tried
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(found.run, "member-001").items())


def test_the_test_rows_have_no_say(make_spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    from raylora.engine.run import sweep as module

    real = module.summarize

    def spied(groups: Any, *arguments: Any, **more: Any) -> Any:
        seen.extend(part.name for group in groups.values() for part in group)
        return real(groups, *arguments, **more)

    monkeypatch.setattr(module, "summarize", spied)
    raylora.sweep(make_spec(), RATES, local=True)
    assert seen == ["validation", "validation"]


@pytest.mark.slow
def test_several_members_of_one_setting_are_averaged(make_spec: Make) -> None:
    found = raylora.sweep(make_spec(), RATES, metric="accuracy", repeats=2, local=True)
    assert [len(one.members) for one in found.tried] == [2, 2]
    assert all(one.interval is None and one.standard_error is not None for one in found.tried)
    assert found.tried[0].value >= found.tried[1].value


@pytest.mark.parametrize(("vary", "members"), [
    (RATES, 2), ({**RATES, "optimization.warmup": [0.0, 0.1, 0.2]}, 6),
    ({"optimization.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, 5),
])
def test_a_sweep_has_as_many_members_as_there_is_to_try(make_spec: Make, vary: Any, members: int) -> None:
    from raylora.spec.vary import RangeSpec

    checked = {key: RangeSpec(**own) if isinstance(own, dict) else own for key, own in vary.items()}
    spec = sweep_spec(make_spec(ensemble__seeds=[4, 9]), checked, samples=5)
    assert spec.ensemble.members == members
    assert spec.ensemble.seeds is None and spec.distill is None


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "a sweep needs something to try"),
    (["--vary", "optimization.lr"], "is no key with values"),
    (["--vary", "optimization.lr=1e-2..1e-4"], "low 0.01 must be below high 0.0001"),
    (["--vary", "optimization.lr=1..x"], "is no range of numbers"),
    (["--vary", "optimization.lr=1..2:square"], "unknown scale 'square'"),
    (["--vary", "optimization.epochs=1,2"], "do not differ in 'optimization.epochs'"),
    (["--vary", "optimization.lr=1e-3,-1"], "lr. Input should be"),
    (["--vary", "optimization.lr=1e-3,1e-2", "--metric", "rmse"], "classification has no rmse"),
])
def test_what_cannot_be_tried_is_refused_and_nothing_is_written(
    make_spec: Make, tmp_path: Path, arguments: list[str], said: str
) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(dump_spec(make_spec()))
    result = CliRunner().invoke(app, ["sweep", str(file), "--local", *arguments])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "runs").exists()


def test_the_command_shows_a_table_and_goes_on_to_the_best(make_spec: Make, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(dump_spec(make_spec()))
    asked = ["sweep", str(file), "--local", "--vary", "optimization.lr=1e-5,5e-3", "--vary",
             "ensemble.regularizers.decay_b=0,0.1"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert "validation NLL" in result.output and "best.yaml" in result.output
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert len(found["tried"]) == 4
    assert found["tried"][0]["settings"]["optimization.lr"] == 5e-3
    assert [one["value"] for one in found["tried"]] == sorted(one["value"] for one in found["tried"])


def test_half_of_the_settings_end_at_each_epoch_and_the_others_are_as_if_they_had_been_alone(make_spec: Make) -> None:
    rates = [1e-5, 1e-3, 3e-3, 5e-3]
    spec = make_spec(optimization__steps=None, optimization__epochs=3)
    found = raylora.sweep(spec, {"optimization.lr": rates}, local=True, keep=0.5)
    left = {one.settings["optimization.lr"]: one.left_at for one in found.tried}
    steps = RunStore(found.run).read_json("metrics.json")["training"]["member-003"][-1]["step"]
    assert sorted(left.values(), key=lambda at: at or math.inf) == [steps // 3, steps // 3, 2 * steps // 3, None]
    assert [one.left_at for one in found.tried] == [None, 2 * steps // 3, steps // 3, steps // 3]
    values = [one.value for one in found.tried]
    assert values[2] < values[3]
    histories = RunStore(found.run).read_json("metrics.json")["training"]
    first = {name: next(row["validation_nll"] for row in rows if "validation_nll" in row)
             for name, rows in histories.items()}
    worst = {f"member-{rates.index(rate):03d}" for rate, at in left.items() if at == steps // 3}
    assert worst == set(sorted(first, key=first.__getitem__)[2:])
    assert found.best.ensemble.pruning is None
    alone = make_spec(name="alone", ensemble__members=4, ensemble__vary={"optimization.lr": rates})
    run(alone)
    best = found.tried[0].members[0]
    for name, tensor in weights(found.run, best).items():  # beside fewer others a last bit may be another
        torch.testing.assert_close(tensor, weights(alone, best)[name], rtol=1e-3, atol=1e-5)


def test_a_halved_sweep_that_is_stopped_goes_on_with_those_who_were_left(make_spec: Make) -> None:
    common: dict[str, Any] = {
        "ensemble__members": 4, "ensemble__vary": {"optimization.lr": [1e-5, 1e-3, 3e-3, 5e-3]},
        "ensemble__pruning": {"keep": 0.5}, "optimization__steps": None, "optimization__epochs": 3,
    }
    whole, spec = make_spec(name="whole", **common), make_spec(name="stopped", **common)
    run(whole)
    with pytest.raises(Interrupted):
        run(spec, stop_at(8))
    run(spec)
    assert_bit_equal(members(spec), members(whole))


@pytest.mark.parametrize(("keys", "said"), [
    ({"keep": 1.0}, "--keep: 1 of the settings"), ({"keep": 0.5, "repeats": 2}, "--repeats trains it several times"),
])
def test_what_cannot_be_pruned_is_said(make_spec: Make, keys: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        raylora.sweep(make_spec(), RATES, local=True, **keys)


def test_two_rules_that_end_members_are_refused_and_so_is_a_metric_that_the_task_lacks(make_spec: Make) -> None:
    with pytest.raises(SpecError, match="both end members"):
        make_spec(ensemble__pruning={}, ensemble__regularizers={"early_stopping": {}})
    with pytest.raises(SpecError, match="ensemble.pruning.metric: classification has no rmse"):
        prepare(make_spec(ensemble__pruning={"metric": "rmse"}, ensemble__regularizers=None))


@pytest.mark.slow
def test_another_sweep_of_one_name_is_not_mixed_with_it(make_spec: Make) -> None:
    raylora.sweep(make_spec(), RATES, local=True)
    with pytest.raises(RunDirectoryError, match="ensemble.vary"):
        raylora.sweep(make_spec(), {"optimization.lr": [1e-5, 6e-3]}, local=True)


def test_nothing_to_try_is_said(make_spec: Make) -> None:
    with pytest.raises(SpecError, match="a sweep needs something to try"):
        raylora.sweep(make_spec(), local=True)
