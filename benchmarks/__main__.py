"""``python -m benchmarks``: every benchmark, one after another."""

from benchmarks import packing, parameter_efficiency

for benchmark in (packing, parameter_efficiency):
    benchmark.main()
