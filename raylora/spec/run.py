"""RunSpec: everything that decides what a run computes, in one frozen value."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, ValidationError, field_validator, model_validator

from raylora.spec.base import (
    AnyAdapter,
    AnyCompensation,
    AnyLoss,
    AnyQuantization,
    AnyTask,
    AnyTracker,
    Frozen,
    GridSpec,
    Located,
)
from raylora.spec.vary import Varied, check_keys, varied_settings, with_settings

NAME_PATTERN = re.compile(r"^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?\Z")
"""Run names: short enough for a Kubernetes label and safe as a folder name."""


_RUN_FOLDERS = (
    "members", "baselines", "predictions", "checkpoints", "snapshots", "timing", "targets", "export", "plots",
    "distillation", "tensorboard", "wandb", "profile", "trunk", "answers",
)

Beta = Annotated[float, Field(ge=0, lt=1)]
AnswerMetric = Literal["exact_match", "f1", "contains", "number", "choice"]
Normalization = Literal["squad", "space", "none"]


class SetSpec(Located):
    """Where the rows of one data set come from: exactly one of ``source`` and ``files``."""

    source: str | None = None
    """A hub data set id, or ``pypi:NAME``."""
    files: str | list[str] | None = None
    """Paths of jsonl, csv, parquet or arrow files (one format)."""
    subset: str | None = None
    """Which configuration of a hub data set, such as ``sst2`` of GLUE."""
    split: str | None = None
    """Which split of a hub data set."""
    revision: str | None = None
    """Pins a hub data set to a commit, tag or branch."""
    rows: int | None = Field(default=None, ge=1)
    """Use at most this many rows, drawn with the data seed."""
    columns: dict[str, str] = {}
    """Rename: what the task calls a column -> what this set calls it."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """What separates the fields of csv files; by default it is recognized: a comma, a semicolon, a tab or a bar."""

    @model_validator(mode="after")
    def _one_origin(self) -> SetSpec:
        if (self.source is None) == (self.files is None):
            raise ValueError("give exactly one of 'source' and 'files'")
        return self

    @property
    def file_names(self) -> list[str]:
        """The files as they are written."""
        return [self.files] if isinstance(self.files, str) else list(self.files or ())

    def local_paths(self) -> list[str]:
        """Return the files as they are written."""
        return self.file_names


class CalibrationSpec(SetSpec):
    """Plain text that the base reads while it is quantized; its labels, if it has any, are not looked at."""

    samples: int = Field(default=128, ge=1)
    """How many samples are read."""
    length: int = Field(default=512, ge=8)
    """Tokens per sample. A causal model reads whole texts, end to end, cut to this; an encoder one text per sample."""
    held_out: int = Field(default=16, ge=0)
    """Further samples, of other texts, on which perplexity is measured before and after; for causal models."""
    seed: int = 0
    """Decides which texts are read."""


class BaseSpec(Located):
    """The frozen model that all members share."""

    source: str
    """A hub id, a local folder, or ``pypi:NAME`` for a model that comes out of a package registry."""
    revision: str | None = None
    """Pins a hub model to a commit, tag or branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of the base; ``auto`` is bfloat16 where the processor multiplies it natively, else float32.
    Adapters, heads and the optimizer always stay in float32."""
    quantization: AnyQuantization = Field(default_factory=lambda: cast(Any, {"kind": "nf4"}))
    """How the frozen weights are stored."""
    compensation: AnyCompensation | None = None
    """A low-rank pair computed with the quantized weights, by ``cloq`` or ``loftq``; needs rtn or optq."""
    calibration: CalibrationSpec | None = None
    """The text that optq and a compensation read; for rtn and optq only."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """``auto`` is eager on CPU (several times faster backward in bfloat16) and sdpa on GPU."""
    trust_remote_code: bool = False
    """Run code from the model's repository; allowed together with a ``revision`` only."""

    def local_paths(self) -> list[str]:
        """Return the source, where it is a folder, or was when the run was begun."""
        written = self.source.startswith((".", "/", "~")) or self.source in self.places
        return [self.source] if written or Path(self.source).is_dir() else []

    def look_in(self, places: Mapping[str, str]) -> None:
        """Look for the source in its place from now on."""
        self._places.update({self.source: places[self.source]} if self.source in places else {})

    @property
    def folder(self) -> Path | None:
        """The local folder that the source is or was; None for a hub's and a catalog's."""
        paths = self.local_paths()
        return Path(self.places.get(paths[0], paths[0])).expanduser() if paths else None

    @property
    def grid(self) -> GridSpec | None:
        """The grid of a base that is prepared before it is loaded; None where weights are quantized as they load."""
        return self.quantization if isinstance(self.quantization, GridSpec) else None

    @model_validator(mode="after")
    def _pinned_code(self) -> BaseSpec:
        if self.trust_remote_code and not self.revision:
            raise ValueError("trust_remote_code runs code from the model repository: pin it with 'revision'")
        return self

    @model_validator(mode="after")
    def _preparation_is_whole(self) -> BaseSpec:
        grid, kind = self.grid is not None, self.quantization.kind
        if self.compensation is not None and not grid:
            raise ValueError(f"compensation is computed while weights are put on a grid, not for {kind}: "
                             "use quantization kind optq or rtn")
        if self.calibration is not None and not grid:
            raise ValueError(f"quantization {kind} reads no calibration text: use kind optq or rtn, or leave it out")
        reads = [kind] if self.quantization.reads_calibration else []
        reads += ["compensation"] if self.compensation is not None else []
        if reads and self.calibration is None:
            raise ValueError(f"{' and '.join(reads)} need calibration text: "
                             "add calibration: {source: pypi:bbc-news} or {files: texts.jsonl}")
        return self


