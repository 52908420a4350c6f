"""The report of tokens: surprise per token."""

from __future__ import annotations

from raylora.report.outputs.base import OutputSection

SECTION = OutputSection(
    compared=("nll", "perplexity"),
    compared_text=(
        "NLL is the average surprise per token, in nats, and perplexity its exponential: lower is better for both."
    ),
    secondary=("tokenwise_nll", "sequencewise_nll"),
    secondary_title="What a whole text costs",
    secondary_text=(
        "The surprise at all tokens of a row together, in nats (lower is better). Token by token, the members' "
        "probabilities are averaged before every token, as when the ensemble writes; as a whole, each member's "
        "probability of all of it is averaged, which is how likely the text is if one of the members wrote it. For one "
        "model both are the same."
    ),
    members=("nll", "perplexity"),
    shifted=("nll",),
    curve=("nll",),
    headline=("nll",),
    watched=("nll",),
    distilled=("nll",),
    unit=" per token",
    taught_on="blocks of text",
)
