"""What stands in the JSON files of a run: plain mappings with known keys, so that writers and readers agree.

``metrics.json`` is a :class:`RunMetrics`; docs/metrics.md says what each number means. A key may be missing where a
run has no such part. Single metrics are looked up by the names of ``ensemble/metric_table.py``.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

Interval = list[float]
"""Low and high end."""
CurvePoint = dict[str, float]
"""``members`` and ``subsets``, and of every metric its mean and, under ``<metric>_std``, its spread."""
HistoryRow = dict[str, float]
"""``step`` and what was recorded of a member at it."""


# --- one set --------------------------------------------------------------------------------------------
class Doubt(TypedDict, total=False):
    """Mean uncertainty over the rows of a set; of classes the first four, of values the last two."""

    predictive_entropy: float
    expected_entropy: float
    mutual_information: float
    disagreement: float
    epistemic_std: float
    total_std: float


class SetMetrics(Doubt, total=False):
    """Every metric of one contender on one labeled set; None where it is undefined."""

    rows: int
    tokens: int
    documents: int
    accuracy: float
    nll: float
    brier: float
    ece: float
    adaptive_ece: float
    aurc: float
    perplexity: float
    tokenwise_nll: float
    sequencewise_nll: float
    rmse: float
    mae: float
    pearson: float | None
    spearman: float | None
    r2: float | None
    coverage_95: float
    temperature_scaled: dict[str, float]
    intervals: dict[str, Interval]


class OodMetrics(TypedDict, total=False):
    """The AUROC of each score that tells a foreign set from the test set."""

    rows: int
    max_probability: float
    predictive_entropy: float
    mutual_information: float
    epistemic_std: float
    uncertainty: Doubt
    intervals: dict[str, Interval]


class MeanAndError(TypedDict):
    """A mean over members and its standard error, which one member has not."""

    mean: float
    standard_error: float | None


# --- one contender --------------------------------------------------------------------------------------
class TemperatureFit(TypedDict):
    """What the temperature did to the validation NLL."""

    nll_before: float
    nll_after: float
    degenerate: bool


class NoiseFit(TypedDict):
    """The validation NLL with the fitted noise."""

    nll: float
    degenerate: bool


class Description(TypedDict, total=False):
    """What is said of the ensemble, of a member and of every baseline, by the names of the sets."""

    eval: dict[str, SetMetrics]
    ood: dict[str, OodMetrics]
    temperature: float
    temperature_fit: TemperatureFit
    noise_std: float
    noise_fit: NoiseFit


class LaplaceFit(TypedDict):
    """The Gaussian of the ``laplace`` baseline."""

    structure: str
    prior_precision: float
    determined: float
    matrices_numbers: int


class GroupMetrics(Description, total=False):
    """The ensemble or a baseline."""

    members: int
    scaled_by: float
    """What the logits of the ``temperature`` baseline were divided by before anything was scored."""
    laplace_fit: LaplaceFit


class MemberMetrics(Description, total=False):
    """One member."""

    index: int
    name: str
    stopped_at: int | None
    settings: dict[str, Any]


class MeanMember(TypedDict, total=False):
    """The members' metrics, averaged; a value is a :class:`MeanAndError`, or a mapping of them once scaled."""

    eval: dict[str, dict[str, Any]]
    ood: dict[str, dict[str, Any]]


# --- comparisons and figures ----------------------------------------------------------------------------
class Gain(TypedDict, total=False):
    """By how much the ensemble is better, whichever way the metric points."""

    gain: float
    interval: Interval


class Gains(TypedDict):
    """The ensemble against its members, by metric."""

    over_mean_member: dict[str, Gain]
    over_single: dict[str, Gain]


class WeightedGains(Gains):
    """An ensemble with fitted weights against the members, and against their plain mean."""

    over_ensemble: dict[str, Gain]


class SelectionStep(TypedDict):
    """A member that was added to a selection, and the validation NLL with it."""

    member: str
    validation_nll: float


class WeightedMetrics(GroupMetrics, total=False):
    """An ensemble whose weights were fitted on the validation rows."""

    weights: dict[str, float]
    validation_nll: float
    steps: list[SelectionStep]
    gap: float
    gains: dict[str, WeightedGains]


class ReliabilityBin(TypedDict):
    """Rows of like confidence."""

    lower: float
    upper: float
    count: int
    confidence: float | None
    accuracy: float | None


class ReliabilityBins(TypedDict, total=False):
    """As predicted and, with a temperature, after scaling."""

    before: list[ReliabilityBin]
    after: list[ReliabilityBin]


