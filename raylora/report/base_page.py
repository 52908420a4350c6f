"""How well a base was prepared: what each layer lost on the calibration data, and what its pair gave back.

Each function takes the summary of a prepared base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import rich.table
from matplotlib.figure import Figure

from raylora.records import LayerErrors, PreparationSummary
from raylora.report import figures
from raylora.report.facts import LABELS
from raylora.report.figures import Drawn
from raylora.report.formatting import duration, flat, number, size
from raylora.report.rendering import environment, image_of
from raylora.report.tables import Table, Text

STAGES = {
    "quantized": ("before", "quantized, without a pair"),
    "svd": ("SVD of the error", "with the SVD of the error, which looks at no data"),
    "compensated": ("with its pair", "with the pair that the base has"),
    "theory": ("theory", "the least that any pair of this rank leaves"),
}
"""Error of a layer -> its column, and its line in the figure."""
_COLORS = {"quantized": "#D55E00", "svd": "#8A6D00", "compensated": "#0072B2", "theory": "#000000"}


def section(summary: PreparationSummary) -> dict[str, Any]:
    """Return what a page says about the base: a sentence, how to read the errors, and a table by kind of layer."""
    return {"sentence": sentence(summary), "reading": reading(summary), "table": by_kind(summary)}


def sentence(summary: PreparationSummary) -> str:
    """Return the result in words."""
    parts = [
        f"{summary['linears']} layers of {summary['weights']:,} weights take {size(summary['quantized_bytes'])} at "
        f"{summary['bits_per_weight']:.2f} bits per weight, scales included ({size(summary['dense_bytes'])} before)"
    ]
    if summary["pair_bytes"]:
        parts.append(f"their low-rank pairs {size(summary['pair_bytes'])}")
    text = ", ".join(parts) + "."
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    if before is not None and after is not None:
        text += (
            f" Perplexity on {summary['held_out_tokens']:,} held-out tokens: "
            f"{number(before, 'perplexity')} before, {number(after, 'perplexity')} after."
        )
    if summary["widest_input_not_spanned"]:
        text += (
            f" The {summary['calibration_tokens']:,} calibration tokens are fewer than the widest layer's "
            f"{summary['widest_input_not_spanned']:,} inputs: directions that no token shows are determined by "
            "damping alone there, and more text would help."
        )
    return text


def reading(summary: PreparationSummary) -> str:
    """Return how the errors are to be read."""
    if not stages(summary):
        return "Nothing was calibrated, so what the layers lost on real inputs is not known."
    return (
        "Errors are the norm of what a layer's outputs lost on the calibration inputs, as a share of the outputs' "
        "norm (damping included); lower is better."
    )


def stages(summary: PreparationSummary) -> list[str]:
    """Return which errors were measured, in reading order."""
    return [key for key in STAGES if summary["layers"] and key in summary["layers"][0]]


def by_kind(summary: PreparationSummary) -> Table:
    """Return the mean relative errors per kind of layer."""
    kinds: dict[str, list[LayerErrors]] = {}
    for layer in summary["layers"]:
        kinds.setdefault(_inner(layer["name"]), []).append(layer)
    rows = [(f"{kind} ({len(layers)})", _cells(layers, stages(summary))) for kind, layers in kinds.items()]
    rows.append((f"all ({len(summary['layers'])})", _cells(summary["layers"], stages(summary))))
    return Table([], [STAGES[key][0] for key in stages(summary)], rows)


def each(summary: PreparationSummary) -> Table:
    """Return the relative errors of every layer."""
    rows = [
        (layer["name"], [Text(f"{layer['shape'][0]} × {layer['shape'][1]}"), *_cells([layer], stages(summary))])
        for layer in summary["layers"]
    ]
    return Table([], ["Outputs × inputs", *(STAGES[key][0] for key in stages(summary))], rows)


def layer_errors(summary: PreparationSummary) -> list[Drawn]:
    """Draw every layer's relative error, in the model's order."""
    if not stages(summary):
        return []
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for key in stages(summary):
        values = [100 * share for share in _shares(summary["layers"], key)]
        line = "--" if key == "theory" else "-"
        axes.plot(range(1, len(values) + 1), values, line, color=_COLORS[key], linewidth=1.3, marker=".",
                  markersize=3 if key != "theory" else 0, label=STAGES[key][1])
    axes.set_xlabel("linear layer, first block to last")
    axes.set_ylabel("error, % of the outputs' norm")
    axes.set_ylim(bottom=0)
    axes.set_title("What quantizing cost each layer on the calibration inputs")
    figure.legend(loc="outside lower center", ncols=2)
    words = "; ".join(
        f"{STAGES[key][1]}: mean {100 * fmean(_shares(summary['layers'], key)):.1f} %" for key in stages(summary)
    )
    return [Drawn("layer_errors", figure, f"Relative calibration error per layer. {words}")]


def base_table(summary: PreparationSummary) -> rich.table.Table:
    """Return a compact table for the terminal."""
    title = f"{summary['bits_per_weight']:.2f} bits per weight, {size(summary['quantized_bytes'])}"
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    if before is not None and after is not None:
        title += f"; perplexity {number(before, 'perplexity')} -> {number(after, 'perplexity')}"
    found = by_kind(summary)
    table = rich.table.Table("layers", title=f"{title}; {duration(summary['seconds']['total'])}")
    for head in found.heads:
        table.add_column(head, justify="right")
    for name, cells in found.rows:
        table.add_row(name, *(cell.main for cell in cells))
    return table


def write_base_report(summary: PreparationSummary, folder: str) -> str:
    """Write ``report.html`` into a prepared base's local folder and return its path."""
    with figures.style():
        images = [image_of(drawn) for drawn in layer_errors(summary)]
    left_out = ("layers", "perplexity_before", "perplexity_after")
    seconds = {f"{name}_s": value for name, value in summary["seconds"].items()}
    path = Path(folder) / "report.html"
    path.write_text(environment().get_template("base.html").render(
        name=Path(folder).name, preparation=section(summary), layers=each(summary), images=images,
        facts=flat({
            "time" if key == "seconds" else key: seconds if key == "seconds" else found
            for key, found in summary.items() if key not in left_out
        }, labels=LABELS),
    ), encoding="utf-8")
    return str(path)


def _inner(name: str) -> str:
    """Return a layer's name within its block."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[index + 1 :])


def _cells(layers: Sequence[LayerErrors], keys: Sequence[str]) -> list[Text]:
    return [Text(f"{100 * fmean(_shares(layers, key)):.2f} %") for key in keys]


def _shares(layers: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [layer[key] / layer["weight"] if layer["weight"] else 0.0 for layer in layers]
