"""A finished run as a predictor: all members over one base, with how sure they are together.

Shapes: M members, N texts, C classes (1 for a real value).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from raylora.adapters.base import Tensors
from raylora.data.task import Asks, BadRow, Example, Task
from raylora.engine.generation.answers import Answer
from raylora.engine.generation.generator import BATCH, Generator, Piece, Prompt, sampling
from raylora.engine.model.base import Base, load_base
from raylora.engine.model.machine import compute_device
from raylora.engine.model.packed_model import PackedModel
from raylora.engine.model.quantized_layers import prepared_store
from raylora.engine.run.finished_members import adapters_of, member_facts, member_tensors, stacked_members
from raylora.engine.run.roster import read_roster
from raylora.engine.run.speakers import read_speakers
from raylora.engine.training.distillation_loss import read_outputs, task_of
from raylora.engine.training.member_plan import member_adapters
from raylora.engine.training.predict import predict
from raylora.ensemble.outputs import output_of
from raylora.ensemble.outputs.base import Contributors, Rows
from raylora.ensemble.weights import MemberWeights
from raylora.errors import DataError, UsageError
from raylora.records import GroupMetrics
from raylora.spec import RunSpec
from raylora.store.run_store import RunStore


class LoadedEnsemble:
    """The members of a run on its base, ready to predict."""

    def __init__(
        self, spec: RunSpec, base: Base, task: Task, members: Mapping[str, Tensors],
        layouts: Mapping[str, Any] | None = None, described: GroupMetrics | None = None, calibrated: bool = True,
        weights: MemberWeights | None = None,
    ) -> None:
        """Take members by name; what they need but did not train is made again from their seeds.

        Args:
            layouts: what each member's untrained tensors were when it was trained.
            described: what the run's summary says of the ensemble: its temperature, a regression's noise. What was
                fitted for other members than these is left out.
            calibrated: whether predictions use the temperature, where one was fitted that can be trusted.
            weights: what each member weighs, where that was fitted; by default all weigh alike.

        Raises:
            RunDirectoryError: they come out differently now.
        """
        self.spec, self.base, self.task = spec, base, task
        self.members, self.calibrated, self.weights = len(members), calibrated, weights
        self._weights_M = None if weights is None else weights.weights_M
        self._described: GroupMetrics = described if described and described.get("members") == len(members) else {}
        self.model = PackedModel(base, adapters_of(spec, list(members)), task)
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
            UsageError: the run's task gives neither class probabilities nor values.
        """
        reason = output_of(self.task.output).unpredictable_reason
        if reason:
            raise UsageError(f"a {self.task.spec.kind} run {reason}")
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

    def generate(
        self, prompts: Prompt | Sequence[Prompt], max_new_tokens: int = 128, temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (), seed: int = 0, each_member: bool = False, agreement: bool = False, batch: int = BATCH,
    ) -> list[Any]:
        """Return an :class:`Answer` per prompt, written token by token by the members' mixture.

        A prompt is a text, a chat (messages of ``role`` and ``content``), or a row with the task's columns. A single
        one, given alone, is answered alone. What is drawn depends on ``seed`` and a prompt's ``id`` (or place).

        Args:
            temperature: of the mixture; 0 takes the most probable token each time.
            top_p: draw from the fewest most probable tokens that have this probability together.
            stop: texts that end an answer, beside the model's own end.
            each_member: every member writes its own: a list of answers per prompt.
            agreement: ask every member for its own greedy answer, and say what share of them is the same.
            batch: prompts that are answered at once.

        Raises:
            DataError: nothing was given, or a prompt is empty, of no known shape, or too long.
            UsageError: the run has no model that writes, or a setting makes no sense.
        """
        many = _prompts(prompts)
        found = list(self.answers(many, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop,
                                  seed=seed, each_member=each_member, agreement=agreement, batch=batch))
        return found if each_member else [answers[0] for answers in found]

    def answers(
        self, prompts: Iterable[Prompt], max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0,
        stop: Sequence[str] = (), seed: int = 0, each_member: bool = False, agreement: bool = False, batch: int = BATCH,
    ) -> Iterator[list[Answer]]:
        """Yield the answers to each prompt in order, as :meth:`generate` has them, reading ``batch`` prompts ahead."""
        settings = sampling(max_new_tokens, temperature, top_p, seed, each_member)
        return self.generator().answers(prompts, settings, _texts(stop), batch, agreement)

    def stream(
        self, prompt: Prompt, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0,
        stop: Sequence[str] = (), seed: int = 0, each_member: bool = False,
    ) -> Iterator[Piece]:
        """Yield an answer's pieces as they are written. Raises: DataError and UsageError, as :meth:`generate`."""
        settings = sampling(max_new_tokens, temperature, top_p, seed, each_member)
        return self.generator().stream(prompt, settings, _texts(stop))

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Return what the members say of given answers: rows of ``messages``, or of ``prompt`` and ``completion``.

        Raises:
            DataError: a row does not fit the task.
            UsageError: the run has no model that writes.
        """
        return self.generator().score(rows)

    def generator(self) -> Generator:
        """Return the members as a writer. Raises: UsageError for a run that has no model that writes."""
        return Generator(self.model, self._stacked, self.spec.ensemble.aggregate, self._weights_M)

    def _rows(self, ids: Sequence[str], truncated: Sequence[bool]) -> Rows:
        return Rows(
            ids, truncated, self.task.label_names, self.spec.ensemble.aggregate, self._described,
            Contributors(
                self.members, self.spec.ensemble.members, None if self.weights is None else self.weights.record()
            ), self.calibrated, self._weights_M,
        )

    def _tokenize(self, row: dict[str, Any], index: int) -> tuple[Example, bool]:
        try:
            return self.task.tokenize(row, str(row.get("id", index)), self.base.tokenizer)
        except BadRow as error:
            raise DataError(f"row {index}: {error}", f"a row has the columns {', '.join(self.task.columns)}") from None


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """Return prompts as a list: a text is one, and so are a row and the messages of a chat."""
    is_one = isinstance(prompts, str | Mapping)
    is_chat = not is_one and bool(prompts) and all(isinstance(m, Mapping) and "role" in m for m in prompts)
    many = [prompts] if is_one or is_chat else list(prompts)
    if not many:
        raise DataError("nothing to answer", "give at least one prompt")
    return many


def _texts(stop: str | Sequence[str]) -> list[str]:
    texts = [stop] if isinstance(stop, str) else list(stop)
    if "" in texts:
        raise UsageError("stop: an empty text would end every answer at once", "leave it out")
    return texts


def writes(run: str) -> bool:
    """Return whether a run's model answers in text. Raises: RunDirectoryError where there is no run."""
    return isinstance(task_of(RunStore(run).read_spec()), Asks)


