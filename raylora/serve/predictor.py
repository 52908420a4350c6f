"""A finished run as a predictor: all members over one base, with how sure they are together.

Shapes: M members, N texts, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylora import registry
from raylora.adapters.base import Tensors
from raylora.adapters.export import from_peft
from raylora.adapters.packed import stack
from raylora.data.sources import load_rows
from raylora.data.task import BadRow, Example, Task
from raylora.engine.base import Base, compute_device, load_base
from raylora.engine.forward import expected_layout, fixed_tensors
from raylora.engine.persist import check_layout, from_bytes, json
from raylora.engine.predict import predict
from raylora.engine.prepared import prepared_store
from raylora.engine.units import units_of
from raylora.ensemble.aggregate import aggregate_logits
from raylora.ensemble.uncertainty import decompose
from raylora.errors import DataError, RunDirectoryError, UsageError
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
        seeds = {unit.name: unit.stream("fixed") for unit in units_of(spec)}
        fixed = {name: fixed_tensors(base, self._adapter, seeds[name]) for name in members}
        for name in members:
            recorded = (layouts or {}).get(name)
            check_layout(name, recorded, expected_layout(base, self._adapter, fixed[name]))
        self._stacked = stack([
            {n: t.to(base.device) for n, t in tensors.items()} | fixed[name] for name, tensors in members.items()
        ])

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
        logits_MNC, _ = predict(self.base, self._adapter, self.task, self._stacked, examples, batch)
        return self._describe(logits_MNC, examples, truncated)

    def _tokenise(self, row: dict[str, Any], index: int) -> tuple[Example, bool]:
        try:
            return self.task.tokenise(row, str(row.get("id", index)), self.base.tokenizer)
        except BadRow as error:
            raise DataError(f"row {index}: {error}", f"a row has the columns {', '.join(self.task.columns)}") from None

    def _describe(self, logits_MNC: Any, examples: Sequence[Example], truncated: Sequence[bool]) -> list[Prediction]:
        names = self.task.label_names or [str(c) for c in range(logits_MNC.shape[2])]
        probs_NC = aggregate_logits(logits_MNC, self.spec.ensemble.aggregate).exp()
        member_MNC = logits_MNC.double().softmax(dim=-1)
        uncertainty = decompose(logits_MNC)
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
    names = [name for name in store.storage.list("members") if ".tmp-" not in name]
    files = {name: store.load_result(f"members/{name}") for name in names if store.has_result(f"members/{name}")}
    if not files:
        raise RunDirectoryError(f"{store.uri}: no member is finished", f"raylora resume {store.uri}")
    members = {name: member_tensors(found) for name, found in files.items()}
    layouts = {name: member_facts(found).get("layout") for name, found in files.items()}
    task = registry.load("task", spec.task.kind).build(spec.task)
    if task.num_classes is None:
        raise UsageError(
            f"{store.uri}: a {spec.task.kind} run has no classes to predict", "its members load with PEFT to generate"
        )
    device = compute_device(torch.cuda.device_count() if gpus is None else gpus)
    base = load_base(spec.base, spec.adapter, task, device, prepared_store(store))
    return LoadedEnsemble(spec, base, task, members, layouts)


def member_tensors(files: Mapping[str, bytes]) -> Tensors:
    """Return what a member's folder holds, under raylora's names."""
    config = files.get("adapter_config.json")
    return from_peft(from_bytes(files["adapter_model.safetensors"]), json.loads(config) if config else None)


def member_facts(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the plain facts that a member's folder holds: its seed, adapter, base and history."""
    return json.loads(files["member.json"])


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
