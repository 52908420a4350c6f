"""The report of tokens: surprise per token."""

from __future__ import annotations

from raylora.report.outputs.base import OutputSection

SECTION = OutputSection(
    compared=("nll", "perplexity"),
    compared_text=(
        "NLL is the average surprise per token, in nats, and perplexity its exponential: lower is better for both."
    ),
    secondary=(),
    secondary_title="",
    secondary_text="",
    members=("nll", "perplexity"),
    shifted=("nll",),
    curve=("nll",),
    headline=("nll",),
    watched=("nll",),
    distilled=("nll",),
    unit=" per token",
    taught_on="blocks of text",
)
