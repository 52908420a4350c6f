"""A finished run as a predictor: all members over one base, with how sure they are together.

Shapes: M members, N texts, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from raylora import registry
from raylora.adapters.base import Tensors
from raylora.data.sources import load_rows
from raylora.data.task import BadRow, Example, Task
from raylora.engine.base import Base, compute_device, load_base
from raylora.engine.lessons import read_outputs, task_of
from raylora.engine.members import finished_members, member_facts, member_tensors, stacked_members
from raylora.engine.predict import predict
from raylora.engine.prepared import prepared_store
from raylora.ensemble.aggregate import aggregate_logits
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


class LoadedEnsemble:
    """The members of a run on its base, ready to predict."""

    def __init__(
        self, spec: RunSpec, base: Base, task: Task, members: Mapping[str, Tensors],
        layouts: Mapping[str, Any] | None = None,
    ) -> None:
        """Take members by name; what they need but did not train is made again from their seeds.

        Args:
            layouts: what each member's untrained tensors were when it was trained.

        Raises:
            RunDirectoryError: they come out differently now.
        """
        self.spec, self.base, self.task = spec, base, task
        self.members = len(members)
        self._adapter = registry.load("adapter", spec.adapter.kind).build(spec.adapter)
        self._stacked = stacked_members(spec, base, members, layouts)

    def predict(self, texts: Sequence[str | Mapping[str, Any]], batch: int = 64) -> list[Prediction]:
        """Return a prediction per text; a mapping gives the task's columns (a pair, a question and its choices).

        Raises:
            DataError: nothing was given, or a row does not fit the task; the message names it.
        """
        if not texts:
            raise DataError("nothing to predict", "give at least one text")
        examples, truncated = [], []
        for index, text in enumerate(texts):
            row = {"text": text} if isinstance(text, str) else dict(text)
            row.pop(self.task.label_column or "", None)
            example, cut = self._tokenise(row, index)
            examples.append(example)
            truncated.append(cut)
        outputs_MNO, _ = predict(self.base, self._adapter, self.task, self._stacked, examples, batch)
        logits_MNC, expected_MN = read_outputs(self.task, outputs_MNO)
        return self._describe(logits_MNC, expected_MN, examples, truncated)

    def _tokenise(self, row: dict[str, Any], index: int) -> tuple[Example, bool]:
        try:
            return self.task.tokenise(row, str(row.get("id", index)), self.base.tokenizer)
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


def load_ensemble(run: str, gpus: int | None = None) -> LoadedEnsemble:
    """Load the members of a run directory over its base.

    Raises:
        RunDirectoryError: there is no run, or no member is finished.
        UsageError: the run's task gives no class probabilities.
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
    return LoadedEnsemble(spec, base, task, members, layouts)


def read_rows(path: str) -> list[dict[str, Any]]:
    """Return the rows of a jsonl, csv, parquet or arrow file.

    Raises:
        DataError: the file cannot be read, or a line of it; the message says which.
    """
    table = load_rows(SetSpec(files=path), Path())
    if table.bad:
        raise DataError(table.bad[0], "mend the row: predictions are never silently left out")
    return [dict(row.values) for row in table.rows]


def write_rows(path: str, predictions: Iterable[Prediction]) -> None:
    """Write predictions as JSON lines; the file appears whole or not at all."""
    target = Path(path)
    temporary = target.with_name(target.name + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(prediction.record(), ensure_ascii=False) + "\n")
    temporary.replace(target)
