"""What the generation benchmark trains, and what each contender's answers are worth.

A cell is a task, a base and an adapter. It tries three rates with the first seed, lets the mean member's NLL on the
validation rows pick one, and trains the other seeds at it. The test rows are read once per trained ensemble. The
students of a cell have its base and its adapter, one member, and the same three rates.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.chat_runs import TASKS, spec_of
from raylora.spec import build_spec
from raylora.store.run_store import RunStore

RATES, SEEDS = (3e-4, 1e-3, 3e-3), (0, 1, 2)
STUDENTS: dict[str, dict[str, Any]] = {
    "topk_kl": {"kind": "topk_kl", "top_k": 32},
    "answers": {"kind": "answers"},
    "gkd": {"kind": "gkd", "on_policy": 0.5, "warmup": 0.3},
}
"""What a student learns from its ensemble by: its distributions over the references, its own answers, and its
distributions over what the student writes in every second step."""
Row = dict[str, Any]


def folder_of(folder: str, base: str) -> str:
    """Return where the runs over a base lie: its solved layers are beside them, once for all."""
    return f"{folder}/{base[:4].lower()}"


def prepare_bases(folder: str, bases: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Solve those bases whose layers have to be, before cells ask for them at once."""
    for base in bases:
        _with_base(spec_of(folder_of(folder, base), next(iter(TASKS)), base, "LoRA", 1e-3, 99, sizes))


def _with_base(content: Row) -> Any:
    from raylora.engine.quantization.quantize_base import ensure_prepared
    from raylora.engine.run.plan_run import prepare
    from raylora.engine.training.distillation_loss import task_of

    prepared = prepare(build_spec(content))
    if prepared.base is not None:
        device = torch.device("cuda" if prepared.plan.gpus_per_worker else "cpu")
        ensure_prepared(prepared.spec.base, task_of(prepared.spec), prepared.base, device)
    return prepared


def measure_cell(
    folder: str, task: str, base: str, who: str, sizes: Mapping[str, int], known: Sequence[Row],
    keep: Callable[[Row], None],
) -> None:
    """Measure one adapter, or one of the students of a cell's LoRA ensembles.

    Each row is given to ``keep`` as it comes, but for those that are ``known``: rows of this task, base and sizes that
    were measured before. What is finished in the folder is read and not trained again.
    """
    key, runs = {"task": task, "base": base}, folder_of(folder, base)
    measured = {(row["who"], row["lr"], row["seed"]): row for row in known}

    def lora(lr: float, seed: int) -> Row:
        return train(spec_of(runs, task, base, "LoRA", lr, seed, sizes))

    if who in STUDENTS:
        best = _best([measured.get(("LoRA", lr, SEEDS[0])) or lora(lr, SEEDS[0]) for lr in RATES])

        def taught(lr: float, seed: int) -> Row:
            lora(best, seed)
            teacher = build_spec(spec_of(runs, task, base, "LoRA", best, seed, sizes))
            return _taught(RunStore.for_spec(teacher).uri, who, lr, seed)

        _try_rates(taught, {**key, "who": f"student, {who}"}, measured, keep)
        return
    if who == "LoRA" and ("untuned", None, None) not in measured:
        keep({**key, "who": "untuned", "lr": None, "seed": None, **untuned(folder, task, base, sizes)})
    _try_rates(lambda lr, seed: train(spec_of(runs, task, base, who, lr, seed, sizes)), {**key, "who": who}, measured,
               keep)


def _try_rates(
    trained: Callable[[float, int], Row], key: Row, measured: Mapping[tuple[str, float, int], Row],
    keep: Callable[[Row], None],
) -> None:
    """Train every rate with the first seed, and the one that validation picks with the others."""

    def kept(lr: float, seed: int) -> Row:
        if (key["who"], lr, seed) in measured:
            return measured[key["who"], lr, seed]
        row = trained(lr, seed)
        keep({**key, **row})
        return row

    best = _best([kept(lr, SEEDS[0]) for lr in RATES])
    for seed in SEEDS[1:]:
        kept(best, seed)


def _best(rows: Sequence[Row]) -> float:
    return float(min(rows, key=lambda row: row["validation_nll"])["lr"])


