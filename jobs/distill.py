r"""Distill a finished run into the student of its spec's distill section, as a job. Submitted again, it continues.

    ray job submit --working-dir . -- python jobs/distill.py --spec examples/07-distillation.yaml \
        --set storage_path=/runs
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the uploaded folder, where raylora is not installed

import raylora
from raylora.errors import SpecError
from raylora.jobs.script import arguments, exit_with, spec_of
from raylora.store.run_store import RunStore


def main() -> int:
    """Make targets, train the student, compare the two."""
    spec = spec_of(arguments(str(__doc__)).parse_args())
    if spec.distill is None:
        raise SpecError("distill: the spec has no such section", "say in it who the student is")
    uri = RunStore.for_spec(spec).uri
    record = raylora.distill_run(uri, spec.distill, on_stage=print)
    kept = record["contenders"]["student"]["retained_score"]
    print(f"{uri}/{spec.distill.name}: done" + (f"; {kept:.3f} of {record['retained_metric']} kept" if kept else ""))
    return 0


if __name__ == "__main__":
    exit_with(main)
