"""The page itself: figures drawn, tables laid out, everything escaped and packed into one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raylora.records import RunMetrics
from raylora.report import (
    answers,
    base_page,
    distillation,
    facts,
    figures,
    figures_distillation,
    figures_training,
    figures_uncertainty,
    tables,
)
from raylora.report.advice import advice
from raylora.report.entries import adapter_of, scored_sets, set_names
from raylora.report.figures import Drawn
from raylora.report.headline import headline
from raylora.report.outputs.base import Block, section_of
from raylora.report.rendering import environment, image_of, png_of

SAFE = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")


def write_report(metrics: RunMetrics, folder: Path) -> list[Path]:
    """Write ``report.html`` (self-contained) and ``plots/*.png`` below ``folder``; return what was written.

    ``metrics`` is metrics.json; sections whose numbers are missing are left out.
    """
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    images: dict[str, list[dict[str, str]]] = {}
    with figures.style():
        blocks = section_of(metrics).blocks(metrics)
        own = {f"block-{number}": block.figures for number, block in enumerate(blocks)}
        for section, drawn in {**own, **_draw(metrics)}.items():
            images[section] = []
            for one in drawn:
                png = png_of(one)
                path = plots / f"{''.join(c if c in SAFE else '_' for c in one.name.lower())}.png"
                path.write_bytes(png)
                written.append(path)
                images[section].append(image_of(one, png))
    page = folder / "report.html"
    page.write_text(render(metrics, images, blocks), encoding="utf-8")
    return [page, *written]


def render(metrics: RunMetrics, images: dict[str, list[dict[str, str]]], blocks: Sequence[Block]) -> str:
    """Return the page's HTML; every string of the run is escaped."""
    run: Mapping[str, Any] = metrics.get("run") or {}
    preparation = metrics.get("preparation")
    return environment().get_template("template.html").render(
        name=run.get("name", "run"),
        run_facts=facts.run_facts(metrics),
        adapter=adapter_of(metrics),
        degraded=bool(run.get("degraded")),
        headline=headline(metrics),
        advice=advice(metrics),
        section=section_of(metrics),
        blocks=blocks,
        confidence=f"{100 * metrics.get('confidence', 0.95):g} %",
        test=(scored_sets(metrics) or ["test"])[0],
        foreign=set_names(metrics, "out_of_distribution"),
        comparison=tables.comparison(metrics),
        secondary=tables.secondary(metrics),
        shift=tables.shift(metrics),
        detection=tables.detection(metrics),
        members=tables.members(metrics),
        data=tables.data(metrics),
        students=distillation.sections(metrics),
        answers=answers.section(metrics),
        preparation=base_page.section(preparation) if preparation else None,
        facts=facts.facts(metrics),
        versions=list((metrics.get("versions") or {}).items()),
        spec_yaml=metrics.get("spec_yaml", ""),
        images=images,
        stopped=figures_training.any_stopped(metrics),
    )


def _draw(metrics: RunMetrics) -> dict[str, Sequence[Drawn]]:
    return {
        "member_curve": figures.member_curve(metrics),
        "training": figures_training.training(metrics),
        "detection": figures_uncertainty.detection(metrics),
        "disagreement": figures_uncertainty.disagreement(metrics),
        "students": figures_distillation.retained(metrics),
        "answers": answers.risk(metrics),
        "preparation": base_page.layer_errors(metrics["preparation"]) if metrics.get("preparation") else [],
    }
