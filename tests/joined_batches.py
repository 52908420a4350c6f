"""The slow reference of a pack's batch: every member's rows padded on their own, then joined and padded again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from raylora.data.task import Batch, PaddingSide


def fit(x: Tensor, length: int, value: int, side: PaddingSide) -> Tensor:
    """Return x padded along its last dimension."""
    missing = length - x.shape[-1]
    return F.pad(x, (missing, 0) if side == "left" else (0, missing), value=value)


def join(batches: Sequence[Batch], pad_id: int, padding_side: PaddingSide) -> Batch:
    """Put several members' batches below each other along B, each padded for itself first and then to the longest.

    Raises:
        ValueError: the batches come from different tasks (some lack a tensor that others have).
    """
    first, longest = batches[0], max(batch.input_ids_BT.shape[1] for batch in batches)

    def joined(name: str, value: int = 0) -> Tensor | None:
        parts = [getattr(batch, name) for batch in batches]
        if all(part is None for part in parts):
            return None
        if any(part is None for part in parts):
            raise ValueError(f"only some of the batches have {name}")
        if name.endswith("_BT"):
            parts = [fit(part, longest, value, padding_side) for part in parts]
        return torch.cat(parts)

    input_ids_BT, mask_BT = joined("input_ids_BT", pad_id), joined("attention_mask_BT")
    assert input_ids_BT is not None and mask_BT is not None
    keeps = [batch.keep for batch in batches if batch.keep is not None]
    return replace(
        first,
        ids=[example_id for batch in batches for example_id in batch.ids],
        input_ids_BT=input_ids_BT,
        attention_mask_BT=mask_BT,
        labels_N=joined("labels_N"),
        position_ids_BT=joined("position_ids_BT"),
        token_type_ids_BT=joined("token_type_ids_BT"),
        target_mask_BT=joined("target_mask_BT"),
        keep=max(keeps) if keeps else None,
        lengths_K=tuple(batch.input_ids_BT.shape[1] for batch in batches),
    )
