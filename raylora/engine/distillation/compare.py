"""What distillation kept and what it saved: the teacher, one of its members, and the student with and without it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

from raylora.distill import AsksTeacher
from raylora.engine.distillation.costs import Contender, measure
from raylora.engine.distillation.plan import Distillation, is_finished
from raylora.engine.distillation.target_job import FACTS
from raylora.engine.run.answer_summary import FACTS as ANSWERS_FACTS
from raylora.engine.run.roster import check_whole, read_roster
from raylora.engine.run.speakers import read_speakers, voice_of
from raylora.engine.training.distillation_loss import loss_of, task_of
from raylora.ensemble.outputs import output_of
from raylora.records import (
    ContenderMetrics,
    Contenders,
    Description,
    DistillationRecord,
    Parameters,
    RunMetrics,
    TargetFacts,
)
from raylora.store.run_store import RunStore

FOLDER = "distillation"


def compare(work: Distillation) -> DistillationRecord:
    """Return the comparison, and write it below ``distillation`` in the teacher's run.

    Raises:
        StoreError: a member is damaged.
    """
    student, output = RunStore.for_spec(work.student), output_of(task_of(work.teacher).output)
    members = read_speakers(work.store, work.teacher, read_roster(work.store).members()).names
    rows: Contenders = {
        "teacher": _row(f"Teacher: ensemble of {len(members)}", work.store, work.store, "ensemble", len(members)),
        "single": _row("Teacher's member 0", work.store, work.store, "single", 1),
        "student": _row(
            f"Student ({work.settings.loss.kind})", student, work.store, "ensemble", work.settings.student.members
        ),
    }
    if work.alone is not None:
        rows["alone"] = _row(
            "Student without a teacher", RunStore.for_spec(work.alone), work.store, "ensemble",
            work.settings.student.members,
        )
    record: DistillationRecord = {
        "key": key_of(work),
        "name": work.settings.name, "taught_by": work.settings.teacher, "targets": _targets(work), "contenders": rows,
    }
    if work.settings.costs:
        measured, where = measure([
            Contender("teacher", work.store.uri, tuple(members)),
            Contender("single", work.store.uri, tuple(read_roster(work.store).members()[:1])),
            Contender("student", student.uri, tuple(read_roster(student).members())),
        ])
        record["measured_on"] = where
        for name, row in rows.items():  # alone is the same model: its costs are the student's
            row.update(cast(ContenderMetrics, measured["student" if name == "alone" else name]))
    record["output"] = output.name
    record["retained_metric"] = _retained(rows, output.retained)
    work.store.write_json(f"{FOLDER}/{work.settings.name}.json", record)
    return record


def key_of(work: Distillation) -> str:
    """Return by what a comparison is known again: the targets, the students' specs and what is measured."""
    digests = [student.digest() for student in work.students()]
    return hashlib.sha256(json.dumps([work.key, digests, work.settings.costs]).encode()
                          ).hexdigest()[:16]


def made_before(work: Distillation) -> DistillationRecord | None:
    """Return the comparison of just this distillation, if all of it is there and whole."""
    has_taught = all(part.is_done for part in (work.targets, work.answers) if part is not None)
    if not has_taught or not all(is_finished(RunStore.for_spec(student)) for student in work.students()):
        return None
    record: DistillationRecord | None = work.store.read_json(f"{FOLDER}/{work.settings.name}.json")
    if record is None or record.get("key") != key_of(work):
        return None
    for student in work.students():
        check_whole(RunStore.for_spec(student))
    return record


def _retained(rows: Contenders, metric: str | None) -> str | None:
    """Add to every contender its share of the teacher's score, and return the metric; some outputs have none."""
    taught: Mapping[str, Any] = rows["teacher"]["eval"]["test"]
    for row in rows.values():
        said: Mapping[str, Any] = row["eval"]["test"]
        own, whole = (one.get(metric) if metric else None for one in (said, taught))
        # A teacher whose values do not rise with the labels has nothing of which there could be a share.
        row["retained_score"] = own / whole if own is not None and whole is not None and whole > 0 else None
    return metric


def distillations(store: RunStore) -> list[DistillationRecord]:
    """Return every comparison that a run has been through, by name."""
    names = [name for name in store.storage.list(FOLDER) if name.endswith(".json")]
    return [store.read_json(f"{FOLDER}/{name}") for name in names]


def _row(label: str, store: RunStore, teacher: RunStore, group: str, members: int) -> ContenderMetrics:
    """Return one contender: its metrics on the run's sets, what its answers score, and its parameters."""
    metrics: RunMetrics = store.read_json("metrics.json")
    answers = _answers(store, teacher, group)
    # As a baseline member 0 has intervals; baselines may be off in the spec, but it is measured in any case.
    single: Description = metrics.get("baselines", {}).get("single") or metrics["members"][0]
    spoken = metrics.get("weighted", {}).get(voice_of(store.read_spec().ensemble), metrics["ensemble"])
    found = spoken if group == "ensemble" else single
    counts = metrics["parameters"]
    return {
        "label": label,
        "eval": found["eval"],
        "ood": found.get("ood", {}),
        **({"answers": answers} if answers else {}),
        "parameters": _in_use(counts, members),
        "trainable_parameters": members * counts["per_member_trainable"],
    }


def _answers(store: RunStore, teacher: RunStore, group: str) -> dict[str, dict[str, Any]]:
    """Return by set the scores of written answers and their intervals, if they were asked for as the teacher's were."""
    found, asked = store.read_json(ANSWERS_FACTS), teacher.read_json(ANSWERS_FACTS)
    if found is None or asked is None or found["settings"] != asked["settings"]:
        return {}
    members = read_roster(store).members()
    if group != "ensemble" and read_speakers(store, store.read_spec(), members).names[0] != members[0]:
        return {}  # member 0 was not selected, so it was not asked
    said = {name: one["ensemble"] if group == "ensemble" else one["members"][0] for name, one in found["sets"].items()}
    return {
        name: {
            **{metric: score["value"] for metric, score in one["metrics"].items()},
            "intervals": {metric: score["interval"] for metric, score in one["metrics"].items() if "interval" in score},
        }
        for name, one in said.items() if "metrics" in one
    }


def _in_use(counts: Parameters, members: int) -> int:
    """Return the numbers that members together need to predict."""
    own = counts["per_member_trainable"]
    if own >= counts["base"]:  # a fully fine-tuned member uses nothing of the base
        return members * own
    # A member's head takes the place of the one that the base was loaded with.
    return counts["base"] - counts.get("head", 0) + members * own


def _targets(work: Distillation) -> TargetFacts:
    if work.targets is None:
        answered: TargetFacts = work.answers.facts() if work.answers is not None else {}
        return {**_asked(work), **answered}
    facts = work.targets.store.read_json(FACTS)
    shown = ("rows", "members", "tokens", "positions", "size_bytes", "rounding_error", "made_s")
    return cast(TargetFacts, {key: facts[key] for key in shown if facts.get(key) is not None})


def _asked(work: Distillation) -> TargetFacts:
    """Return who was asked about what, where the teacher stayed loaded."""
    loss, facts = loss_of(work.student), TargetFacts(rows=work.rows, members=work.members)
    return {**facts, "on_policy": loss.writing.share} if isinstance(loss, AsksTeacher) else facts
