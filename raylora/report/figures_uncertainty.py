"""Figures of how unsure an ensemble is: score histograms, the decomposition by set, and member disagreement."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raylora.ensemble.metric_table import METRICS
from raylora.records import Doubt, RunMetrics
from raylora.report.entries import scored_sets, set_names, value_of
from raylora.report.figures import COLORS, Drawn


def detection(metrics: RunMetrics) -> list[Drawn]:
    """Per foreign set and score: how the score is spread over test and over foreign rows."""
    drawn = []
    for name, scores in metrics.get("plots", {}).get("ood_histograms", {}).items():
        for score, found in scores.items():
            figure = Figure(figsize=(3.9, 2.9), layout="constrained")
            axes = figure.subplots()
            for drawn_shares, label, tint, hatch in (
                (found["test"], "test", COLORS["ensemble"], ""),
                (found["foreign"], name, COLORS["single"], "//"),
            ):
                shares = [100 * value for value in drawn_shares]
                axes.stairs(shares, found["edges"], fill=True, color=tint, alpha=0.35, hatch=hatch)
                axes.stairs(shares, found["edges"], color=tint, linewidth=1.5, label=label)
            value = value_of(metrics.get("ensemble", {}).get("ood", {}).get(name, {}), score)
            title = METRICS[score].label + (f", AUROC {value:.3f}" if value is not None else "")
            axes.set(title=title, xlabel=METRICS[score].axis, ylabel="rows (%)")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
            axes.legend()
            drawn.append(Drawn(f"detection-{name}-{score.replace('_', '-')}", figure, f"{title} of test and {name}"))
    return drawn


def decomposition(metrics: RunMetrics) -> list[Drawn]:
    """Per set: mean predictive entropy as expected entropy plus mutual information."""
    ensemble = metrics.get("ensemble", {})
    found: dict[str, Doubt] = {name: ensemble["eval"][name] for name in scored_sets(metrics)}
    foreign = ensemble.get("ood", {})
    found |= {
        name: foreign[name].get("uncertainty", {})
        for name in set_names(metrics, "out_of_distribution")
        if name in foreign
    }
    found = {name: one for name, one in found.items() if "mutual_information" in one}
    if not found:
        return []
    figure = Figure(figsize=(5.6, 1.2 + 0.5 * len(found)), layout="constrained")
    axes = figure.subplots()
    names = list(found)[::-1]
    expected = [found[name]["expected_entropy"] for name in names]
    between = [found[name]["mutual_information"] for name in names]
    axes.barh(names, expected, color=COLORS["mean_member"], label="expected entropy: each member's own uncertainty")
    axes.barh(
        names,
        between,
        left=expected,
        color=COLORS["single"],
        hatch="//",
        edgecolor="white",
        label="mutual information: disagreement of the members",
    )
    for row, (inner, outer) in enumerate(zip(expected, between, strict=True)):
        axes.text(inner + outer, row, f"  {inner:.3f} + {outer:.3f}", va="center", fontsize=9)
    axes.set(xlabel="nats per row", xlim=(0, 1.3 * max(a + b for a, b in zip(expected, between, strict=True)) or 1))
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper left")
    return [Drawn("uncertainty", figure, "Uncertainty of the ensemble by set, split into its two parts")]


def disagreement(metrics: RunMetrics) -> list[Drawn]:
    """Per set: the KL divergence between every two members."""
    drawn = []
    shown = [*scored_sets(metrics), *set_names(metrics, "out_of_distribution")]
    for name in shown:
        kl = metrics.get("pairwise_kl", {}).get(name, [])
        if len(kl) < 2:
            continue
        figure = Figure(figsize=(3.9, 3.3), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(kl, cmap="cividis", vmin=0)
        top = max(max(row) for row in kl) or 1.0
        if len(kl) <= 8:
            digits = 3 if top < 0.1 else 2  # members that hardly differ are no copies
            for i, row in enumerate(kl):
                for j, value in enumerate(row):
                    tint = "black" if value > 0.6 * top else "white"
                    axes.text(j, i, f"{value:.{digits}f}", ha="center", va="center", color=tint, fontsize=9)
            axes.set(xticks=range(len(kl)), yticks=range(len(kl)))
        axes.set(title=name, xlabel="member j", ylabel="member i")
        axes.grid(visible=False)
        figure.colorbar(image, label="KL(i || j), nats")
        drawn.append(Drawn(f"disagreement-{name}", figure, f"Pairwise KL divergence between members on {name}"))
    return drawn