class RiskCoverage(TypedDict):
    """The error rate among the most confident rows."""

    coverage: list[float]
    risk: list[float]


class IntervalCoverage(TypedDict):
    """The share of labels inside central intervals, against the share that they promise."""

    nominal: list[float]
    observed: list[float]


class Histograms(TypedDict):
    """The share of test rows and of foreign rows in each bin of a score."""

    edges: list[float]
    test: list[float]
    foreign: list[float]


class ValuePoints(TypedDict):
    """Some rows of a regression, column by column."""

    label: list[float]
    value: list[float]
    epistemic_std: list[float]
    total_std: list[float]


class Plots(TypedDict, total=False):
    """What the figures draw: by set, and by contender or score."""

    reliability: dict[str, dict[str, ReliabilityBins]]
    risk_coverage: dict[str, dict[str, RiskCoverage]]
    ood_histograms: dict[str, dict[str, Histograms]]
    values: dict[str, ValuePoints]
    coverage: dict[str, dict[str, IntervalCoverage]]


class ClassScores(TypedDict):
    """How well one class is told from the others; None where a share would be one of nothing."""

    precision: float | None
    recall: float | None
    f1: float | None
    support: int


class WrongAnswer(TypedDict):
    """A row of classes that was answered wrongly."""

    id: str
    label: str
    answer: str
    confidence: float
    mutual_information: float
    text: str


class Miss(TypedDict):
    """A row of a regression, and how far off its value is."""

    id: str
    label: float
    value: float
    error: float
    total_std: float
    deviations: float
    text: str


class SetErrors(TypedDict, total=False):
    """Where the ensemble errs on one labeled set."""

    confusion: list[list[int]]
    classes: list[ClassScores]
    wrong_answers: list[WrongAnswer]
    misses: list[Miss]


class SetFacts(TypedDict):
    """A set that was predicted."""

    role: str
    rows: int


class Summary(TypedDict, total=False):
    """What predictions alone say of a run."""

    sets: dict[str, SetFacts]
    confidence: float
    output: str
    aggregate: str
    members: list[MemberMetrics]
    ensemble: GroupMetrics
    mean_member: MeanMember
    baselines: dict[str, GroupMetrics]
    weighted: dict[str, WeightedMetrics]
    gains: dict[str, Gains]
    m_curve: dict[str, list[CurvePoint]]
    pairwise_kl: dict[str, list[list[float]]]
    plots: Plots


# --- a run ----------------------------------------------------------------------------------------------
class RunFacts(TypedDict):
    """Which run it was and how it ended."""

    name: str
    digest: str
    phase: str
    started_at: float
    finished_at: float
    task: str
    base: str
    adapter: str
    quantization: str
    members_asked: int
    members_done: int
    degraded: bool


class AnswerTiming(TypedDict, total=False):
    """What it took to write a run's answers, all shards together; nothing where none were, or it is not known."""

    answer_s: float
    answer_tokens: int
    answer_tokens_per_s: float


class Timing(AnswerTiming):
    """Seconds and tokens of all jobs together."""

    total_s: float
    train_s: float
    evaluate_s: float
    train_s_per_job_mean: float
    tokens: int
    tokens_per_s: float


class Memory(TypedDict):
    """Bytes that the run needed."""

    peak_rss_bytes_per_worker: list[int]
    peak_device_bytes_per_worker: list[int]
    base_bytes: int
    member_bytes: int


class Parameters(TypedDict):
    """How many numbers the base, its head and one member have."""

    base: int
    head: int
    per_member_trainable: int


class Compute(TypedDict, total=False):
    """What the members were computed in and on."""

    compute_dtype: str
    device: str
    threads: int


class Machine(TypedDict):
    """What kind of machine it was."""

    system: str
    architecture: str
    cpus: int | None
    python: str
    gpu: str | None
    bf16_native: bool


class DataSet(TypedDict):
    """A set as it was read."""

    name: str
    role: str
    origin: str
    rows: int
    truncated: int
    skipped: int
    left_out: int
    duplicates: int
    content_hash: str


class DataRecord(TypedDict):
    """``data.json``: what is remembered of the data, to refuse other data on resume."""

    content_hash: str
    sets: list[DataSet]


class CompressedSize(TypedDict):
    """What one member became when its run was compressed."""

    member: str
    size_bytes: int
    compressed_bytes: int
    change_error: float
    vectors: dict[str, int]
    """Bits -> how many pairs of singular vectors have them; 0 are left out."""


