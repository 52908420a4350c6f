"""``python -m benchmarks``: every benchmark, one after another."""

from benchmarks import packing

packing.main()
