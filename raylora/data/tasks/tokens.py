"""What tasks share whose answer is a text: a causal language model gives every target token a probability.

Shapes: N = B rows, T tokens, K = T kept positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raylora.data.task import UNLABELED, Batch, Example, PaddingSide, collate, mean_per_example, token_logprobs


class TokenTask:
    """The probability of each target token given those before it in its row."""

    auto_class = "AutoModelForCausalLM"
    output = "tokens"
    num_outputs = 0
    no_label: int | float = UNLABELED
    label_column: str | None = None

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.label_names: list[str] = []

    def model_kwargs(self) -> dict[str, Any]:
        """Return nothing: the model keeps its own head."""
        return {}

    def forward_kwargs(self, batch: Batch) -> dict[str, Any]:
        """Return nothing: any position's logits may be needed."""
        return {}

    def padding_side(self, is_decoder: bool) -> PaddingSide:
        """Return left, as for every causal model."""
        return "left"

    def label(self, row: Mapping[str, Any]) -> int | None:
        """Return None: the text is its own label."""
        return None

    def collate(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Batch:
        """Pad rows on the left; the target mask leaves out padding, each first token, and all that is not learned."""
        return collate(examples, tokenizer)

    def token_logprobs(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logp_BT float32 of each token (0 where it is no target) and mask_BT of the targets."""
        return token_logprobs(logits, batch)

    def scores(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return logp_BT float32: here the scores are tokens' log-probabilities, not classes' logits."""
        return token_logprobs(logits, batch)[0]

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return loss_N, the mean negative log-likelihood of each row's targets."""
        return mean_per_example(-scores, batch)
