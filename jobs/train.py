"""Train an ensemble as a job. Submitted again, it continues.

    ray job submit --working-dir . -- python jobs/train.py --spec examples/quickstart.yaml --set storage_path=/runs
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the uploaded folder, where raylora is not installed

import raylora
from raylora.jobs.script import arguments, exit_with, spec_of


def main() -> int:
    """Train, evaluate and report; 3 if members are missing that may be missing."""
    run = raylora.launch(spec_of(arguments(str(__doc__)).parse_args()))
    metrics = run.wait()
    print(f"{run.uri}: {metrics['run']['phase']}, {metrics['run']['members_done']} member(s); {run.uri}/report.html")
    return 3 if metrics["run"]["degraded"] else 0


if __name__ == "__main__":
    exit_with(main)
