"""``python -m benchmarks``: every benchmark, one after another."""

from benchmarks import (
    distillation,
    generation,
    instruction_training,
    low_bit,
    packing,
    parameter_efficiency,
    preparation,
    scheduler_scale,
    sharing,
    sweeping,
    token_distillation,
    trunk,
    vocabulary,
)

for benchmark in (
    packing, sharing, trunk, scheduler_scale, parameter_efficiency, preparation, low_bit, distillation,
    token_distillation, instruction_training, generation, vocabulary, sweeping,
):
    benchmark.main()
