"""What every registered output and loss promises, and what a newcomer needs: a toy task and a toy output are added."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raylora import registry
from raylora.data.task import BadRow, Batch, require_labels
from raylora.data.tasks.sequences import SequenceTask
from raylora.distill import Loss, targets_class
from raylora.engine.model.serialization import join_members, pack_predictions, unpack_predictions
from raylora.engine.run.local_driver import run_in_process
from raylora.engine.run.plan_run import prepare
from raylora.ensemble import METRICS, summarize
from raylora.ensemble.groups import Group, Settings
from raylora.ensemble.outputs import output_of
from raylora.ensemble.outputs.base import Contributors, Rows
from raylora.ensemble.outputs.classes import Classes
from raylora.ensemble.predictions import Predictions
from raylora.errors import SpecError
from raylora.report import console_table, write_report
from raylora.report.outputs.base import OutputSection, section_of
from raylora.spec import EvaluationSpec, TaskSpec

ROWS = 24
FEW = EvaluationSpec(bootstrap_samples=20)
SUM_OF_ROWS = {"classes": lambda x: x.softmax(-1), "value": lambda x: x, "tokens": lambda x: x.exp()}


def some_values(output: str, members: int, seed: int, rows: int = ROWS) -> Tensor:
    """Return predictions that an output accepts."""
    generator = torch.Generator().manual_seed(seed)
    dimensions = output_of(output).predictions.dimensions
    values = torch.randn((members, rows, 3)[:dimensions], generator=generator)
    return -values.abs() if output_of(output).per_token else values


def group_of(output: str, members: int = 3) -> list[Predictions]:
    """Return an ensemble's predictions of a validation and a test set."""
    kind = output_of(output)
    labels: Tensor | None = None
    if not kind.per_token:
        labels = torch.arange(ROWS) % 3 if kind.predictions.dimensions == 3 else torch.linspace(-1, 1, ROWS)
    return [
        kind.predictions(name=name, role=name, ids=[f"{name}-{row}" for row in range(ROWS)], labels_N=labels,
                         values=some_values(output, members, seed))
        for seed, name in enumerate(("validation", "test"))
    ]


@pytest.mark.parametrize("output", registry.kinds("output"))
def test_an_output_names_itself_and_only_metrics_of_the_table(output: str) -> None:
    kind = output_of(output)
    section = section_of({"output": output})
    assert kind.name == output and kind.predictions.output == output and set(kind.rules) <= {
        "mean_probabilities", "mean_logits"
    }
    told = {*kind.validation, *section.compared, *section.secondary, *section.members, *section.curve,
            *section.headline, *section.detection, *section.retained, *section.distilled, *section.watched}
    assert told <= METRICS.keys() and "nll" in kind.validation
    assert kind.retained is None or kind.retained in section.compared


@pytest.mark.parametrize("output", registry.kinds("output"))
def test_predictions_read_back_and_join_member_by_member(output: str) -> None:
    whole = group_of(output)
    parts = [unpack_predictions(pack_predictions([one.member(m) for one in whole])) for m in range(3)]
    for joined, before in zip(join_members(parts), whole, strict=True):
        assert type(joined) is type(before) and torch.equal(joined.values, before.values)
        assert joined.ids == before.ids and (joined.labels_N is None) is (before.labels_N is None)


