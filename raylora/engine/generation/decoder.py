"""Token after token from all members together: each has its own cache, and the base is passed once for all of them.

The rows of a forward are member by member, as in training: rows m * A .. (m + 1) * A - 1 are member m's, for the A
prompts that are not finished. All members read the same prefix, the one that their mixture chose, unless each goes its
own way.

Shapes: M members, N prompts, A of them unfinished, B = M * A rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.adapters.packed import member_count
from raylora.engine.generation.mixture import Mixture, draw, mix, uniforms
from raylora.engine.generation.reading import Reading
from raylora.engine.model.packed_model import PackedModel


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """Of the mixture; 0 takes the most probable token."""
    top_p: float = 1.0
    seed: int = 0
    rule: str = "mean_probabilities"
    weights: tuple[float, ...] | None = None
    """What each member weighs in the mixture; None where all weigh alike."""
    each_member: bool = False
    """Every member writes its own answer, and no mixture is made."""


@dataclass(frozen=True)
class Written:
    """One token of one answer."""

    row: int
    """Of which prompt."""
    member: int | None
    """Of which member, where each writes its own."""
    token: int
    logprob: float
    """Under the distribution that is mixed, before temperature and nucleus."""
    entropy: float
    mutual_information: float | None
    """None where a member writes alone."""


class Decoder:
    """The state of some answers that are being written."""

    def __init__(
        self, model: PackedModel, stacked: Mapping[str, Tensor], prompts: Sequence[Sequence[int]],
        names: Sequence[str], sampling: Sampling, ends: Sequence[int],
    ) -> None:
        """Take the members' tensors, stacked over M, and the prompts' tokens.

        Args:
            names: of the prompts; what is drawn depends on them and not on what else is in the batch.
            ends: tokens that end an answer.
        """
        self.sampling, self.ends = sampling, set(ends)
        self.members = member_count(stacked)
        self._weights_M = None if sampling.weights is None else torch.tensor(sampling.weights, dtype=torch.float64)
        self.names, self.position = list(names), 0
        self.unfinished = list(range(len(prompts)))
        self._done_MA = torch.zeros((self.members, len(prompts)), dtype=torch.bool)
        self._reading = Reading(model, stacked, list(prompts) * self.members)

    @torch.no_grad()
    def fork(self, sampling: Sampling) -> Decoder:
        """Return answers to the same prompts that are chosen otherwise; the prompts are passed once for both.

        Both hold what the members remember of the prompts. To be called before :meth:`steps` begins.
        """
        twin = copy.copy(self)
        twin.sampling, twin.unfinished, twin._done_MA = sampling, list(self.unfinished), self._done_MA.clone()
        twin._reading = self._reading.fork()
        return twin

    @torch.no_grad()
    def steps(self) -> Iterator[list[Written]]:
        """Yield what is written at every position, one token per unfinished answer, until all are finished."""
        for position in range(self.sampling.max_new_tokens):
            if not self.unfinished:
                return
            self.position = position
            logits_MAV = self._reading.logits().view(self.members, len(self.unfinished), -1)
            written, token_B = self._each(logits_MAV) if self.sampling.each_member else self._together(logits_MAV)
            yield written
            self._reading.go_on(token_B)
            self._leave()

    def finish(self, row: int, member: int | None = None) -> None:
        """Write no more of an answer, as when its text is complete."""
        if row in self.unfinished:
            at = self.unfinished.index(row)
            self._done_MA[slice(None) if member is None else member, at] = True

    def _together(self, logits_MAV: Tensor) -> tuple[list[Written], Tensor]:
        mixture = mix(logits_MAV, self.sampling.rule, self._weights_M)
        token_A = self._draw(mixture.logp_NV, [self.names[row] for row in self.unfinished])
        written = self._written(mixture, token_A, None)
        return written, token_A.repeat(self.members)

    def _each(self, logits_MAV: Tensor) -> tuple[list[Written], Tensor]:
        written, tokens = [], []
        for member, logits_AV in enumerate(logits_MAV):
            own = mix(logits_AV[None])
            names = [f"{self.names[row]}/{member}" for row in self.unfinished]
            token_A = self._draw(own.logp_NV, names)
            tokens.append(token_A)
            written += self._written(own, token_A, member)
        return written, torch.cat(tokens)

    def _draw(self, logp_AV: Tensor, names: Sequence[str]) -> Tensor:
        sampling = self.sampling
        uniform_A = uniforms(sampling.seed, names, self.position) if sampling.temperature else torch.zeros(len(names))
        return draw(logp_AV, sampling.temperature, sampling.top_p, uniform_A).cpu()

    def _written(self, mixture: Mixture, token_A: Tensor, member: int | None) -> list[Written]:
        """Return the tokens of answers that are not finished, and finish those that a token ends."""
        logprob_A = mixture.logp_NV.cpu().gather(1, token_A[:, None])[:, 0]
        entropy_A, shared_A = mixture.entropy_N.cpu(), mixture.mutual_information_N.cpu()
        found = []
        for at, row in enumerate(self.unfinished):
            if self._done_MA[member or 0, at]:
                continue
            token = int(token_A[at])
            found.append(Written(
                row, member, token, float(logprob_A[at]), float(entropy_A[at]),
                float(shared_A[at]) if member is None else None,
            ))
            if token in self.ends:
                self.finish(row, member)
        return found

    def _leave(self) -> None:
        """Take the prompts out of the batch whose answers are all finished, with what their members remember."""
        done_A = self._done_MA.all(dim=0)
        if not done_A.any():
            return
        kept_A = (~done_A).nonzero()[:, 0]
        self.unfinished = [self.unfinished[at] for at in kept_A.tolist()]
        old = len(done_A)
        self._done_MA = self._done_MA[:, kept_A]
        self._reading.keep(torch.cat([member * old + kept_A for member in range(self.members)]))
