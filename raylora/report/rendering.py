"""Templates and images: whatever a run calls itself is escaped, and a page carries its figures within."""

from __future__ import annotations

import base64
import io

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from raylora.report.figures import Drawn

DPI = 130


def environment() -> Environment:
    """Return the templates; whatever a run calls itself is escaped."""
    return Environment(
        loader=PackageLoader("raylora.report", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def png_of(drawn: Drawn) -> bytes:
    """Return a figure as PNG; without metadata, the same numbers give the same bytes under any matplotlib."""
    buffer = io.BytesIO()
    drawn.figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def image_of(drawn: Drawn, png: bytes | None = None) -> dict[str, str]:
    """Return a figure as a page holds it."""
    content = base64.b64encode(png if png is not None else png_of(drawn)).decode("ascii")
    return {"uri": f"data:image/png;base64,{content}", "alt": drawn.alt}