def _taught(teacher: str, who: str, lr: float, seed: int) -> Row:
    from raylora.engine.distillation.plan import prepare_distillation
    from raylora.engine.run.local_driver import run_in_process
    from raylora.spec import DistillSpec

    spec = RunStore(teacher).read_spec()
    loss, answers = dict(STUDENTS[who]), {}
    assert spec.evaluation.generation is not None
    limit = {"max_new_tokens": spec.evaluation.generation.max_new_tokens}
    if who == "gkd":
        loss |= limit
    if who == "answers":
        answers = {"answers": limit}
    content = spec.model_dump(mode="json")
    work = prepare_distillation(teacher, DistillSpec.model_validate({
        "name": f"{who.replace('_', '-')}-{lr:.0e}", "loss": loss, **answers, "alone": False, "costs": False,
        "student": {"base": content["base"], "adapter": content["adapter"], "seed": 100 * seed,
                    "optimization": {**content["optimization"], "lr": lr}},
    }))
    for made in (work.targets, work.answers and work.answers.plan):
        if made is not None and not made.is_done:
            run_in_process(made)
    if work.answers is not None and not work.answers.is_done:
        work.answers.conclude()
    return train(work.student.model_dump(mode="json"))


def train(content: Row) -> Row:
    """Train, evaluate and ask one run, unless that was done, and return its row."""
    from raylora.engine.distillation.plan import is_finished
    from raylora.engine.run.local_driver import run_in_process
    from raylora.engine.run.plan_run import prepare

    spec = build_spec(content)
    store = RunStore.for_spec(spec)
    metrics = store.read_json("metrics.json") if is_finished(store) else run_in_process(prepare(spec))
    answers = store.read_json("answers.json")["sets"]["test"]
    members = range(len(answers["members"]))
    last = [
        [row["validation_nll"] for row in metrics["training"][f"member-{m:03d}"] if "validation_nll" in row][-1]
        for m in members
    ]
    nlls = ("nll", "tokenwise_nll", "sequencewise_nll")
    return {
        "lr": spec.optimization.lr, "seed": spec.ensemble.seed // 100, "validation_nll": statistics.fmean(last),
        "train_s": metrics["timing"]["train_s"], "total_s": metrics["timing"]["total_s"],
        "trainable": metrics["parameters"]["per_member_trainable"],
        "ensemble": {**{key: metrics["ensemble"]["eval"]["test"][key] for key in nlls}, **_worth(answers["ensemble"])},
        "single": {
            **{key: metrics["members"][0]["eval"]["test"][key] for key in nlls}, **_worth(answers["members"][0])
        },
        "mean_member": {
            "nll": metrics["mean_member"]["eval"]["test"]["nll"]["mean"],
            "right": statistics.fmean(_worth(answers["members"][m])["right"] for m in members),
        },
    }


def _worth(described: Mapping[str, Any]) -> Row:
    """Return the share of right answers, how well each doubt tells the wrong ones, and the calibration error."""
    (right,) = described["metrics"].values()
    aurocs = {name: found and found["value"] for name, found in described["error_auroc"].items()}
    return {"right": right["value"], "right_interval": right["interval"], "error_auroc": aurocs,
            "ece": described["ece"]["value"], "aurc": described["risk_coverage"]["aurc"]}


def untuned(folder: str, task: str, base: str, sizes: Mapping[str, int]) -> Row:
    """Return what the base says of the test's answers, and what it answers, before anything is learned."""
    from raylora import registry
    from raylora.adapters.packed import stack
    from raylora.engine.generation.decoder import Sampling
    from raylora.engine.generation.generator import Generator
    from raylora.engine.generation.questions import answer_records
    from raylora.engine.model.base import head_tensors
    from raylora.engine.model.member_tensors import initial_member
    from raylora.engine.model.packed_model import PackedModel
    from raylora.engine.run.session import TrainingSession
    from raylora.engine.training.predict import predict
    from raylora.ensemble.answer_metrics import score_answers
    from raylora.ensemble.outputs.tokens import text_nlls

    prepared = _with_base(spec_of(folder_of(folder, base), task, base, "LoRA", 1e-3, 99, sizes))
    plan = prepared.plan
    prepared.begin()
    session = TrainingSession(prepared.spec, prepared.store, cpus=plan.cpus_per_worker, gpus=plan.gpus_per_worker)
    session.load()
    adapter = registry.load("adapter", "lora").build(prepared.spec.adapter)
    member = initial_member(session.base, adapter, head_tensors(session.base),
                            next(iter(session.plans.values())).stream("init"))
    stacked = stack([{name: tensor.to(session.base.device) for name, tensor in member.items()}])
    model, examples = PackedModel(session.base, adapter, session.task), session.sets.test.examples
    values, ids = predict(model, stacked, examples, 32)
    writer = Generator(model, stacked, "mean_probabilities")
    records = answer_records(writer, examples, Sampling(TASKS[task]["max_new_tokens"]), each_member=False, batch=32)
    said, references = [one["answer"]["text"] for one in records], [one["reference"] for one in records]
    metric = TASKS[task]["metric"]
    return {"single": {
        "nll": -float(values.double().mean()), "sequencewise_nll": float(text_nlls(values, ids)[1].mean()),
        "right": float(score_answers(said, references, (metric,))[metric].mean()),
    }}
