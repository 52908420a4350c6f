"""The output layer of a language model, passed in chunks of positions: the logits of all never exist at once.

The loss of a position depends on that position's logits alone, and the output layer is frozen. So a chunk's logits are
made, its losses are taken and at once their gradient for the hidden states, and the logits are gone before those of
the next chunk are there. The gradient is kept, which is as large as the hidden states; the backward pass multiplies
each position's by what its loss counts for, and passes the output layer no second time.

The hidden states are those of the model's own forward: a hook takes them where they enter the output layer.

Shapes: B rows, T tokens, P positions that predict a target token, C of them in a chunk, D hidden width, V vocabulary,
S what a position's logits are made from: D numbers, or V where they are there already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raylora.adapters.base import is_linear
from raylora.engine.model.blocks import find_blocks, standing_in
from raylora.engine.model.output_parts import OutputInParts
from raylora.engine.model.token_losses import PositionLoss
from raylora.engine.model.trunk import made_up_rows
from raylora.errors import BaseError
from raylora.placement.estimate import logit_chunk

logger = logging.getLogger(__name__)

Forward = Callable[[], Tensor]
"""Passes the model and returns its logits, B x T x V."""


class TokenHead(Protocol):
    """Makes the logits that predict target tokens, all at once or chunk by chunk."""

    def losses(self, forward: Forward, predicting_BT: Tensor, loss: PositionLoss) -> Tensor:
        """Return loss_P of one forward pass, with a gradient if gradients are on."""

    def states(self, forward: Forward, predicting_BT: Tensor) -> Tensor:
        """Return states_PS of one forward pass, which :meth:`logits` makes the logits from."""

    def logits(self, states_CS: Tensor) -> Tensor:
        """Return logits_CV of some of these positions."""

    def chunks(self, positions: int) -> list[slice]:
        """Return the chunks that so many positions are passed in."""


class WholeHead:
    """The logits as the model's forward returns them, where the output layer cannot be passed apart from it."""

    def __init__(self, reason: str = "") -> None:
        """Take why that is so."""
        self.reason = reason

    def losses(self, forward: Forward, predicting_BT: Tensor, loss: PositionLoss) -> Tensor:
        """Return loss_P; the logits of all positions, and what is made of them, are there until the backward pass."""
        return loss(self.states(forward, predicting_BT), slice(None))

    def states(self, forward: Forward, predicting_BT: Tensor) -> Tensor:
        """Return the logits, P x V."""
        return forward()[:, :-1][predicting_BT]

    def logits(self, states_CS: Tensor) -> Tensor:
        """Return what is given."""
        return states_CS

    def chunks(self, positions: int) -> list[slice]:
        """Return one."""
        return [slice(0, positions)]


