"""``python -m benchmarks``: every benchmark, one after another."""

from benchmarks import distillation, low_bit, packing, parameter_efficiency, preparation

for benchmark in (packing, parameter_efficiency, preparation, low_bit, distillation):
    benchmark.main()