class DataSpec(Frozen):
    """Training, validation and test rows; without own sets, the last two are split off the training set."""

    train: SetSpec
    """The training rows."""
    validation: SetSpec | None = None
    """A set of its own for validation; by default it is split off the training set."""
    test: SetSpec | None = None
    """A set of its own to test on; by default it is split off the training set."""
    train_rows: int | None = Field(default=None, ge=1)
    """How many rows are trained on, drawn with the data seed; by default all that the splits leave."""
    validation_rows: int = Field(default=500, ge=1)
    """How many rows are split off for validation, if it has no set of its own."""
    test_rows: int = Field(default=1000, ge=1)
    """How many rows are split off for the test, if it has no set of its own."""
    seed: int = 0
    """Decides the split and every sub-sample; members have seeds of their own."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that does not fit the task does: stop with an error that names it, or be counted and left out."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """With ``on_bad_row: skip``, the share of a set's rows beyond which bad rows are an error all the same."""


class EarlyStoppingSpec(Frozen):
    """Stop a member when its validation metric has not improved for ``patience`` epochs, and keep its best state."""

    metric: str = "nll"
    """``nll`` serves every task; ``accuracy``, ``brier`` and ``ece`` need classes, ``rmse`` a regression. With
    ``evaluation.generation`` an instruction task has ``exact_match``, ``f1``, ``contains``, ``number`` and ``choice``,
    of each member's own answers to the validation rows."""
    patience: int = Field(default=1, ge=1)
    """How many epochs in a row may be no better than the best before a member stops."""


class KLSpec(Frozen):
    """``beta * KL(p_theta || p_base)`` (``forward``) or the other direction (``reverse``); arXiv 2310.00035."""

    beta: float = Field(gt=0)
    """Weight of the divergence beside the task's loss."""
    direction: Literal["forward", "reverse"] = "forward"
    """``forward`` is KL(member || base), ``reverse`` is KL(base || member)."""


class RegularizersSpec(Frozen):
    """The regularizers of LoRA ensembles; each is off by default and combines with the others."""

    early_stopping: EarlyStoppingSpec | None = None
    """Stop each member by its own validation metric; null is off."""
    kl: KLSpec | None = None
    """Keep each member's predictions near the untouched base's; null is off."""
    decay_a: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on the A matrices: each step multiplies them by 1 - lr * decay."""
    decay_b: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on the B matrices, or what takes their place."""
    decay_head: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on the task's head."""


