"""What all members say of answers that are there: every token's log-probability, entropy and disagreement.

Shapes: M members, N answers, B = M * N rows, T tokens, K kept positions, P learned tokens of one answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from raylora.adapters.packed import member_count
from raylora.data.task import Example, repeat
from raylora.engine.generation.lanes import lanes_of, pass_lanes
from raylora.engine.generation.mixture import mix
from raylora.engine.model.packed_model import PackedModel

_LOGIT_BYTES = 256_000_000
"""Of the logits that are there at once, in float32."""


@dataclass(frozen=True)
class Scored:
    """One answer, token by token."""

    token_P: Tensor
    logprob_P: Tensor
    """Under the mixture of the members."""
    entropy_P: Tensor
    mutual_information_P: Tensor
    member_logprob_MP: Tensor


@torch.no_grad()
def score(
    model: PackedModel, stacked: Mapping[str, Tensor], examples: Sequence[Example], rule: str = "mean_probabilities",
    weights_M: Tensor | None = None,
) -> Iterator[Scored]:
    """Yield what the members say of the tokens that each example's target mask names, in the examples' order."""
    base = model.base
    members = member_count(stacked)
    vocabulary = int(cast(Any, base.model.config).get_text_config().vocab_size)
    lanes = lanes_of(model, stacked)
    for example in examples:  # one at a time: answers differ in length, and nobody's padding is computed
        keep = _kept(example)
        batch = repeat(model.task.collate([example], base.tokenizer), members).to(base.device)
        logits_BKV = pass_lanes(base, lanes, batch.model_inputs(), keep)
        assert batch.target_mask_BT is not None
        mask_K = batch.target_mask_BT[0, -keep:].clone()
        mask_K[0] = False  # its logits would be those of the position before
        token_P = batch.input_ids_BT[0, -keep:][mask_K]
        before_K = mask_K.roll(-1)
        before_K[-1] = False
        chunk = max(1, _LOGIT_BYTES // (4 * members * vocabulary))
        parts = [
            _scored(logits_MPV, own_P, rule, weights_M)
            for logits_MPV, own_P in zip(
                logits_BKV[:, before_K].split(chunk, dim=1), token_P.split(chunk), strict=True
            )
        ]
        yield Scored(*(torch.cat([getattr(part, name) for part in parts], dim=-1).cpu() for name in vars(parts[0])))


def _scored(logits_MPV: Tensor, token_P: Tensor, rule: str, weights_M: Tensor | None) -> Scored:
    mixture = mix(logits_MPV, rule, weights_M)
    of_members_MPV = torch.log_softmax(logits_MPV.float(), dim=-1)
    members = len(logits_MPV)
    return Scored(
        token_P, mixture.logp_NV.gather(1, token_P[:, None])[:, 0], mixture.entropy_N, mixture.mutual_information_N,
        of_members_MPV.gather(2, token_P.expand(members, -1)[..., None])[..., 0],
    )


def _kept(example: Example) -> int:
    """Return how many last positions an example's targets and what predicts them take."""
    length = len(example.sequences[0])
    first = min((first for first, _ in example.target_ranges), default=example.spans[0] if example.spans else 1)
    return length - first + 1

