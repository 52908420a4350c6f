"""What members have read so far: each row's last tokens, and the keys and values of all before them.

Rows are member by member, as in training: rows m * A .. (m + 1) * A - 1 are member m's. Prompts are padded on the
left, positions count from the first real token.

Shapes: M members, A rows of one member, B = M * A rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raylora.data.task import pad_id
from raylora.engine.generation.lanes import lanes_of, pass_lanes
from raylora.engine.model.packed_model import PackedModel


class Reading:
    """Rows of some members that grow by a token at a time."""

    def __init__(
        self, model: PackedModel, stacked: Mapping[str, Tensor], prompts_B: Sequence[Sequence[int]]
    ) -> None:
        """Take the members' tensors, stacked over M, and the tokens of every row."""
        self.base = model.base
        longest, pad = max(map(len, prompts_B)), pad_id(model.base.tokenizer)
        ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts_B]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts_B]
        self._ids_BT = torch.tensor(ids, device=self.base.device)
        self._mask_BT = torch.tensor(mask, device=self.base.device)
        self._lanes = lanes_of(model, stacked, remembers=True)
        self._ahead_BV: Tensor | None = None

    def fork(self) -> Reading:
        """Return a second reading, which goes on by itself; what there is so far is read once for both."""
        if self._ahead_BV is None:
            self._ahead_BV = self._read()
        twin = copy.copy(self)
        twin._lanes = [lane.copied() for lane in self._lanes]
        return twin

    def logits(self) -> Tensor:
        """Read each row's last tokens and return the logits of what follows them, B x V."""
        logits_BV, self._ahead_BV = self._ahead_BV, None
        return self._read() if logits_BV is None else logits_BV

    def _read(self) -> Tensor:
        position_BT = (self._mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -self._ids_BT.shape[1] :]
        inputs = {"input_ids": self._ids_BT, "attention_mask": self._mask_BT, "position_ids": position_BT}
        return pass_lanes(self.base, self._lanes, inputs, keep=1)[:, -1]

    def go_on(self, token_B: Tensor, is_written_B: Tensor | None = None) -> None:
        """Put a token behind every row; of a row that is written it is not read, and its positions grow no further."""
        mask_B1 = torch.ones_like(self._mask_BT[:, :1])
        if is_written_B is not None:
            mask_B1[is_written_B.to(self.base.device)] = 0
        self._ids_BT = token_B[:, None].to(self.base.device)
        self._mask_BT = torch.cat([self._mask_BT, mask_B1], dim=1)

    def keep(self, row_B: Tensor) -> None:
        """Forget all rows but these; of each member there must be as many."""
        row_B = row_B.to(self.base.device)
        of_lane = len(self._ids_BT) // len(self._lanes)
        for number, (lane, own_B) in enumerate(zip(self._lanes, row_B.chunk(len(self._lanes)), strict=True)):
            lane.keep(own_B - number * of_lane)
        self._ids_BT, self._mask_BT = self._ids_BT[row_B], self._mask_BT[row_B]
