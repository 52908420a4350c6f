"""``python -m benchmarks``: every benchmark, one after another."""

from benchmarks import distillation, packing, parameter_efficiency

for benchmark in (packing, parameter_efficiency, distillation):
    benchmark.main()
