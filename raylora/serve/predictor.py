"""A finished run as a predictor: all members over one base, with how sure they are together.

Shapes: M members, N texts, C classes (1 for a real value).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from raylora import registry
from raylora.adapters.base import Tensors
from raylora.data.sources import load_rows
from raylora.data.task import BadRow, Example, Task, predicts_value
from raylora.engine.model.base import Base, load_base
from raylora.engine.model.machine import compute_device
from raylora.engine.model.quantized_layers import prepared_store
from raylora.engine.run.finished_members import finished_members, member_facts, member_tensors, stacked_members
from raylora.engine.training.distillation_loss import read_outputs, task_of
from raylora.engine.training.predict import predict
from raylora.ensemble.aggregate import aggregate_logits
from raylora.ensemble.gaussian import epistemic_std, half_width
from raylora.ensemble.regression_metrics import LEVEL
from raylora.ensemble.uncertainty import decompose
from raylora.errors import DataError, UsageError
from raylora.spec import RunSpec, SetSpec
from raylora.store.run_store import RunStore


@dataclass(frozen=True)
class Prediction:
    """What the ensemble says about one row."""

    id: str
    label: str
    probabilities: dict[str, float]
    member_probabilities: list[dict[str, float]]
    entropy: float
    """Predictive entropy in nats: all the uncertainty."""
    mutual_information: float
    """The part of it that the members disagree about: what more data could remove."""
    truncated: bool

    def record(self) -> dict[str, Any]:
        """Return it as a JSON-able mapping."""
        return dict(vars(self))


@dataclass(frozen=True)
class ValuePrediction:
    """What a regression's ensemble says about one row."""

    id: str
    value: float
    """The mean of the members' values."""
    member_values: list[float]
    epistemic_std: float
    """The standard deviation of the members' values: what more data could remove."""
    std: float | None
    """That and the noise fitted on the validation split; None while the run that would fit it is not finished."""
    interval_95: list[float] | None
    """The central 95 % of a Gaussian with this value and ``std``."""
    truncated: bool

    def record(self) -> dict[str, Any]:
        """Return it as a JSON-able mapping."""
        return dict(vars(self))