@pytest.mark.parametrize("output", registry.kinds("output"))
def test_a_summary_holds_what_its_report_shows(output: str, tmp_path: Path) -> None:
    group = group_of(output)
    summary = summarize({"ensemble": group}, FEW)
    section = section_of(summary)
    scores = summary["ensemble"]["eval"]["test"]
    assert summary["output"] == output and {*section.compared, *section.secondary} <= scores.keys()
    assert set(section.headline) <= summary["gains"]["test"]["over_mean_member"].keys()
    # Jensen: the mixture's NLL is at most the mean member's, whatever is predicted.
    if output != "value":  # whose members have noises of their own
        assert scores["nll"] <= summary["mean_member"]["eval"]["test"]["nll"]["mean"] + 1e-9
    page, *plots = write_report(summary, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert plots and all(METRICS[metric].label in text for metric in section.compared)
    assert console_table(summary).row_count == 3  # the ensemble, its mean member, one member


@pytest.mark.parametrize("output", registry.kinds("output"))
def test_identical_members_are_one_member_and_validation_scores_each(output: str) -> None:
    kind = output_of(output)
    (validation, _) = group_of(output)
    found = kind.validation_metrics(validation, FEW)
    assert len(found) == 3 and all(set(one) == set(kind.validation) for one in found)
    one = kind.validation_metrics(validation.member(1), FEW)
    assert one == [found[1]]


@pytest.mark.parametrize("output", registry.kinds("output"))
def test_records_speak_of_every_row_or_say_why_not(output: str) -> None:
    kind = output_of(output)
    values = some_values(output, 2, 0, rows=2)
    rows = Rows(["a", "b"], [False, True], [], "mean_probabilities", {}, Contributors(2, 3))
    if kind.unpredictable_reason:
        with pytest.raises(SpecError, match=kind.name):
            kind.records(values, None, rows)
        return
    records = kind.records(values, None, rows)
    assert [one.id for one in records] == ["a", "b"] and records[1].record()["truncated"] is True
    assert all(len(one.cells()) == len(one.heads) for one in records)
    assert all("2 of 3 members" in one.caption() and one.record()["members_asked"] == 3 for one in records)


@pytest.mark.parametrize("name", registry.kinds("loss"))
def test_a_loss_teaches_a_registered_output_and_scores_each_row_alone(name: str) -> None:
    module = registry.load("loss", name)
    spec = module.Spec()
    loss: Loss = module.build(spec)
    assert spec.kind == name and type(spec).model_validate_json(spec.model_dump_json()) == spec
    kind = output_of(loss.teaches)
    if kind.per_token:  # its targets are positions, tested with their own reader
        assert loss.outputs(7) == 7
        return
    classes = 3 if targets_class(loss.teaches).dimensions == 3 else 1
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn((5, 2, classes)[: targets_class(loss.teaches).dimensions], generator=generator)
    # Several heads learn from as many members: outputs() says how wide a student has to be.
    spec = module.Spec(members=2) if "members" in module.Spec.model_fields else spec
    loss = module.build(spec)
    student = torch.randn(5, loss.outputs(classes), generator=generator, requires_grad=True)
    losses = loss.per_example(student, targets, None)
    assert losses.shape == (5,) and bool(torch.isfinite(losses).all())
    alone = loss.per_example(student[2:3], targets[2:3], None)
    torch.testing.assert_close(losses[2:3], alone, rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(losses[1], student)
    assert gradient[1].any() and not gradient[[0, 2, 3, 4]].any()


@pytest.mark.parametrize("name", registry.kinds("compensation"))
def test_a_compensation_lowers_the_error_that_it_is_made_for(name: str) -> None:
    module = registry.load("compensation", name)
    spec = module.Spec(rank=4)
    assert spec.kind == name and type(spec).model_validate_json(spec.model_dump_json()) == spec
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(24, 40, generator=generator)
    x_NI = torch.randn(200, 40, generator=generator)
    rtn = registry.load("quantization", "rtn")
    quantize = rtn.build(rtn.Spec(bits=2)).quantize
    quantized, a_RI, b_OR = module.build(spec).solve(
        weight_OI, lambda changed_OI: quantize(changed_OI, None, "layer"), x_NI.T @ x_NI / len(x_NI), "layer"
    )
    assert a_RI.shape == (4, 40) and b_OR.shape == (24, 4)
    residual_OI = weight_OI - quantized.dequantize().float()
    plain_OI = weight_OI - quantize(weight_OI, None, "layer").dequantize().float()
    left, plain = float((x_NI @ (residual_OI - b_OR @ a_RI).T).norm()), float((x_NI @ plain_OI.T).norm())
    if spec.tunes_together:  # a layer alone is where its pair begins; what comes of all is lowered once they are solved
        assert left == plain and not b_OR.any() and a_RI.any()
    else:
        assert left < plain


# --- newcomers ----------------------------------------------------------------------------------------------
class ToySpec(TaskSpec):
    """Whether a text is long."""

    kind: Literal["toy"] = "toy"


class ToyTask(SequenceTask):
    """A task on an existing output: all that is new is the label and the head's size."""

    label_names: ClassVar[list[str]] = ["short", "long"]
    num_outputs = 2

    def model_kwargs(self) -> dict[str, Any]:
        """Return the head's size."""
        return {"num_labels": 2}

    def label(self, row: Mapping[str, Any]) -> int | None:
        """Return 1 for a long text. Raises: BadRow without a text."""
        if "text" not in row:
            raise BadRow("no text")
        return int(len(row["text"]) > 100) if "label" in row else None

    def scores(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the head's logits."""
        return logits.float()

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(scores, require_labels(batch), reduction="none")


class ToyPredictions(Predictions):
    """Logits under another name."""

    output: ClassVar[str] = "toy_output"
    dimensions: ClassVar[int] = 3


class ToyOutput(Classes):
    """A new output: another summary and another page."""

    name = "toy_output"
    predictions = ToyPredictions  # type: ignore[assignment]
    rules = ("mean_probabilities",)
    validation = ("nll", "accuracy", "brier", "ece")
    retained = "accuracy"

    def summarize(self, groups: Mapping[str, Group], settings: Settings) -> dict[str, Any]:
        """Return the classes' summary under the toy's name."""
        return {**super().summarize(groups, settings), "output": self.name}


def toy_section() -> OutputSection:
    """Return a page that speaks of accuracy alone."""
    plain: tuple[str, ...] = ("accuracy",)
    return OutputSection(
        compared=plain, compared_text="The toy output is right this often.", secondary=(), secondary_title="",
        secondary_text="", members=plain, shifted=plain, curve=plain, headline=plain, watched=("nll",), distilled=plain,
    )


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ToyTask]]:
    """Register a task and an output as a user's package would: one module and one line each."""

    def add(seam: str, name: str, **content: Any) -> None:
        module = ModuleType(f"toy_{seam}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(registry.REGISTRY[seam], name, module.__name__)

    add("task", "toy", Spec=ToySpec, build=ToyTask)
    add("output", "toy_output", build=ToyOutput)
    add("report", "toy_output", SECTION=toy_section())
    yield ToyTask


@pytest.mark.parametrize("output", ["classes", "toy_output"])
def test_a_toy_task_trains_is_evaluated_and_reported(
    output: str, toys: type[ToyTask], make_spec: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toys, "output", output)
    spec = make_spec(
        task={"kind": "toy", "max_length": 24}, optimization={"lr": 0.002, "steps": 6, "micro_batch": 8},
        ensemble__regularizers={"early_stopping": {"metric": "accuracy"}},
    )
    metrics = run_in_process(prepare(spec))
    assert metrics["output"] == output and metrics["run"]["task"] == "toy"
    assert 0 <= metrics["ensemble"]["eval"]["test"]["accuracy"] <= 1
    page = write_report(metrics, tmp_path / "page")[0].read_text(encoding="utf-8")
    assert ("The toy output is right this often." in page) is (output == "toy_output")
