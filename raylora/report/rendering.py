"""Templates and images: whatever a run calls itself is escaped, and a page carries its figures within."""

from __future__ import annotations

import base64
import io
import re

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from raylora.report.figures import Drawn

DPI = 130
_CODE = re.compile(r"`([^`]+)`|\b((?:base|task|data|adapter|ensemble|optimization|evaluation)(?:\.[a-z_]+)+)")


def environment() -> Environment:
    """Return the templates; whatever a run calls itself is escaped."""
    found = Environment(
        loader=PackageLoader("raylora.report", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["quoted"] = quoted
    return found


def quoted(text: str) -> Markup:
    """Return a sentence whose commands and settings are set as code; everything in it is escaped."""
    return Markup(_CODE.sub(lambda found: f"<code>{found[1] or found[2]}</code>", str(escape(text))))


def png_of(drawn: Drawn) -> bytes:
    """Return a figure as PNG; without metadata, the same numbers give the same bytes under any matplotlib."""
    buffer = io.BytesIO()
    drawn.figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def image_of(drawn: Drawn, png: bytes | None = None) -> dict[str, str]:
    """Return a figure as a page holds it."""
    content = base64.b64encode(png if png is not None else png_of(drawn)).decode("ascii")
    return {"uri": f"data:image/png;base64,{content}", "alt": drawn.alt}
