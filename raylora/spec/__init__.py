"""What a run is: frozen values, read from YAML or built in Python."""

from raylora.spec.base import AdapterSpec, CompensationSpec, Frozen, GridSpec, KindSpec, QuantizationSpec, TaskSpec
from raylora.spec.reading import build_spec, diff_specs, dump_spec, json_schema, parse_spec, read_spec
from raylora.spec.run import (
    BaselinesSpec,
    BaseSpec,
    CalibrationSpec,
    CheckpointingSpec,
    DataSpec,
    EnsembleSpec,
    EvaluationSpec,
    OptimisationSpec,
    PlacementSpec,
    RegularisersSpec,
    RunSpec,
    SetSpec,
)

__all__ = [
    "AdapterSpec",
    "BaseSpec",
    "BaselinesSpec",
    "CalibrationSpec",
    "CheckpointingSpec",
    "CompensationSpec",
    "DataSpec",
    "EnsembleSpec",
    "EvaluationSpec",
    "Frozen",
    "GridSpec",
    "KindSpec",
    "OptimisationSpec",
    "PlacementSpec",
    "QuantizationSpec",
    "RegularisersSpec",
    "RunSpec",
    "SetSpec",
    "TaskSpec",
    "build_spec",
    "diff_specs",
    "dump_spec",
    "json_schema",
    "parse_spec",
    "read_spec",
]
