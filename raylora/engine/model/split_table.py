"""A table whose rows lie on all ranks of a gang, some of each part, and are gathered part by part or sent one by one.

DeepSpeed knows nothing of it. Its hooks expect of every pass that it takes the same steps, and ranks ask differently
often for the rows: one has more positions than another, one needs logits of a reference besides. So before every turn
through the parts the ranks agree whether anybody needs one more, and whoever needs none joins for the others' sake.

Shapes: V rows of the table, D its width, P parts, R rows of a part, K of them on this rank, N rows that are looked up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from raylora.engine.model.gang import Gang


class SplitTable(nn.Module):
    """1/G of the rows of every part; all that is done with it, all ranks do together."""

    own_PKB: Tensor
    """This rank's rows as bytes, which every collective carries; the last ones of a part may be nobody's."""

    def __init__(self, table_VD: Tensor, rows: int, gang: Gang, device: torch.device) -> None:
        """Keep this rank's share of rank 0's table, so many rows to a part; the other ranks' tables are not read."""
        super().__init__()
        self.rank, self.ranks = gang.place.rank, gang.place.size
        (self.length, self.width), self.dtype, self.rows = table_VD.shape, table_VD.dtype, rows
        self.share = math.ceil(rows / self.ranks)
        self._is_visited = False
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        row_bytes = self.width * self.dtype.itemsize
        shape = (math.ceil(self.length / rows), self.share, row_bytes)
        self.register_buffer("own_PKB", torch.zeros(shape, dtype=torch.uint8, device=device), persistent=False)
        for part, own_KB in enumerate(self.own_PKB):
            whole_RB = torch.zeros((self.ranks * self.share, row_bytes), dtype=torch.uint8, device=device)
            if self.rank == 0:
                part_RD = table_VD[part * rows : (part + 1) * rows]
                whole_RB[: len(part_RD)] = part_RD.contiguous().view(torch.uint8).to(device)
            self.from_first_rank(whole_RB)
            own_KB.copy_(whole_RB[self.rank * self.share : (self.rank + 1) * self.share])

    @staticmethod
    def from_first_rank(tensor: Tensor) -> None:
        """Write rank 0's numbers over a tensor."""
        from torch import distributed

        distributed.broadcast(tensor.view(torch.uint8), src=0)

    @property
    def part_bytes(self) -> int:
        """What one part takes when it is gathered."""
        return self.ranks * self.own_PKB[0].nbytes

    # --- part by part ---------------------------------------------------------------------------------
    def enter(self) -> None:
        """Begin a visit: until it is left, all ranks ask for parts or join those that do."""
        self._is_visited = True

    def leave(self) -> None:
        """Join the others' turns until nobody needs one more; all ranks leave together."""
        while self._agree(False):
            for _ in self._turn():
                pass
        self._is_visited = False

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield which rows come next, and the rows, R x D, which are overwritten when the next are asked for.

        Raises:
            RuntimeError: there is no visit: the other ranks are elsewhere, and would never answer.
        """
        if not self._is_visited:
            raise RuntimeError("logits of a base that is split are made within a pass that all of its ranks make")
        self._agree(True)
        yield from self._turn()

    def gather(self, part: int, buffer_B: Tensor) -> Tensor:
        """Return a part's rows, R x D, in a buffer of :attr:`part_bytes`."""
        from torch import distributed

        distributed.all_gather_into_tensor(buffer_B, self.own_PKB[part].flatten())
        return buffer_B.view(self.dtype).view(-1, self.width)[: min(self.rows, self.length - part * self.rows)]

    def _turn(self) -> Iterator[tuple[slice, Tensor]]:
        buffer_B = torch.empty(self.part_bytes, dtype=torch.uint8, device=self.own_PKB.device)
        for part in range(len(self.own_PKB)):
            part_RD = self.gather(part, buffer_B)
            first = part * self.rows
            yield slice(first, first + len(part_RD)), part_RD

    def _agree(self, wants_more: bool) -> bool:
        """Return whether any rank wants one more turn."""
        from torch import distributed

        self._flag.fill_(int(wants_more))
        distributed.all_reduce(self._flag, op=distributed.ReduceOp.MAX)
        return bool(self._flag)

    # --- row by row -----------------------------------------------------------------------------------
    def look_up(self, ids_N: Tensor) -> Tensor:
        """Return the rows of some ids, N x D, bit for bit; a row comes from the rank that has it.

        Each rank asks in turn, and is sent what it asked for and nothing else, at most a part's bytes at a time.
        """
        from torch import distributed

        counts = torch.empty(self.ranks, dtype=torch.int64, device=ids_N.device)
        distributed.all_gather_into_tensor(counts, counts.new_tensor([len(ids_N)]))
        found_NB = self.own_PKB.new_empty(len(ids_N), self.own_PKB.shape[2])
        for rank, count in enumerate(counts.tolist()):
            asked_N = ids_N.to(torch.int64, copy=True) if rank == self.rank else counts.new_empty(count)
            distributed.broadcast(asked_N, src=rank)
            for first in range(0, count, self.rows):
                rows_NB = self._own_rows(asked_N[first : first + self.rows])
                # One rank has a row and all others zeros, so a sum of bytes is that row.
                distributed.reduce(rows_NB, dst=rank, op=distributed.ReduceOp.SUM)
                if rank == self.rank:
                    found_NB[first : first + self.rows] = rows_NB
        return found_NB.view(self.dtype)

    def _own_rows(self, ids_N: Tensor) -> Tensor:
        part_N, within_N = ids_N // self.rows, ids_N % self.rows
        here_N = within_N // self.share == self.rank
        rows_NB = self.own_PKB.new_zeros(len(ids_N), self.own_PKB.shape[2])
        rows_NB[here_N] = self.own_PKB[part_N[here_N], within_N[here_N] % self.share]
        return rows_NB


class SplitLookup(nn.Module):
    """What an embedding makes of ids, bit for bit, from a table that is split.

    The embedding itself is passed over the rows that were found, so one that scales them, as Gemma 3's, goes on to.
    """

    def __init__(self, embedding: nn.Embedding, table: SplitTable, device: torch.device) -> None:
        """Take an embedding that lets go of its table."""
        super().__init__()
        embedding.padding_idx = None  # a number of a row that is not there; without a gradient it means nothing
        self.table, self._inner = table, [embedding]  # in a list: it is no submodule
        self._hold(torch.empty((0, table.width), dtype=table.dtype))
        embedding.to(device)

    def forward(self, ids: Tensor) -> Tensor:
        """Return what stands for some ids (...), ... x D."""
        self._hold(self.table.look_up(ids.flatten()))
        try:
            found: Any = self._inner[0](torch.arange(ids.numel(), device=ids.device).view(ids.shape))
            return found
        finally:
            self._hold(torch.empty((0, self.table.width), dtype=self.table.dtype))

    def _hold(self, rows_ND: Tensor) -> None:
        self._inner[0].weight = nn.Parameter(rows_ND, requires_grad=False)
