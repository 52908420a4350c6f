"""Members that several ranks train together: the same to float tolerance, whatever their number and the ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gangs import Case, run_gang
from run_helpers import members

from raylora.data.task import take_part
from raylora.engine.run.plan_run import prepare
from raylora.spec import build_spec
from raylora.store.run_store import RunStore

BOOSTED = {"kind": "boosted_lora", "rounds": 3, "rank_per_round": 2, "target_modules": ["query", "value"]}
RULES = {"decay_a": 0.1, "kl": {"beta": 0.5}}


def cases_in(folder: Path, content: dict[str, Any], stages: list[int], ranks: int, partners: int) -> list[Case]:
    """Return a run per ZeRO stage, begun, of as many members as there are groups of partners, two a group."""
    found = []
    for stage in stages:
        own = json.loads(json.dumps(content))
        own["storage_path"], own["name"] = str(folder), f"stage-{stage}"
        own["adapter"]["dropout"] = 0.1
        own["base"]["quantization"] = "nf4"
        # 40 rows in batches of 7: the last one of an epoch has 5, which are no even number of parts
        own["optimization"] |= {"zero_stage": stage, "micro_batch": 7, "accumulation": 2, "steps": 8,
                                "lora_plus_ratio": 2.0}
        own["ensemble"] |= {"members": 2 * ranks // partners, "regularizers": RULES}
        prepared = prepare(build_spec(own))
        prepared.begin()
        units = [unit.name for unit in prepared.units]
        shares = [units[2 * group : 2 * group + 2] for group in range(ranks // partners) for _ in range(partners)]
        found.append(Case(own, [{f"job-rank-{rank}": share} for rank, share in enumerate(shares)]))
    return found


def optimizer_bytes(session: Any, rank: int) -> int:
    """Return what a rank holds of the moments of a member that it would train now."""
    from raylora import registry
    from raylora.engine.model.packed_model import PackedModel
    from raylora.engine.training.trainer import PackTrainer, TrainingSettings

    spec, plan = session.spec, session.plans["member-000"]
    adapter = registry.load("adapter", plan.adapter.kind).build(plan.adapter)
    model = PackedModel(session.base, adapter, session.task)
    trainer = PackTrainer(model, TrainingSettings.of(spec), [plan], session.sets.train.examples, [])
    with trainer.collator() as collator:
        trainer.take_step(collator)
    optimizer = trainer.states[0].optimizer._torch_optimizer
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())


@pytest.mark.parametrize(
    ("ranks", "partners", "is_split", "stages", "adapter"),
    [
        pytest.param(2, 2, False, [0, 2], {}, id="two ranks"),
        pytest.param(2, 2, False, [0, 1], {}, id="two ranks, the other stage", marks=pytest.mark.slow),
        pytest.param(4, 2, True, [0, 2], {}, id="two pairs over a split base", marks=pytest.mark.slow),
        pytest.param(2, 2, True, [1], {}, id="two ranks over a split base", marks=pytest.mark.slow),
        pytest.param(2, 2, False, [0, 2], BOOSTED, id="two ranks, members in rounds", marks=pytest.mark.slow),
        pytest.param(3, 3, False, [0], {}, id="three ranks", marks=pytest.mark.slow),
    ],
)
def test_partners_train_the_member_that_one_rank_trains(
    ranks: int, partners: int, is_split: bool, stages: list[int], adapter: dict[str, Any], content: dict[str, Any],
    tmp_path: Path,
) -> None:
    content["adapter"] = adapter or content["adapter"]
    alone = cases_in(tmp_path / "alone", content, stages, ranks, partners)
    together = cases_in(tmp_path / "together", content, stages, ranks, partners)
    first = [Case(c.content, [dict(p for jobs in c.jobs_of_ranks[::partners] for p in jobs.items())]) for c in alone]
    run_gang(first, 1, is_split=False)
    check = None if is_split else optimizer_bytes
    held = run_gang(together, ranks, is_split=is_split, partners=partners, check=check)
    for number, stage in enumerate(stages):
        one, two = (RunStore.for_spec(build_spec(cases[number].content)) for cases in (alone, together))
        for name, tensors in members(one.uri).items():
            for key, tensor in members(two.uri)[name].items():
                # AdamW's first steps are as large as the learning rate, 5e-3, whatever the gradient's size
                torch.testing.assert_close(tensor, tensors[key], rtol=1e-3, atol=2e-5, msg=f"{stage} {name} {key}")
        assert one.storage.list("predictions") == two.storage.list("predictions")
    if not is_split and 0 in stages and len(stages) > 1:
        whole = held[stages.index(0)][0]
        for number, stage in enumerate(stages):
            share = held[number][0] / whole
            assert share == 1 if not stage else share == pytest.approx(1 / partners, abs=0.02), stage


def test_parts_are_the_whole(make_parts: Any) -> None:
    parts = make_parts()
    whole = parts.pack(parts.batch(0, 5), parts.batch(10, 5))
    for count in (1, 2, 3, 5):
        found = [take_part(whole, index, count) for index in range(count)]
        ids = [[p.ids[k * len(p) // 2 : (k + 1) * len(p) // 2] for p in found] for k in range(2)]
        assert [sum(each, []) for each in ids] == [whole.ids[:5], whole.ids[5:]]
        for part in found:
            for n, name in enumerate(part.ids):
                where = whole.ids.index(name)
                assert torch.equal(part.input_ids_BT[n], whole.input_ids_BT[where])
                assert part.labels_N[n] == whole.labels_N[where]
    few = take_part(whole, 0, 7)
    assert few.part is not None and few.part.weight == 0 and len(few) == 2


def test_the_mean_of_the_parts_losses_is_the_wholes(make_parts: Any) -> None:
    from raylora.adapters.packed import stack

    parts = make_parts(adapter__dropout=0.2, adapter__target_modules="all-linear")
    pack = stack([parts.member(unit, trained=0.05) for unit in parts.units])
    whole = parts.pack(parts.batch(0, 5), parts.batch(10, 5))
    expected = parts.model.gradients(pack, whole, [1, 2])
    for count in (2, 3, 7):
        found = [parts.model.gradients(pack, take_part(whole, index, count), [1, 2]) for index in range(count)]
        for k in range(2):
            loss = sum(each.losses_K[k] for each in found) / count
            assert loss == pytest.approx(expected.losses_K[k], rel=1e-5)
            for name, gradient in expected.gradients[k].items():
                mean = sum(each.gradients[k][name] for each in found) / count
                torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-6)
