"""What a run is: frozen values, read from YAML or built in Python."""

from raylora.spec.base import (
    AdapterSpec,
    CompensationSpec,
    Frozen,
    GridSpec,
    KindSpec,
    QuantizationSpec,
    TaskSpec,
    TrackerSpec,
)
from raylora.spec.baselines import BaselinesSpec
from raylora.spec.data import DataSpec, SetSpec
from raylora.spec.evaluation import EvaluationSpec, GenerationSpec
from raylora.spec.members import EnsembleSpec, RegularizersSpec, SelectSpec
from raylora.spec.model import BaseSpec, CalibrationSpec
from raylora.spec.placement import PlacementSpec
from raylora.spec.reading import (
    build_spec,
    diff_specs,
    dump_spec,
    json_schema,
    parse_spec,
    read_distill,
    read_given,
    read_spec,
)
from raylora.spec.run import RunSpec
from raylora.spec.students import AnswersSpec, DistillFromSpec, DistillSpec, StudentSpec
from raylora.spec.training import CheckpointingSpec, OptimizationSpec, ProfileSpec

__all__ = [
    "AdapterSpec",
    "AnswersSpec",
    "BaseSpec",
    "BaselinesSpec",
    "CalibrationSpec",
    "CheckpointingSpec",
    "CompensationSpec",
    "DataSpec",
    "DistillSpec",
    "EnsembleSpec",
    "EvaluationSpec",
    "Frozen",
    "GenerationSpec",
    "GridSpec",
    "KindSpec",
    "DistillFromSpec",
    "OptimizationSpec",
    "PlacementSpec",
    "ProfileSpec",
    "QuantizationSpec",
    "RegularizersSpec",
    "RunSpec",
    "SelectSpec",
    "SetSpec",
    "StudentSpec",
    "TaskSpec",
    "TrackerSpec",
    "build_spec",
    "diff_specs",
    "dump_spec",
    "json_schema",
    "parse_spec",
    "read_distill",
    "read_given",
    "read_spec",
]
