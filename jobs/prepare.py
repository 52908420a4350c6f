"""Quantize a spec's base on its calibration text as a job; runs that need the same one reuse it.

    ray job submit --working-dir . -- python jobs/prepare.py --spec examples/06-low-bit.yaml --set storage_path=/runs
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the uploaded folder, where raylora is not installed

from raylora.client import prepare_base
from raylora.jobs.script import arguments, exit_with, spec_of


def main() -> int:
    """Solve what is not solved yet."""
    uri, summary = prepare_base(spec_of(arguments(str(__doc__)).parse_args()))
    print(f"{uri}: prepared, {summary['quantized_bytes']:,} bytes, {summary['bits_per_weight']:.2f} bits per weight")
    return 0


if __name__ == "__main__":
    exit_with(main)
