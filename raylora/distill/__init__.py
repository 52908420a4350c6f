"""What a student learns from an ensemble: losses, and targets that are keyed by example id.

Plain tensors and bytes; nothing here knows Ray, a model or a tokenizer.
"""

from raylora.distill.answers import AnsweredRows
from raylora.distill.base import (
    Annealed,
    AsksTeacher,
    LearnsAnswers,
    Loss,
    LossSpec,
    TemperedSpec,
    WeighsMembers,
    Writing,
)
from raylora.distill.keys import Keys, content_hash
from raylora.distill.targets import (
    ClassificationTargets,
    MemberTargets,
    RegressionTargets,
    merge,
    read_targets,
    targets_class,
)
from raylora.distill.token_reader import TokenTargets
from raylora.distill.tokens import TokenTargetsWriter, concatenate
from raylora.distill.topk import TopK

__all__ = [
    "Annealed",
    "AnsweredRows",
    "AsksTeacher",
    "ClassificationTargets",
    "Keys",
    "LearnsAnswers",
    "Loss",
    "LossSpec",
    "MemberTargets",
    "RegressionTargets",
    "TemperedSpec",
    "TokenTargets",
    "TokenTargetsWriter",
    "TopK",
    "WeighsMembers",
    "Writing",
    "concatenate",
    "content_hash",
    "merge",
    "read_targets",
    "targets_class",
]