class LoadedEnsemble:
    """The members of a run on its base, ready to predict."""

    def __init__(
        self, spec: RunSpec, base: Base, task: Task, members: Mapping[str, Tensors],
        layouts: Mapping[str, Any] | None = None, noise_std: float | None = None,
    ) -> None:
        """Take members by name; what they need but did not train is made again from their seeds.

        Args:
            layouts: what each member's untrained tensors were when it was trained.
            noise_std: of a regression, the noise around the members' values.

        Raises:
            RunDirectoryError: they come out differently now.
        """
        self.spec, self.base, self.task = spec, base, task
        self.members, self.noise_std = len(members), noise_std
        self._adapter = registry.load("adapter", spec.adapter.kind).build(spec.adapter)
        self._stacked = stacked_members(spec, base, members, layouts)

    def predict(self, texts: Sequence[str | Mapping[str, Any]], batch: int = 64) -> list[Any]:
        """Return a prediction per text; a mapping gives the task's columns (a pair, a question and its choices).

        A row of classes gets a :class:`Prediction`, one of a regression a :class:`ValuePrediction`.

        Raises:
            DataError: nothing was given, or a row does not fit the task; the message names it.
        """
        if not texts:
            raise DataError("nothing to predict", "give at least one text")
        examples, truncated = [], []
        for index, text in enumerate(texts):
            row = {"text": text} if isinstance(text, str) else dict(text)
            row.pop(self.task.label_column or "", None)
            example, cut = self._tokenize(row, index)
            examples.append(example)
            truncated.append(cut)
        outputs_MNO, _ = predict(self.base, self._adapter, self.task, self._stacked, examples, batch)
        if predicts_value(self.task):
            return self._describe_values(outputs_MNO[..., 0], examples, truncated)
        logits_MNC, expected_MN = read_outputs(self.task, outputs_MNO)
        return self._describe(logits_MNC, expected_MN, examples, truncated)

    def _tokenize(self, row: dict[str, Any], index: int) -> tuple[Example, bool]:
        try:
            return self.task.tokenize(row, str(row.get("id", index)), self.base.tokenizer)
        except BadRow as error:
            raise DataError(f"row {index}: {error}", f"a row has the columns {', '.join(self.task.columns)}") from None

    def _describe(
        self, logits_MNC: Tensor, expected_MN: Tensor | None, examples: Sequence[Example], truncated: Sequence[bool]
    ) -> list[Prediction]:
        names = self.task.label_names or [str(c) for c in range(logits_MNC.shape[2])]
        probs_NC = aggregate_logits(logits_MNC, self.spec.ensemble.aggregate).exp()
        member_MNC = logits_MNC.double().softmax(dim=-1)
        uncertainty = decompose(logits_MNC, expected_entropy_MN=expected_MN)
        return [
            Prediction(
                id=example.id,
                label=names[int(probs_NC[n].argmax())],
                probabilities=dict(zip(names, probs_NC[n].tolist(), strict=True)),
                member_probabilities=[dict(zip(names, row.tolist(), strict=True)) for row in member_MNC[:, n]],
                entropy=float(uncertainty.predictive_entropy_N[n]),
                mutual_information=float(uncertainty.mutual_information_N[n]),
                truncated=truncated[n],
            )
            for n, example in enumerate(examples)
        ]

    def _describe_values(
        self, real_MN: Tensor, examples: Sequence[Example], truncated: Sequence[bool]
    ) -> list[ValuePrediction]:
        found = []
        value_N, between_N = real_MN.double().mean(dim=0), epistemic_std(real_MN)
        for n, example in enumerate(examples):
            value, between, std, interval = float(value_N[n]), float(between_N[n]), None, None
            if self.noise_std is not None:
                std = math.hypot(self.noise_std, between)
                interval = [value - half_width(LEVEL) * std, value + half_width(LEVEL) * std]
            found.append(ValuePrediction(
                example.id, value, real_MN[:, n].tolist(), between, std, interval, truncated[n]
            ))
        return found


def load_ensemble(run: str, gpus: int | None = None) -> LoadedEnsemble:
    """Load the members of a run directory over its base.

    Raises:
        RunDirectoryError: there is no run, or no member is finished.
        UsageError: the run's task gives neither class probabilities nor values.
    """
    import torch

    store = RunStore(run)
    spec = store.read_spec()
    files = {name: store.load_result(f"members/{name}") for name in finished_members(store)}
    members = {name: member_tensors(found) for name, found in files.items()}
    layouts = {name: member_facts(found).get("layout") for name, found in files.items()}
    task = task_of(spec)
    if task.num_classes is None:
        raise UsageError(
            f"{store.uri}: a {spec.task.kind} run has no classes to predict", "its members load with PEFT to generate"
        )
    device = compute_device(torch.cuda.device_count() if gpus is None else gpus)
    base = load_base(spec.base, spec.adapter, task, device, prepared_store(store))
    described = (store.read_json("metrics.json") or {}).get("ensemble", {})
    return LoadedEnsemble(spec, base, task, members, layouts, described.get("noise_std"))


def read_rows(path: str) -> list[dict[str, Any]]:
    """Return the rows of a jsonl, csv, parquet or arrow file.

    Raises:
        DataError: the file cannot be read, or a line of it; the message says which.
    """
    table = load_rows(SetSpec(files=path), Path())
    if table.bad:
        raise DataError(table.bad[0], "mend the row: predictions are never silently left out")
    return [dict(row.values) for row in table.rows]


def write_rows(path: str, predictions: Iterable[Prediction | ValuePrediction]) -> None:
    """Write predictions as JSON lines; the file appears whole or not at all."""
    target = Path(path)
    temporary = target.with_name(target.name + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(prediction.record(), ensure_ascii=False) + "\n")
    temporary.replace(target)
