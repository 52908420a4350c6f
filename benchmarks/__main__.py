"""``python -m benchmarks``: every benchmark, one after another."""

from benchmarks import low_bit, packing, parameter_efficiency

for benchmark in (packing, parameter_efficiency, low_bit):
    benchmark.main()
