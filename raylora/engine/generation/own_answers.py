"""Every member writes its own answers to its own prompts, in one loop; no mixture is made.

What is drawn depends on the member's seed, the prompt's name and the position. So an answer is the same whoever else
writes beside it, but for a tie within the last bits. Every token has a noise of its own and the greatest sum wins, so
that last bits, which other rows and members change, decide only between tokens that tie. A point on the cumulated
probabilities would be moved by all tokens before it.

Shapes: K members, N prompts of each, A of them still in the batch, B = K * A rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.data.order import derive_seed
from raylora.engine.generation.reading import Reading
from raylora.engine.model.packed_model import PackedModel


@dataclass(frozen=True)
class OwnPrompt:
    """What one member is asked."""

    name: str
    tokens: Sequence[int]
    most: int
    """Tokens of its answer, at most."""


@torch.no_grad()
def write_own(
    model: PackedModel, stacked: Mapping[str, Tensor], prompts_KN: Sequence[Sequence[OwnPrompt]],
    seeds_K: Sequence[int], temperature: float, ends: Sequence[int],
) -> list[list[list[int]]]:
    """Return the tokens of each member's answers, K x N, with the token that ends them if one did.

    Args:
        stacked: the members' tensors, over K.
        prompts_KN: as many of each member; their answers are written side by side.
        temperature: 0 takes the most probable token.
        ends: tokens that end an answer.
    """
    found: list[list[list[int]]] = [[[] for _ in prompts] for prompts in prompts_KN]
    reading = Reading(model, stacked, [prompt.tokens for prompts in prompts_KN for prompt in prompts])
    there_KA = [list(range(len(prompts))) for prompts in prompts_KN]

    def is_written(k: int, n: int) -> bool:
        answer = found[k][n]
        return len(answer) == prompts_KN[k][n].most or bool(answer and answer[-1] in ends)

    for position in range(max(prompt.most for prompts in prompts_KN for prompt in prompts)):
        tokens = []
        for k, logits_AV in enumerate(reading.logits().chunk(len(there_KA))):
            names = [prompts_KN[k][n].name for n in there_KA[k]]
            token_A = _drawn(logits_AV, temperature, [derive_seed(seeds_K[k], name, position) for name in names]).cpu()
            tokens.append(token_A)
            for n, token in zip(there_KA[k], token_A.tolist(), strict=True):
                if not is_written(k, n):
                    found[k][n].append(token)
        written_KA = [[is_written(k, n) for n in there] for k, there in enumerate(there_KA)]
        kept_KA = _kept(written_KA)
        if not kept_KA[0]:
            break
        reading.go_on(torch.cat(tokens), torch.tensor(written_KA).flatten())
        if len(kept_KA[0]) < len(there_KA[0]):
            each = len(there_KA[0])
            reading.keep(torch.tensor([k * each + at for k, kept in enumerate(kept_KA) for at in kept]))
            there_KA = [[there[at] for at in kept] for there, kept in zip(there_KA, kept_KA, strict=True)]
    return found


def _drawn(logits_AV: Tensor, temperature: float, seeds_A: Sequence[int]) -> Tensor:
    """Return a token per row, A, from ``softmax(z / T)``: the greatest of z / T plus Gumbel noise (Gumbel, 1954)."""
    if temperature == 0:
        return logits_AV.argmax(dim=-1)
    uniform_AV = torch.stack([
        torch.rand(logits_AV.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds_A
    ])
    noise_AV = -(-uniform_AV.log()).log()
    return (logits_AV.double() / temperature + noise_AV.to(logits_AV.device)).argmax(dim=-1)


def _kept(written_KA: Sequence[Sequence[bool]]) -> list[list[int]]:
    """Return the places to keep of every member: those not written, and as many that are as it takes to be even."""
    most = max(sum(not done for done in written_A) for written_A in written_KA)
    return [sorted(sorted(range(len(done_A)), key=done_A.__getitem__)[:most]) for done_A in written_KA]
