"""What every row's logits are the derivatives of: one member's matrices, row by row, in few backward passes.

A pack gives each of its members its own gradient. Here its members are copies of one, each with one row: what each gets
is that row's gradient, whatever the model is made of.

Shapes: N rows, C classes, O x I a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from raylora.adapters.base import HEAD, Tensors
from raylora.data.task import Example, collate_pack
from raylora.engine.model.gang import Round
from raylora.engine.model.packed_forward import pass_pack
from raylora.engine.model.packed_model import PackedModel, StepTensors
from raylora.engine.training.predict import batches_by_length

_BYTES = 256 * 2**20
"""Of Jacobians at once, in float64."""


class LogitJacobians:
    """The derivatives of one member's logits by its adapter's matrices, without dropout; its head is a constant."""

    def __init__(self, model: PackedModel, member: Mapping[str, Tensor]) -> None:
        """Take a trained member, by name, with its head."""
        self.model = model
        self.member = {name: tensor.to(model.base.device) for name, tensor in member.items()}
        # In this order: a member that is read from its file has another, and sums over matrices depend on it.
        self.names = sorted(name for name in member if not name.startswith(HEAD))

    def of(self, examples: Sequence[Example]) -> tuple[Tensor, Tensors]:
        """Return logits_NC in float64, and by matrix its Jacobian, N x C x O x I, in float32."""
        model, rows = self.model, len(examples)
        batch = collate_pack(model.task, [[example] for example in examples], model.base.tokenizer)
        batch = batch.to(model.base.device)
        copies = {name: tensor[None].expand(rows, *tensor.shape) for name, tensor in self.member.items()}
        step = StepTensors(model, copies)
        leaves = [step.leaves[name] for name in self.names]
        with model.base.round(Round.TRAIN):
            scores_NC = model.task.scores(pass_pack(model.base, model.task, step.pack, batch), batch)
            with model.base.slot.use(step.pack):  # blocks that are run again read it again
                of_classes = [
                    torch.autograd.grad(
                        scores_NC[:, c].sum(), leaves, retain_graph=c + 1 < scores_NC.shape[1], materialize_grads=True,
                        allow_unused=True,
                    ) for c in range(scores_NC.shape[1])
                ]
        jacobians = {name: torch.stack([of_class[i] for of_class in of_classes], dim=1).cpu()
                     for i, name in enumerate(self.names)}
        return scores_NC.detach().cpu().double(), jacobians

    def batches(self, examples: Sequence[Example], batch: int) -> Iterator[list[int]]:
        """Yield the indices of rows of like length, as many at once as ``batch`` and the memory allow."""
        numbers = len(self.model.task.label_names) * sum(self.member[name].numel() for name in self.names)
        yield from batches_by_length(examples, max(1, min(batch, _BYTES // (8 * numbers))))