class ChunkedHead:
    """The frozen output layer of a model, passed with some positions at a time."""

    def __init__(self, model: Any, vocabulary: int, device: torch.device) -> None:
        """Take a model whose logits are :meth:`logits` of its output layer's input, and nothing else."""
        self.model, self.rows = model, logit_chunk(vocabulary, device.type != "cpu")
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @property
    def module(self) -> nn.Module:
        """The output layer; a base that is split has another one in its place."""
        return self.model.get_output_embeddings()

    def losses(self, forward: Forward, predicting_BT: Tensor, loss: PositionLoss) -> Tensor:
        """Return loss_P; of their making only the gradient for the hidden states is kept."""
        return self._where_it_enters(forward, predicting_BT, lambda states_PD: _Walk.apply(states_PD, self, loss))

    def states(self, forward: Forward, predicting_BT: Tensor) -> Tensor:
        """Return the hidden states, P x D."""
        return self._where_it_enters(forward, predicting_BT, lambda states_PD: states_PD)

    def logits(self, states_CS: Tensor) -> Tensor:
        """Return logits_CV in the base's type; of a split base only where its output layer is gathered."""
        layer = self.module
        product = layer.product if isinstance(layer, OutputInParts) else layer.forward
        return self.capped(product(states_CS))  # no call: hooks belong to the pass around this

    def capped(self, logits_CV: Tensor) -> Tensor:
        """Return what the model makes of its output layer's output."""
        return logits_CV if self.softcap is None else torch.tanh(logits_CV / self.softcap) * self.softcap

    def chunks(self, positions: int) -> list[slice]:
        """Return equal chunks and a last one: a CPU's matrix library compiles a kernel for every number of rows."""
        return [slice(start, min(start + self.rows, positions)) for start in range(0, positions, self.rows)]

    def _where_it_enters(
        self, forward: Forward, predicting_BT: Tensor, take: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Pass the model, and return what is taken of the hidden states at the positions that are asked.

        The first hook comes before those of a split base, which for an input with a gradient would expect the output
        layer in the backward pass; the second after them, where it is gathered. The model's forward goes on with a
        single position, whose logits nobody reads, or with none where the layer is passed in parts.
        """
        entered: list[Tensor] = []
        taken: list[Tensor] = []
        layer = self.module
        visit, left = (layer.visit, 0) if isinstance(layer, OutputInParts) else (nullcontext, 1)

        def enter(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (hidden_BTD,) = arguments
            entered.append(hidden_BTD[:, :-1][predicting_BT])
            return (hidden_BTD[:left, :1].detach(),)

        def at_output(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            with visit():
                taken.append(take(entered[0]))

        hooks = (
            layer.register_forward_pre_hook(enter, prepend=True), layer.register_forward_pre_hook(at_output),
        )
        try:
            forward()
        finally:
            for hook in hooks:
                hook.remove()
        return taken[0]


class _Walk(torch.autograd.Function):
    """loss_P of hidden states, P x D, and in the backward pass each one's gradient times what its loss counts for."""

    @staticmethod
    def forward(ctx: Any, states_PD: Tensor, head: ChunkedHead, loss: PositionLoss) -> Tensor:
        is_trained = ctx.needs_input_grad[0]
        loss_P = states_PD.new_empty(len(states_PD), dtype=torch.promote_types(states_PD.dtype, torch.float32))
        gradient_PD = torch.empty_like(states_PD) if is_trained else None
        for chunk in head.chunks(len(states_PD)):
            leaf_CD = states_PD[chunk].detach().requires_grad_(is_trained)
            with torch.set_grad_enabled(is_trained):
                loss_C = loss(head.logits(leaf_CD), chunk)
            loss_P[chunk] = loss_C.detach()
            if gradient_PD is not None:
                (gradient_PD[chunk],) = torch.autograd.grad(loss_C, leaf_CD, torch.ones_like(loss_C))
        if gradient_PD is not None:
            ctx.save_for_backward(gradient_PD)
        return loss_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient_PD,) = ctx.saved_tensors
        return (gradient_PD * grads[0][:, None]).to(gradient_PD.dtype), None, None


def find_token_head(model: Any, options: Mapping[str, Any], device: torch.device) -> TokenHead:
    """Return a loaded model's output layer in chunks or, if its logits are made in another way, in one piece.

    A few made-up rows show it: the logits must be the output layer's and nothing more, and its input all it needs.

    Args:
        options: what this model's forward is always given.
        device: where it will compute, which decides how long a chunk is.
    """
    output_layer = model.get_output_embeddings()
    if output_layer is None or not is_linear(output_layer):  # an adapted one is not frozen
        return _whole(model, "its output layer is not one frozen linear layer")
    inputs = {**made_up_rows(model), **options}
    outputs: list[Tensor] = []
    handle = output_layer.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    try:
        with torch.no_grad(), _first_block_for_all(model):
            logits_BTV = model(**inputs).logits
            if len(outputs) != 1:
                return _whole(model, f"its forward calls the output layer {len(outputs)} times")
            head = ChunkedHead(model, logits_BTV.shape[-1], device)
            everywhere_BT = torch.ones_like(inputs["input_ids"][:, 1:], dtype=torch.bool)
            states_PD = head.states(lambda: model(**inputs).logits, everywhere_BT)
            found_BTV = head.logits(states_PD).view_as(logits_BTV[:, :-1])
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return _whole(model, f"its forward does not go on without its logits ({error})")
    finally:
        handle.remove()
    # The same numbers in the same type, but for a kernel that sums in another order.
    if float((found_BTV - logits_BTV[:, :-1]).float().abs().max()) > 1e-2 * float(logits_BTV.float().abs().max()):
        return _whole(model, "its logits are changed after the output layer")
    return head


@contextmanager
def _first_block_for_all(model: nn.Module) -> Iterator[None]:
    """Run forwards in which the blocks after the first give what that one gave: no more is needed of them here."""
    try:
        first, *others = (block.module for block in find_blocks(model))
    except BaseError:  # no chain of blocks: all of it is run
        yield
        return
    given: list[Any] = []
    handle = first.register_forward_hook(lambda module, arguments, output: given.append(output))
    try:
        with standing_in(others, lambda *positional, **named: given[-1]):
            yield
    finally:
        handle.remove()


def _whole(model: nn.Module, reason: str) -> WholeHead:
    logger.warning("%s: the logits of all positions are held at once: %s", type(model).__name__, reason)
    return WholeHead(reason)