def load_ensemble(
    run: str, gpus: int | None = None, calibrated: bool = True, allow_missing: bool = False, plain: bool = False,
) -> LoadedEnsemble:
    """Load the members of a run directory that speak for it over its base.

    Args:
        calibrated: apply the temperature that the run fitted on its validation split, unless the fit told nothing.
        allow_missing: go on without members that are damaged, missing or not finished; every record says so. Where
            one is missing whom fitted weights need, those that are left weigh alike.
        plain: the plain mean of all members, although the run selected or weighted them.

    Raises:
        StoreError: a member is damaged or missing.
        RunDirectoryError: there is no run, or a member is not finished.
    """
    import torch

    store = RunStore(run)
    spec = store.read_spec()
    speakers = read_speakers(store, spec, read_roster(store).members(allow_missing), plain)
    files = {name: store.load_result(f"members/{name}") for name in speakers.names}
    members = {name: member_tensors(found) for name, found in files.items()}
    layouts = {name: member_facts(found).get("layout") for name, found in files.items()}
    task = task_of(spec)
    device = compute_device(torch.cuda.device_count() if gpus is None else gpus)
    base = load_base(spec.base, member_adapters(spec), task, device, prepared_store(store))
    weights = speakers.weights if speakers.is_fitted else None
    return LoadedEnsemble(spec, base, task, members, layouts, speakers.described, calibrated, weights)
