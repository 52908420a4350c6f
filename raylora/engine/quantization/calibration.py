"""The text that a base reads while it is quantized: drawn, cut into samples, kept apart from what is evaluated on.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylora.data.order import derive_seed
from raylora.data.sources import load_rows
from raylora.data.splits import text_key
from raylora.data.task import leading_ids, pad_id
from raylora.errors import DataError
from raylora.spec import CalibrationSpec, SetSpec

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Calibration:
    """Token batches to calibrate on, and others to measure perplexity on."""

    batches: list[dict[str, Tensor]]
    """Keyword arguments of the model: ``input_ids`` and ``attention_mask``, B x T."""
    held_out: list[dict[str, Tensor]]
    tokens: int
    """Real tokens in ``batches``."""
    held_out_tokens: int
    left_out: int
    """Texts that are evaluated on, and so were not calibrated on."""
    content_hash: str
    """SHA-256 of all tokens, in order."""


def load_calibration(
    spec: CalibrationSpec, tokenizer: Any, is_decoder: bool, evaluated: Iterable[str] = (),
    evaluation_sets: Sequence[SetSpec] = (),
) -> Calibration:
    """Read, draw and tokenize the calibration text.

    A decoder reads texts end to end, in samples of ``length`` tokens; an encoder one text per sample, cut to it.

    Args:
        evaluated: keys of the texts that predictions are scored on; they are left out, whatever set they are in.
        evaluation_sets: sets that are evaluated on; calibrating on one of them is refused.

    Raises:
        DataError: no text, too little of it, or an evaluation set.
    """
    _refuse_evaluation_sets(spec, evaluation_sets)
    texts = _texts(spec)
    used = set(evaluated)
    free = [text for text in texts if text_key(text) not in used]
    limit = min(spec.length, int(tokenizer.model_max_length))
    order = np.random.default_rng(derive_seed(spec.seed, "calibration")).permutation(len(free))
    draw = _Samples([free[i] for i in order], tokenizer, limit, is_decoder)
    # What is held out comes first, so that more or fewer samples to calibrate on leave it as it is.
    held_out = draw.take(spec.held_out) if is_decoder else []
    samples = draw.take(spec.samples)
    if len(samples) < spec.samples:
        raise DataError(
            f"base.calibration: {_origin(spec)} holds text for {len(samples)} samples of {limit} tokens"
            + (f" beside {len(held_out)} held out" if held_out else "") + f", and {spec.samples} are asked for"
            + (f" ({len(texts) - len(free)} texts are in evaluation sets)" if len(free) < len(texts) else ""),
            "give more text, or lower base.calibration.samples, length or held_out",
        )
    content = hashlib.sha256(json.dumps([samples, held_out]).encode()).hexdigest()
    return Calibration(
        _batched(samples, tokenizer), _batched(held_out, tokenizer), sum(map(len, samples)),
        sum(len(sample) - 1 for sample in held_out), len(texts) - len(free), content,
    )


def _texts(spec: CalibrationSpec) -> list[str]:
    table = load_rows(spec)
    texts = [str(row.values.get("text") or "").strip() for row in table.rows]
    texts = list(dict.fromkeys(text for text in texts if text))
    if not texts:
        raise DataError(
            f"base.calibration: {table.origin} has no text in a column 'text'; it has: {', '.join(table.columns)}",
            "rename the column that holds it: columns: {text: NAME}",
        )
    return texts if spec.rows is None else texts[: spec.rows]


def _refuse_evaluation_sets(spec: CalibrationSpec, sets: Sequence[SetSpec]) -> None:
    for other in sets:
        if (spec.source, spec.subset, spec.split, spec.file_names) == (
            other.source, other.subset, other.split, other.file_names
        ):
            raise DataError(
                f"base.calibration: {_origin(spec)} is an evaluation set of this run",
                "calibrate on other text: a base calibrated on test data makes its scores look too good",
            )


def _origin(spec: SetSpec) -> str:
    return spec.source or ", ".join(spec.file_names)


class _Samples:
    """Texts turned into token samples on demand, each text used once."""

    def __init__(self, texts: Sequence[str], tokenizer: Any, length: int, is_decoder: bool) -> None:
        self._texts, self._tokenizer = iter(texts), tokenizer
        self._length, self._is_decoder = length, is_decoder
        self._lead = leading_ids(tokenizer)

    def take(self, count: int) -> list[list[int]]:
        """Return the next samples; a text is never shared by two calls, so what one holds the other has not."""
        samples: list[list[int]] = []
        buffer: list[int] = []
        while len(samples) < count and (text := next(self._texts, None)) is not None:
            if not self._is_decoder:
                samples.append(self._tokenizer(text, truncation=True, max_length=self._length)["input_ids"])
                continue
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            buffer += [*self._lead, *ids, self._tokenizer.eos_token_id]
            while len(buffer) >= self._length and len(samples) < count:
                samples.append(buffer[: self._length])
                buffer = buffer[self._length :]
        return samples


def _batched(samples: Sequence[list[int]], tokenizer: Any) -> list[dict[str, Tensor]]:
    """Return padded batches of rows of like length; the order of rows does not matter to a Gram matrix."""
    by_length = sorted(samples, key=len)
    batches = []
    while by_length:
        longest = len(by_length[-1])
        rows, by_length = by_length[-max(1, _BATCH_TOKENS // longest) :], by_length[: -max(1, _BATCH_TOKENS // longest)]
        ids_BT = torch.full((len(rows), longest), pad_id(tokenizer))
        mask_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids_BT[number, : len(row)] = torch.tensor(row)
            mask_BT[number, : len(row)] = 1
        batches.append({"input_ids": ids_BT, "attention_mask": mask_BT})
    return batches