class MetricDifference(TypedDict):
    """A metric of the ensemble on a set, before and after."""

    set: str
    metric: str
    whole: float
    compressed: float


class Compression(TypedDict):
    """``compression.json`` of a run that ``raylora compress`` wrote."""

    budget: float
    of: str
    """The run that was compressed."""
    folder: str
    members: list[CompressedSize]
    differences: list[MetricDifference]


class JobTiming(TypedDict):
    """``timing/<job>.json``: what one job took, and where."""

    units: list[str]
    train_s: float
    evaluate_s: float
    steps: int
    resumed_at_step: int
    tokens: int
    peak_rss_bytes: int
    peak_device_bytes: int
    base_bytes: int
    base_parameters: int
    head_parameters: int
    member_parameters: int
    trained_parameters: int
    """Fewer where a member keeps tensors that are not trained."""
    compute_dtype: str
    device: str
    threads: int
    pid: int


class ShardTiming(TypedDict):
    """``writing.json`` of a shard of answers: what it took to write them, and where."""

    answer_s: float
    answer_tokens: int
    """Of the ensemble's answers and of the members' own."""
    peak_rss_bytes: int
    peak_device_bytes: int
    pid: int


class LayerErrors(TypedDict, total=False):
    """A quantized layer and the norms of its errors on the calibration data."""

    name: str
    shape: list[int]
    weight: float
    quantized: float
    compensated: float
    svd: float
    theory: float


class PreparationSummary(TypedDict):
    """``summary.json`` of a prepared base."""

    blocks: int
    linears: int
    weights: int
    dense_bytes: int
    quantized_bytes: int
    bits_per_weight: float
    pair_bytes: int
    perplexity_before: float | None
    perplexity_after: float | None
    calibration_tokens: int
    held_out_tokens: int
    texts_left_out: int
    widest_input_not_spanned: int
    seconds: dict[str, float]
    peak_rss_bytes: int
    compute_dtype: str
    device: str
    layers: list[LayerErrors]


# --- a distillation -------------------------------------------------------------------------------------
class Costs(TypedDict, total=False):
    """What a contender needs to predict."""

    latency_ms: float
    rows_per_s: float
    peak_memory_bytes: int


class ContenderMetrics(Costs, total=False):
    """The teacher, one of its members, or a student: what it says and what it costs."""

    label: str
    eval: dict[str, SetMetrics]
    ood: dict[str, OodMetrics]
    answers: dict[str, dict[str, Any]]
    """By set, what its written answers score, where teacher and students were asked alike."""
    parameters: int
    trainable_parameters: int
    retained_score: float | None


class MeasuredOn(TypedDict):
    """Where and how costs were measured."""

    device: str
    threads: int
    rounds: int
    batch_rows: int


class TargetFacts(TypedDict, total=False):
    """Who taught on what, and what the targets took; of tokens k and how many positions have targets.

    A teacher that was asked has none, but the share of steps in which the student learned from what it wrote; one that
    answered says how many of its answers were learned, and why others were not.
    """

    rows: int
    members: list[str]
    tokens: list[float]
    positions: int
    size_bytes: int
    rounding_error: float
    made_s: float
    on_policy: float
    answers: int
    left_out: dict[str, int]


Contenders = dict[Literal["teacher", "single", "student", "alone"], ContenderMetrics]


class DistillationRecord(TypedDict, total=False):
    """``distillation/<student>.json``: a student beside its teacher."""

    key: str
    """By what the same comparison is known again."""
    name: str
    taught_by: str
    targets: TargetFacts
    contenders: Contenders
    measured_on: MeasuredOn
    output: str
    retained_metric: str | None


class BaselineCost(TypedDict, total=False):
    """What a baseline took that is made of member 0 and trained by nobody."""

    fit_s: float
    predict_s: float
    stored_numbers: int


class RunMetrics(Summary, total=False):
    """``metrics.json``, and in a report its students."""

    run: RunFacts
    label_names: list[str]
    errors: dict[str, SetErrors]
    spec_yaml: str
    versions: dict[str, str]
    machine: Machine
    timing: Timing
    memory: Memory
    parameters: Parameters
    compute: Compute
    baseline_costs: dict[str, BaselineCost]
    data: list[DataSet]
    training: dict[str, list[HistoryRow]]
    preparation: PreparationSummary
    distillation: list[DistillationRecord]
    answers: dict[str, Any] | None
