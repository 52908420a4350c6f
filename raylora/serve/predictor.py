"""A finished run as a predictor: all members over one base, with how sure they are together.

Shapes: M members, N texts, C classes (1 for a real value).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raylora import registry
from raylora.adapters.base import Tensors
from raylora.data.task import BadRow, Example, Task
from raylora.engine.model.base import Base, load_base
from raylora.engine.model.machine import compute_device
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.model.quantized_layers import prepared_store
from raylora.engine.run.finished_members import member_facts, member_tensors, stacked_members
from raylora.engine.run.roster import read_roster
from raylora.engine.training.distillation_loss import read_outputs, task_of
from raylora.engine.training.predict import predict
from raylora.ensemble.outputs import output_of
from raylora.ensemble.outputs.base import Contributors, Rows
from raylora.errors import DataError, UsageError
from raylora.records import GroupMetrics
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore


class LoadedEnsemble:
    """The members of a run on its base, ready to predict."""

    def __init__(
        self, spec: RunSpec, base: Base, task: Task, members: Mapping[str, Tensors],
        layouts: Mapping[str, Any] | None = None, described: GroupMetrics | None = None, calibrated: bool = True,
    ) -> None:
        """Take members by name; what they need but did not train is made again from their seeds.

        Args:
            layouts: what each member's untrained tensors were when it was trained.
            described: what the run's summary says of the ensemble: its temperature, a regression's noise. What was
                fitted for other members than these is left out.
            calibrated: whether predictions use the temperature, where one was fitted that can be trusted.

        Raises:
            RunDirectoryError: they come out differently now.
        """
        self.spec, self.base, self.task = spec, base, task
        self.members, self.calibrated = len(members), calibrated
        self._described: GroupMetrics = described if described and described.get("members") == len(members) else {}
        self.model = PackedModel(base, registry.load("adapter", spec.adapter.kind).build(spec.adapter), task)
        self._stacked = stacked_members(spec, base, members, layouts)

    def __repr__(self) -> str:
        """Return what it is: whose members, on which base, and how they answer."""
        temperature = self._rows([], []).temperature
        how = f"calibrated with T = {temperature:.2f}" if temperature is not None else "not calibrated"
        return (
            f"<raylora ensemble: {self.members} of {self.spec.ensemble.members} {self.spec.adapter.kind} members over "
            f"{self.spec.base.source} ({self.spec.base.quantization.kind}), {self.spec.task.kind}, {how}>"
        )

    def predict(self, texts: str | Sequence[str | Mapping[str, Any]], batch: int = 64) -> list[Any]:
        """Return a prediction per text; a mapping gives the task's columns (a pair, a question and its choices).

        A plain string is one text. A row of classes gets a :class:`Prediction`, one of a regression a
        :class:`ValuePrediction`.

        Raises:
            DataError: nothing was given, or a row does not fit the task; the message names it.
        """
        if isinstance(texts, str):
            texts = [texts]
        if not texts:
            raise DataError("nothing to predict", "give at least one text")
        examples, truncated = [], []
        for index, text in enumerate(texts):
            row = {"text": text} if isinstance(text, str) else dict(text)
            row.pop(self.task.label_column or "", None)
            example, cut = self._tokenize(row, index)
            examples.append(example)
            truncated.append(cut)
        outputs_MNO, _ = predict(self.model, self._stacked, examples, batch)
        values, expected_MN = read_outputs(self.task, outputs_MNO)
        rows = self._rows([example.id for example in examples], truncated)
        return output_of(self.task.output).records(values, expected_MN, rows)

    def _rows(self, ids: Sequence[str], truncated: Sequence[bool]) -> Rows:
        return Rows(
            ids, truncated, self.task.label_names, self.spec.ensemble.aggregate, self._described,
            Contributors(self.members, self.spec.ensemble.members), self.calibrated,
        )

    def _tokenize(self, row: dict[str, Any], index: int) -> tuple[Example, bool]:
        try:
            return self.task.tokenize(row, str(row.get("id", index)), self.base.tokenizer)
        except BadRow as error:
            raise DataError(f"row {index}: {error}", f"a row has the columns {', '.join(self.task.columns)}") from None


def load_ensemble(
    run: str, gpus: int | None = None, calibrated: bool = True, allow_missing: bool = False
) -> LoadedEnsemble:
    """Load the members of a run directory over its base.

    Args:
        calibrated: apply the temperature that the run fitted on its validation split, unless the fit told nothing.
        allow_missing: go on without members that are damaged, missing or not finished; every record says so.

    Raises:
        StoreError: a member is damaged or missing.
        RunDirectoryError: there is no run, or a member is not finished.
        UsageError: the run's task gives neither class probabilities nor values.
    """
    import torch

    store = RunStore(run)
    spec = store.read_spec()
    names = read_roster(store).members(allow_missing)
    files = {name: store.load_result(f"members/{name}") for name in names}
    members = {name: member_tensors(found) for name, found in files.items()}
    layouts = {name: member_facts(found).get("layout") for name, found in files.items()}
    task = task_of(spec)
    reason = output_of(task.output).unpredictable_reason
    if reason:
        raise UsageError(f"{store.uri}: a {spec.task.kind} run {reason}")
    device = compute_device(torch.cuda.device_count() if gpus is None else gpus)
    base = load_base(spec.base, spec.adapter, task, device, prepared_store(store))
    described = (store.read_json("metrics.json") or {}).get("ensemble", {})
    return LoadedEnsemble(spec, base, task, members, layouts, described, calibrated)
