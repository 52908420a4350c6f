r"""Predict a file's rows with a finished run, as a job on a cluster's machine; answers are JSON lines.

    ray job submit --working-dir . --entrypoint-num-cpus 2 -- python jobs/predict.py --spec examples/quickstart.yaml \
        --set storage_path=/runs --file new.csv --out /runs/answers.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the uploaded folder, where raylora is not installed

import raylora
from raylora.jobs.script import arguments, exit_with, spec_of
from raylora.serve.inputs import read_inputs, write_records
from raylora.store.run_store import RunStore


def main() -> int:
    """Write an answer with its uncertainty for every row."""
    parser = arguments(str(__doc__))
    parser.add_argument("--file", required=True, help="rows as jsonl, csv, parquet or arrow")
    parser.add_argument("--out", required=True, help="where to write the answers")
    given = parser.parse_args()
    uri = RunStore.for_spec(spec_of(given)).uri
    inputs = read_inputs(uri, given.file)
    write_records(given.out, inputs.records(raylora.load_ensemble(uri).predict(inputs.rows)))
    print(f"{given.out}: {len(inputs.rows)} answer(s) of {uri}")
    return 0


if __name__ == "__main__":
    exit_with(main)
