"""Whether a model keeps rows apart that share a sequence: architectures differ, so it is asked itself.

Shapes: B = 2 sequences of two rows each, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch

from raylora.engine.model.base import Base
from raylora.engine.model.gang import Round
from raylora.errors import BaseError

_TOKENS = 8
_FAR = 0.05
"""Of the distance between two rows' logits: bfloat16 moves a row by less, and what stands before it by far more."""


def check_shared_sequences(base: Base) -> None:
    """Refuse a model in which a row is not the same behind another as it is first; all ranks of a gang ask together.

    Raises:
        BaseError: it counts positions by itself, or its mask or state does not end where they begin anew.
    """
    vocabulary = int(base.model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    one_T, two_T = (torch.arange(2 * _TOKENS) * 7 % vocabulary).split(_TOKENS)
    tokens_BT = torch.stack([torch.cat([one_T, two_T]), torch.cat([two_T, one_T])]).to(base.device)
    positions_BT = torch.arange(_TOKENS, device=base.device).repeat(2, 2)
    with torch.no_grad(), base.round(Round.FORWARD):
        logits_BTV = base.model(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False).logits.float()
    first, behind = logits_BTV[:, :_TOKENS], logits_BTV[:, _TOKENS:].flip(0)
    if not (first - behind).norm() <= _FAR * (first[0] - first[1]).norm():
        raise BaseError(
            f"optimization.pack_rows: in {type(base.model).__name__} a row sees those before it in its sequence",
            "use pack_rows: false",
        )
