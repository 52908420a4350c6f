"""raylora: ensembles of low-rank adapters over one frozen, quantized base, on Ray.

    >>> import raylora
    >>> spec = raylora.read_spec("examples/quickstart.yaml")
    >>> metrics = raylora.launch(spec).wait()
    >>> raylora.load_ensemble("runs/quickstart").predict(["A film to remember."])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from raylora.client import Repaired, attach, distill_run, evaluate_run, launch, repair_run, resume, run_local
    from raylora.engine.model.parameter_count import parameter_count
    from raylora.engine.run.run_status import RunStatus
    from raylora.engine.run.verify import verify_run
    from raylora.ensemble.outputs.classes import Prediction
    from raylora.ensemble.outputs.value import ValuePrediction
    from raylora.errors import RayloraError
    from raylora.handle import RunHandle
    from raylora.serve.export import export_run
    from raylora.serve.predictor import LoadedEnsemble, load_ensemble
    from raylora.spec import RunSpec, build_spec, read_distill, read_spec
    from raylora.sweeping import sweep
    from raylora.tuning import tune_trainable

_HOMES = {
    "RunSpec": "raylora.spec",
    "build_spec": "raylora.spec",
    "read_spec": "raylora.spec",
    "RayloraError": "raylora.errors",
    "RunHandle": "raylora.handle",
    "RunStatus": "raylora.engine.run.run_status",
    "attach": "raylora.client",
    "distill_run": "raylora.client",
    "evaluate_run": "raylora.client",
    "Repaired": "raylora.client",
    "repair_run": "raylora.client",
    "verify_run": "raylora.engine.run.verify",
    "read_distill": "raylora.spec",
    "launch": "raylora.client",
    "resume": "raylora.client",
    "run_local": "raylora.client",
    "sweep": "raylora.sweeping",
    "tune_trainable": "raylora.tuning",
    "LoadedEnsemble": "raylora.serve.predictor",
    "Prediction": "raylora.ensemble.outputs.classes",
    "ValuePrediction": "raylora.ensemble.outputs.value",
    "load_ensemble": "raylora.serve.predictor",
    "export_run": "raylora.serve.export",
    "parameter_count": "raylora.engine.model.parameter_count",
}

__all__ = ["__version__", *_HOMES]


def __dir__() -> list[str]:
    """List the public names, which are imported only when they are used."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `raylora --help` must not wait for torch and Ray."""
    if name not in _HOMES:
        raise AttributeError(f"module 'raylora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
