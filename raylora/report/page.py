"""The page itself: figures drawn, tables laid out, everything escaped and packed into one HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from raylora.report import (
    base_page,
    distillation,
    figures,
    figures_distillation,
    figures_regression,
    figures_uncertainty,
    tables,
)
from raylora.report.entries import scored_sets, set_names
from raylora.report.figures import Drawn
from raylora.report.formatting import flat
from raylora.report.headline import headline
from raylora.report.shown import kind_of

DPI = 130
SAFE = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")


def write_report(metrics: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``report.html`` (self-contained) and ``plots/*.png`` below ``folder``; return what was written.

    ``metrics`` is metrics.json; sections whose numbers are missing are left out.
    """
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    images: dict[str, list[dict[str, str]]] = {}
    with figures.style():
        for section, drawn in _draw(metrics).items():
            images[section] = []
            for one in drawn:
                png = _png(one)
                path = plots / f"{''.join(c if c in SAFE else '_' for c in one.name.lower())}.png"
                path.write_bytes(png)
                written.append(path)
                images[section].append(_image(png, one))
    page = folder / "report.html"
    page.write_text(render(metrics, images), encoding="utf-8")
    return [page, *written]


def render(metrics: dict[str, Any], images: dict[str, list[dict[str, str]]]) -> str:
    """Return the page's HTML; every string of the run is escaped."""
    run = metrics.get("run") or {}
    preparation = metrics.get("preparation")
    return environment().get_template("template.html").render(
        name=run.get("name", "run"),
        run_facts=flat({key: value for key, value in run.items() if key not in ("name", "degraded")}),
        degraded=bool(run.get("degraded")),
        headline=headline(metrics),
        kind=kind_of(metrics),
        confidence=f"{100 * metrics.get('confidence', 0.95):g} %",
        test=(scored_sets(metrics) or ["test"])[0],
        foreign=set_names(metrics, "out_of_distribution"),
        comparison=tables.comparison(metrics),
        apart=tables.apart(metrics),
        scaled=tables.scaled(metrics),
        temperatures=tables.temperatures(metrics),
        noises=tables.noises(metrics),
        shift=tables.shift(metrics),
        detection=tables.detection(metrics),
        members=tables.members(metrics),
        data=tables.data(metrics),
        students=distillation.sections(metrics),
        preparation=base_page.section(preparation) if preparation else None,
        facts=tables.facts(metrics),
        versions=flat(metrics.get("versions") or {}),
        spec_yaml=metrics.get("spec_yaml", ""),
        images=images,
    )


def environment() -> Environment:
    """Return the templates; whatever a run calls itself is escaped."""
    return Environment(
        loader=PackageLoader("raylora.report", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def image_of(drawn: Drawn) -> dict[str, str]:
    """Return a figure as a page holds it."""
    return _image(_png(drawn), drawn)


def _image(png: bytes, drawn: Drawn) -> dict[str, str]:
    return {"uri": _data_uri(png), "alt": drawn.alt}


def _draw(metrics: dict[str, Any]) -> dict[str, Sequence[Drawn]]:
    return {
        "reliability": figures.reliability(metrics),
        "predicted": figures_regression.values(metrics),
        "coverage": figures_regression.coverage(metrics),
        "risk_coverage": figures.risk_coverage(metrics),
        "member_curve": figures.member_curve(metrics),
        "training": figures.training(metrics),
        "detection": figures_uncertainty.detection(metrics),
        "decomposition": figures_uncertainty.decomposition(metrics),
        "disagreement": figures_uncertainty.disagreement(metrics),
        "students": figures_distillation.kept(metrics),
        "preparation": base_page.layer_errors(metrics["preparation"]) if metrics.get("preparation") else [],
    }


def _png(drawn: Drawn) -> bytes:
    buffer = io.BytesIO()
    # Without the metadata, the same numbers give the same bytes under any matplotlib.
    drawn.figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