class BaselinesSpec(Frozen):
    """Comparisons trained and evaluated in the same run."""

    single: bool = True
    """One LoRA model: member 0 on its own, at no extra cost."""
    mc_dropout: MCDropoutSpec | None = None
    """One member with dropout, evaluated several times; null is off."""
    last_layer: int = Field(default=0, ge=0)
    """Members of an ensemble of heads on the untouched base; 0 is off."""
    checkpoints: int = Field(default=0, ge=0)
    """The last n epoch ends of member 0 as a cheap ensemble; 0 is off."""


class MCDropoutSpec(Frozen):
    """One member trained and evaluated with dropout on the adapter input."""

    dropout: float = Field(default=0.1, gt=0, lt=1)
    """The dropout that the member is trained and evaluated with."""
    passes: int = Field(default=8, ge=2)
    """How many evaluations with dropout make the prediction."""


class EnsembleSpec(Frozen):
    """How many members there are and what makes them differ."""

    members: int = Field(default=5, ge=1)
    """M, how many members are trained."""
    seed: int = 0
    """Member m has this plus m as its seed."""
    seeds: list[int] | None = None
    """A seed per member; by default member m has ``seed + m``."""
    data_order: Literal["own", "shared"] = "own"
    """``own``: each member sees the rows in an order of its own seed. ``shared``: all members see them in one order."""
    bootstrap: bool = False
    """Draw each member's training rows with replacement."""
    aggregate: Literal["mean_probabilities", "mean_logits"] = "mean_probabilities"
    """What the ensemble predicts: the mean of the members' probabilities, or the softmax of their mean logits."""
    regularizers: RegularizersSpec = RegularizersSpec()
    """What keeps members from fitting their rows too closely; all off by default."""
    vary: Varied | None = None
    """What members differ in beside their seeds: keys with lists of values, every combination of which is a member's
    (``{optimization.lr: [1e-4, 3e-4, 1e-3]}``), or with a range (``{low: 1e-4, high: 1e-2, log: true}``) that is drawn
    from for each member; or a list with the keys and values of each member."""
    min_members: int | None = Field(default=None, ge=1)
    """Finish, marked as degraded, if at least this many members survive; by default all must."""

    @model_validator(mode="after")
    def _seeds_match(self) -> EnsembleSpec:
        if self.seeds is not None and len(self.seeds) != self.members:
            raise ValueError(f"{len(self.seeds)} seeds for {self.members} members: give one seed per member")
        if self.seeds is not None and len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds repeat: members with one seed are one member")
        if self.min_members is not None and self.min_members > self.members:
            raise ValueError(f"min_members is {self.min_members}, but there are only {self.members} members")
        if self.vary is not None:
            check_keys(self.vary, self.members)
        return self

    def member_seeds(self) -> list[int]:
        """Return the seed of each member."""
        return list(self.seeds) if self.seeds is not None else [self.seed + m for m in range(self.members)]

    def member_settings(self) -> list[dict[str, Any]]:
        """Return of each member the keys that it has a value of its own for, and the values."""
        return varied_settings(self.vary, self.member_seeds())


