"""The frozen model, its precision, and the text that it is calibrated on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, PrivateAttr, model_validator

from raylora.spec.base import AnyCompensation, AnyQuantization, GridSpec, Located
from raylora.spec.data import SetSpec


class CalibrationSpec(SetSpec):
    """Plain text that the base reads while it is quantized; its labels, if it has any, are not looked at."""

    samples: int = Field(default=128, ge=1)
    """How many samples are read."""
    length: int = Field(default=512, ge=8)
    """Tokens per sample. A causal model reads whole texts, end to end, cut to this; an encoder one text per sample."""
    held_out: int = Field(default=16, ge=0)
    """Further samples, of other texts, on which perplexity is measured before and after; for causal models."""
    seed: int = 0
    """Decides which texts are read."""


class BaseSpec(Located):
    """The frozen model that all members share."""

    source: str
    """A hub id, a local folder, or ``pypi:NAME`` for a model that comes out of a package registry."""
    revision: str | None = None
    """Pins a hub model to a commit, tag or branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of the base; ``auto`` is bfloat16 where the processor multiplies it natively, else float32.
    Adapters, heads and the optimizer always stay in float32."""
    quantization: AnyQuantization = Field(default_factory=lambda: cast(Any, {"kind": "nf4"}))
    """How the frozen weights are stored."""
    compensation: AnyCompensation | None = None
    """A low-rank pair computed with the quantized weights, by ``cloq``, ``loftq``, ``apiq`` or ``rilq``; needs rtn or
    optq."""
    calibration: CalibrationSpec | None = None
    """The text that optq and a compensation read; for rtn and optq only."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """``auto`` is eager on CPU (several times faster backward in bfloat16) and sdpa on GPU."""
    trust_remote_code: bool = False
    """Run code from the model's repository; allowed together with a ``revision`` only."""

    _held: dict[str, Path] = PrivateAttr(default_factory=dict)

    def held(self, role: str = "base") -> Path | None:
        """Return the folder in which this machine has the files of a run's model, if it was looked for."""
        return self._held.get(role)

    def hold(self, folders: Mapping[str, Path]) -> None:
        """Read the files of a run's models there from now on, whatever their sources are.

        Args:
            folders: ``base``, this one; and that of a teacher that is loaded beside it.
        """
        self._held.update(folders)

    def local_paths(self) -> list[str]:
        """Return the source, where it is a folder, or was when the run was begun."""
        written = self.source.startswith((".", "/", "~")) or self.source in self.places
        return [self.source] if written or Path(self.source).is_dir() else []

    def look_in(self, places: Mapping[str, str]) -> None:
        """Look for the source in its place from now on."""
        self._places.update({self.source: places[self.source]} if self.source in places else {})

    @property
    def folder(self) -> Path | None:
        """The local folder that the source is or was; None for a hub's and a catalog's."""
        paths = self.local_paths()
        return Path(self.places.get(paths[0], paths[0])).expanduser() if paths else None

    @property
    def grid(self) -> GridSpec | None:
        """The grid of a base that is prepared before it is loaded; None where weights are quantized as they load."""
        return self.quantization if isinstance(self.quantization, GridSpec) else None

    @model_validator(mode="after")
    def _pinned_code(self) -> BaseSpec:
        if self.trust_remote_code and not self.revision:
            raise ValueError("trust_remote_code runs code from the model repository: pin it with 'revision'")
        return self

    @model_validator(mode="after")
    def _preparation_is_whole(self) -> BaseSpec:
        grid, kind = self.grid is not None, self.quantization.kind
        if self.compensation is not None and not grid:
            raise ValueError(f"compensation is computed while weights are put on a grid, not for {kind}: "
                             "use quantization kind optq or rtn")
        if self.compensation is not None and self.compensation.rounds_itself and kind != "rtn":
            raise ValueError(f"compensation {self.compensation.kind} rounds by itself and takes bits and groups from "
                             f"the quantization: use kind rtn in place of {kind}")
        if self.calibration is not None and not grid:
            raise ValueError(f"quantization {kind} reads no calibration text: use kind optq or rtn, or leave it out")
        reads = [kind] if self.quantization.reads_calibration else []
        reads += ["compensation"] if self.compensation is not None else []
        if reads and self.calibration is None:
            raise ValueError(f"{' and '.join(reads)} need calibration text: "
                             "add calibration: {source: pypi:bbc-news} or {files: texts.jsonl}")
        return self
