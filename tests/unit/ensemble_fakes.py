"""Synthetic members: a shared signal, private noise and too much confidence, as fine-tuned models have."""

from __future__ import annotations

import torch
from torch import Tensor

from raylora.ensemble import Predictions
from raylora.ensemble.outputs.classes import ClassPredictions
from raylora.ensemble.outputs.tokens import TokenPredictions


def fake_logits(
    members: int, rows: int, classes: int, seed: int, signal: float = 2.0, noise: float = 1.5
) -> tuple[Tensor, Tensor]:
    """Return logits M x N x C and the labels N that they were made for."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(0, classes, (rows,), generator=generator)
    clean_NC = torch.nn.functional.one_hot(labels_N, classes) * signal
    shared_NC = torch.randn(rows, classes, generator=generator)
    private_MNC = torch.randn(members, rows, classes, generator=generator) * noise
    return ((clean_NC + shared_NC + private_MNC) * 1.7).float(), labels_N


def fake_group(members: int, seed: int = 0, rows: int = 200, noise: float = 1.5) -> list[Predictions]:
    """Return one ensemble's predictions of a validation, a test, a shifted and a foreign set with 4 classes."""
    sets = []
    shapes = (("validation", "validation", 2.0), ("test", "test", 2.0), ("shifted", "in_distribution", 1.0))
    for offset, (name, role, signal) in enumerate(shapes):
        labels_N = fake_logits(1, rows, 4, offset)[1]
        generator = torch.Generator().manual_seed(1000 * seed + offset)
        shared_NC = torch.randn(rows, 4, generator=torch.Generator().manual_seed(offset))
        clean_NC = torch.nn.functional.one_hot(labels_N, 4) * signal + shared_NC
        private_MNC = torch.randn(members, rows, 4, generator=generator) * noise
        ids = [f"{name}-{row}" for row in range(rows)]
        logits_MNC = (1.7 * (clean_NC + private_MNC)).float()
        sets.append(ClassPredictions(name=name, role=role, values=logits_MNC, labels_N=labels_N, ids=ids))
    generator = torch.Generator().manual_seed(1000 * seed + 9)
    foreign_MNC = torch.randn(members, rows, 4, generator=generator) * noise
    sets.append(
        ClassPredictions(
            name="foreign", role="out_of_distribution", values=foreign_MNC, ids=[f"f{i}" for i in range(rows)]
        )
    )
    return sets


def fake_language_group(members: int, seed: int = 0, documents: int = 20, tokens: int = 30) -> list[Predictions]:
    """Return token log-probabilities of a test and a shifted text."""
    sets = []
    for offset, (name, role) in enumerate((("test", "test"), ("shifted", "in_distribution"))):
        generator = torch.Generator().manual_seed(1000 * seed + offset)
        difficulty_N = torch.rand(documents * tokens, generator=torch.Generator().manual_seed(offset)) * 5
        private_MN = torch.rand(members, documents * tokens, generator=generator) * 2
        ids = [f"{name}-{document}" for document in range(documents) for _ in range(tokens)]
        logprobs_MN = -(difficulty_N + private_MN).float()
        sets.append(TokenPredictions(name=name, role=role, values=logprobs_MN, ids=ids))
    return sets