class OptimizationSpec(Frozen):
    """How a member is trained; every number is per member, whatever else shares its worker."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW with decoupled weight decay, or plain gradient descent without momentum."""
    lr: float = Field(default=5e-4, gt=0)
    """The highest learning rate of the schedule."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate moves after the warmup: to zero in a line or along a cosine, or not at all."""
    warmup: float = Field(default=0.06, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows; 3 by default, unless ``steps`` is given."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, in place of ``epochs``."""
    restarts: tuple[float, ...] = ()
    """Epochs (steps, where ``steps`` is given) after which the schedule starts anew, with its warmup: what lets a
    finished run train on."""
    micro_batch: int = Field(default=16, ge=1)
    """Rows of one member in one forward pass."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches whose gradients are averaged into one optimizer step."""
    group_by_length: bool = False
    """Batch rows of like length: less padding, a data order that is a little less random."""
    pack_rows: bool = False
    """Train on several short rows in one sequence of at most ``task.max_length`` tokens, none of which sees another:
    hardly any padding, and the losses and gradients of a row per sequence; for tasks that learn token by token.
    Evaluations keep a row per sequence."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Each member's own gradient norm is clipped to this."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed ZeRO stage over the adapter parameters."""
    cache_trunk: bool = False
    """Keep on disk what the blocks below the first adapted one make of the training rows, in bfloat16, and read it
    instead of computing it in every epoch; needs ``adapter.layers: {last: k}``."""
    cache_trunk_gb: float = Field(default=10.0, gt=0)
    """How many gigabytes ``cache_trunk`` may take on each disk that it is on; rows beyond are computed every time."""

    @model_validator(mode="after")
    def _one_length(self) -> OptimizationSpec:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give 'epochs' or 'steps', not both")
        return self

    @model_validator(mode="after")
    def _cached_by_row(self) -> OptimizationSpec:
        if self.pack_rows and self.cache_trunk:
            raise ValueError("cache_trunk keeps rows in sequences of their own: give it or 'pack_rows', not both")
        return self

    @model_validator(mode="after")
    def _restarts_in_order(self) -> OptimizationSpec:
        length = self.steps or self.epochs or math.inf
        ends = [0.0, *self.restarts, length]
        if any(one >= other for one, other in itertools.pairwise(ends)):
            raise ValueError(f"restarts must rise between 0 and the end of training ({length:g})")
        return self


class GenerationSpec(Frozen):
    """Let the ensemble and each member answer the evaluation sets, greedily, when the members are finished."""

    metrics: list[AnswerMetric] = Field(default=["exact_match"], min_length=1)
    """What answers are scored by against the rows' own; by the first one an answer is right or wrong."""
    normalize: Normalization = "squad"
    """What is alike before answers are compared: ``squad`` takes case, punctuation, articles and surplus space out
    (arXiv 1606.05250), ``space`` surplus space alone, ``none`` nothing; ``number`` and ``choice`` read answers as they
    are."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Of an answer, at most."""
    rows: int = Field(default=200, ge=1)
    """Of each set, at most; its first ones."""

    @field_validator("metrics")
    @classmethod
    def _each_metric_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("a metric is given twice: give each at most once")
        return value


class EvaluationSpec(Frozen):
    """What is measured after training; the test split is always evaluated under the name ``test``."""

    in_distribution: dict[str, SetSpec] = {}
    """Further labeled sets: the same task on other text."""
    out_of_distribution: dict[str, SetSpec] = {}
    """Unlabeled sets that a sure model should not be sure about; scored by AUROC against ``test``."""
    bins: int = Field(default=15, ge=2)
    """Bins of equal width of the calibration error."""
    bootstrap_samples: int = Field(default=200, ge=0)
    """Draws behind each interval; 0 leaves the intervals out."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """The share of draws that an interval holds."""
    temperature_scaling: bool = True
    """Fit one temperature on the validation rows; results with it stand beside those without."""
    batch: int = Field(default=64, ge=1)
    """Rows per forward pass of an evaluation, those of all members together; when answers are written, too."""
    generation: GenerationSpec | None = None
    """Answers written to the sets' prompts, for tasks whose rows hold an answer; null is off."""

    @model_validator(mode="after")
    def _distinct_names(self) -> EvaluationSpec:
        names = [*self.in_distribution, *self.out_of_distribution]
        for name in names:
            if not NAME_PATTERN.match(name):
                raise ValueError(f"set name {name!r} must match {NAME_PATTERN.pattern}")
            if name in ("test", "validation", "train") or names.count(name) > 1:
                raise ValueError(f"set name {name!r} is taken")
        return self


class PlacementSpec(Frozen):
    """Where members train; ``auto`` is decided from the machine and explained by ``raylora plan``."""

    strategy: Literal["auto", "replicate", "shard"] = "auto"
    """Whether every worker has the whole base (those of one machine read the same pages), or each holds a part of it
    and gathers the rest block by block as it computes (DeepSpeed ZeRO-3); ``auto`` splits it where a whole one
    does not fit, or where that is much faster."""
    ranks: int | Literal["auto"] = "auto"
    """Over how many processes a base is split, at least 2; for strategy shard."""
    recompute: bool = False
    """Run every block again in the backward pass instead of keeping its activations: less memory for about a third more
    time, and the same members bit for bit."""
    data_parallel: int = Field(default=1, ge=1)
    """How many processes train the same members, each on its part of every batch; the effective batch stays the
    spec's, and ``optimization.zero_stage`` 1 or 2 splits the optimizer's state between them."""
    workers: int | Literal["auto"] = "auto"
    """How many processes train, at least 1."""
    members_per_worker: int | Literal["auto"] = "auto"
    """How many members one worker trains in one forward pass."""
    cpus_per_worker: int | Literal["auto"] = "auto"
    """Cores of each worker, at least 1."""
    gpus_per_worker: Literal["auto", 0, 1] = "auto"
    """GPUs of each worker; ``auto`` is one where the machine has any."""
    scheduling: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy: workers close together (PACK) or apart (SPREAD); STRICT takes no other answer."""
    min_workers: int | None = Field(default=None, ge=1)
    """With how many workers a run begins; the others join as machines appear, as under an autoscaler. By default with
    one, and ``workers`` beyond what the cluster has are refused; with a number they are waited for."""
    resources: dict[str, float] = {}
    """What else each worker needs, as Ray names it: ``{"accelerator_type:H100": 0.001}``, or your own."""
    start_timeout_s: float = Field(default=180.0, gt=0)
    """How long a run waits for the cluster to give it ``min_workers`` workers, and, when all are lost, one."""
    split_last: bool = False
    """Cut the last packs that wait into smaller ones once there are fewer than workers, so that each gets a share. Who
    shares a pack decides a member's last bits: members of packs that were cut equal those of whole ones to tolerance
    only, and which packs are cut depends on when workers are free."""

    @field_validator("resources")
    @classmethod
    def _amounts(cls, value: dict[str, float]) -> dict[str, float]:
        for name, amount in value.items():
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ValueError(f"{name} is placement.cpus_per_worker's or gpus_per_worker's to say, or Ray's own")
            if not amount > 0:
                raise ValueError(f"{name}: must be more than 0")
        return value

    @field_validator("ranks")
    @classmethod
    def _several(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 2:
            raise ValueError("must be at least 2, or 'auto'")
        return value

    @model_validator(mode="after")
    def _begins_with_what_is_asked_for(self) -> PlacementSpec:
        if self.min_workers is not None and isinstance(self.workers, int) and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        return self

    @field_validator("workers", "members_per_worker", "cpus_per_worker")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1, or 'auto'")
        return value


class CheckpointingSpec(Frozen):
    """How often a member's state is committed, and how it is retried."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between two commits; by default they are made at the end of each epoch."""
    num_to_keep: int = Field(default=2, ge=1)
    """How many commits of each member that still trains are kept."""
    max_failures: int = Field(default=3, ge=0)
    """How often a member may be restarted from its last commit after its worker died."""
    keep_final: bool = True
    """Keep the last state of finished members, with their optimizers (about three times a member's size): from it a run
    can train on, and a damaged member is made again without training."""


class ProfileSpec(Frozen):
    """A trace of a few steps of each job, in ``RUN/profile``; what ``raylora run --profile`` asks for."""

    skip: int = Field(default=2, ge=0)
    """How many steps are left out first: they are slower, as memory is allocated and kernels are chosen."""
    steps: int = Field(default=3, ge=1)
    """How many steps are recorded."""


class StudentSpec(Frozen):
    """The model that is taught: a smaller base with an adapter of its own."""

    base: BaseSpec
    """The student's own frozen model."""
    adapter: AnyAdapter = Field(default_factory=lambda: cast(Any, {"kind": "lora"}))
    """What is trained in the student."""
    task: AnyTask | None = None
    """The student's task, by default the teacher's; it may differ in anything but its kind and its labels."""
    members: int = Field(default=1, ge=1)
    """How many members the student has; more than one make it an ensemble, whose prediction is the one that counts."""
    seed: int = 0
    """The student's seed; member m of several has this plus m."""
    optimization: OptimizationSpec | None = None
    """How the student is trained; by default as the teacher was."""


class AnswersSpec(Frozen):
    """The ensemble's own answers, in place of the rows' (sequence-level distillation, arXiv 1606.07947).

    They are written by the mixture of the members. One that ``max_new_tokens`` cuts off, or that does not fit into
    ``task.max_length``, is left out and counted.
    """

    max_new_tokens: int = Field(default=128, ge=1)
    """Of an answer, at most."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the mixture; 0 takes the most probable token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the fewest most probable tokens that have this probability together."""
    seed: int = 0
    """Of what is drawn."""
    surest: float = Field(default=1.0, gt=0, le=1)
    """Keep this share of the answers: those whose tokens the mixture holds most probable, by the mean NLL of one."""
    min_agreement: float = Field(default=0.0, ge=0, le=1)
    """Keep answers that at least this share of the members would give by itself, greedily and once normalized; above 0
    every member answers every row, too."""


class DistillSpec(Frozen):
    """A finished ensemble teaches a student (arXiv 2410.20777); no part of the ensemble's identity."""

    name: str = "student"
    """The student's run directory, inside the teacher's."""
    student: StudentSpec
    """Who is taught."""
    loss: AnyLoss = Field(default_factory=lambda: cast(Any, {"kind": "kl"}))
    """What the student learns from the teacher's predictions by."""
    answers: AnswersSpec | None = None
    """Have the teacher answer every row, and the student learn those answers; for losses ``answers`` and ``gkd``."""
    teacher: Literal["ensemble", "single"] = "ensemble"
    """``single``: member 0 alone teaches."""
    transfer: SetSpec | None = None
    """Further text to be taught on, beside the training rows; its labels, if it has any, are not looked at. With
    ``answers`` its rows need only ask."""
    alone: bool = True
    """Train the same student without a teacher too, which shows what the teacher is worth."""
    costs: bool = True
    """Measure memory and speed of teacher and student, in processes of their own."""

    @field_validator("name")
    @classmethod
    def _free_name(cls, value: str) -> str:
        if not NAME_PATTERN.match(value) or len(value) > 34:
            raise ValueError(f"name {value!r} must match {NAME_PATTERN.pattern} and have at most 34 characters")
        if value in _RUN_FOLDERS:
            raise ValueError(f"name {value!r} is a folder of the run itself: choose another")
        return value


class DistillFromSpec(Frozen):
    """What makes a run a student's: whom and what it learns from, and how. Written by ``raylora distill``."""

    targets: str | None = None
    """The targets' folder below ``targets`` of the run that the student lies in; none where the teacher is asked."""
    teacher: str
    """Digest of the teacher: its spec and its members' weights."""
    members: list[str] | None = None
    """The teacher's members that are asked while the student learns; none where there are targets."""
    answers: str | None = None
    """The folder of the teacher's answers, beside targets; none where the student learns the rows' own."""
    loss: AnyLoss
    """The loss that the student learns by."""
    transfer: SetSpec | None = None
    """Further text that it is taught on."""


class RunSpec(Frozen):
    """A whole run. Two specs with one digest compute the same thing."""

    name: str | None = None
    """The run's folder below ``storage_path``: lower case, digits and dashes; by default made from the digest."""
    storage_path: str = "runs"
    """A local folder or an fsspec URI; the run's own directory is made below it."""
    base: BaseSpec
    """The frozen model that all members share."""
    adapter: AnyAdapter = Field(default_factory=lambda: cast(Any, {"kind": "lora"}))
    """What is trained in each member."""
    task: AnyTask
    """What a row means and what the model is asked for."""
    data: DataSpec
    """The rows."""
    ensemble: EnsembleSpec = EnsembleSpec()
    """How many members, and what makes them differ."""
    optimization: OptimizationSpec = OptimizationSpec()
    """How each member is trained."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """What is measured after training."""
    baselines: BaselinesSpec = BaselinesSpec()
    """Comparisons trained and evaluated in the same run."""
    placement: PlacementSpec = PlacementSpec()
    """Where members train."""
    checkpointing: CheckpointingSpec = CheckpointingSpec()
    """How often states are committed, and how often is tried again."""
    tracking: list[AnyTracker] = Field(default_factory=lambda: cast(Any, [{"kind": "tensorboard"}]))
    """Where the numbers of the run are shown while it goes on; an empty list is nowhere but in the run directory."""
    profile: ProfileSpec | None = None
    """A trace of a few steps of each job; what ``raylora run --profile`` asks for."""
    distill: DistillSpec | None = None
    """Teach a student when the ensemble is finished."""
    distill_from: DistillFromSpec | None = None
    """What a student learns from; only in a student's own run."""

    @field_validator("name")
    @classmethod
    def _safe_name(cls, value: str | None) -> str | None:
        if value is not None and not NAME_PATTERN.match(value):
            raise ValueError(f"run name {value!r} must match {NAME_PATTERN.pattern}")
        return value

    @field_validator("storage_path")
    @classmethod
    def _no_secret_in_uri(cls, value: str) -> str:
        if re.match(r"^[a-z0-9+]+://[^/@]+:[^/@]+@", value):
            raise ValueError("a URI with a password does not belong in a spec: use the environment's credentials")
        return value

    @field_validator("tracking")
    @classmethod
    def _each_once(cls, value: list[AnyTracker]) -> list[AnyTracker]:
        kinds = [tracker.kind for tracker in value]
        if len(set(kinds)) != len(kinds):
            raise ValueError("a kind is given twice: give each at most once")
        return value

    @model_validator(mode="after")
    def _decay_is_stable(self) -> RunSpec:
        lr, rules = self.optimization.lr, self.ensemble.regularizers
        for key in ("decay_a", "decay_b", "decay_head"):
            decay = getattr(rules, key)
            if decay and self.optimization.optimizer == "sgd":
                raise ValueError(f"ensemble.regularizers.{key} is decoupled decay, which sgd lacks: use adamw")
            if lr * decay >= 1:
                raise ValueError(
                    f"lr * {key} = {lr * decay:.3g} >= 1: each step would multiply by {1 - lr * decay:.3g}; "
                    f"lower ensemble.regularizers.{key} below {1 / lr:.3g} or optimization.lr below {1 / decay:.3g}"
                )
        return self

    @model_validator(mode="after")
    def _members_are_valid(self) -> RunSpec:
        known: list[dict[str, Any]] = []
        for m, settings in enumerate(self.ensemble.member_settings()):
            if settings and settings not in known:
                known.append(settings)
                try:
                    self.with_settings(settings)
                except ValidationError as error:
                    said = "; ".join(
                        ".".join([*map(str, one["loc"]), ""]) + " " + one["msg"].removeprefix("Value error, ")
                        for one in error.errors()
                    )
                    raise ValueError(f"ensemble.vary: member {m} with {settings}: {said.strip()}") from None
        return self

    def with_settings(self, settings: Mapping[str, Any]) -> RunSpec:
        """Return this run as a member with such settings of its own sees it. Raises: ValueError."""
        if not settings:
            return self
        content = self.model_dump(mode="json")
        content["ensemble"]["vary"] = None
        return RunSpec.model_validate(with_settings(content, settings))

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the result; a run that is taken up again must not differ in it.

        Where it runs is not part of it: a member is the same in any pack, to float tolerance. Nor is where it is
        shown, what is measured on the way, or whom it teaches afterwards.
        """
        left_out = {"name", "storage_path", "placement", "checkpointing", "tracking", "profile", "distill"}
        if self.distill_from is None:  # runs from before there were students keep their digest
            left_out.add("distill_from")
        found = self.model_dump(mode="json", exclude=left_out)
        if self.distill_from is not None:  # nor those from before a teacher was asked, or had answered
            given = found["distill_from"]
            found["distill_from"] = {k: v for k, v in given.items() if k not in ("members", "answers") or v is not None}
        if not self.optimization.cache_trunk:  # nor do runs from before there was a cache have another
            del found["optimization"]["cache_trunk"], found["optimization"]["cache_trunk_gb"]
        if not self.optimization.pack_rows:  # nor those from before rows were packed
            del found["optimization"]["pack_rows"]
        if self.evaluation.generation is None:  # nor those from before answers were part of a run
            del found["evaluation"]["generation"]
        if self.ensemble.vary is None:  # nor those from before members could differ in more than a seed
            del found["ensemble"]["vary"]
        return found

    def digest(self) -> str:
        """Return the SHA-256 of the spec's identity."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def run_name(self) -> str:
        """Return the run's name: its own, or one made from the digest."""
        return self.name or f"run-{self.digest()[:8]}"


BaselinesSpec.model_rebuild()
RunSpec.model_rebuild()
