"""``python -m benchmarks``: every benchmark, one after another."""

from benchmarks import distillation, low_bit, packing, parameter_efficiency, preparation, token_distillation

for benchmark in (packing, parameter_efficiency, preparation, low_bit, distillation, token_distillation):
    benchmark.main()
