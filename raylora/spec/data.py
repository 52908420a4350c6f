"""Where rows come from, and how they are divided."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raylora.spec.base import Frozen, Located


class SetSpec(Located):
    """Where the rows of one data set come from: exactly one of ``source`` and ``files``."""

    source: str | None = None
    """A hub data set id, or ``pypi:NAME``."""
    files: str | list[str] | None = None
    """Paths of jsonl, csv, parquet or arrow files (one format)."""
    subset: str | None = None
    """Which configuration of a hub data set, such as ``sst2`` of GLUE."""
    split: str | None = None
    """Which split of a hub data set."""
    revision: str | None = None
    """Pins a hub data set to a commit, tag or branch."""
    rows: int | None = Field(default=None, ge=1)
    """Use at most this many rows, drawn with the data seed."""
    columns: dict[str, str] = {}
    """Rename: what the task calls a column -> what this set calls it."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """What separates the fields of csv files; by default it is recognized: a comma, a semicolon, a tab or a bar."""

    @model_validator(mode="after")
    def _one_origin(self) -> SetSpec:
        if (self.source is None) == (self.files is None):
            raise ValueError("give exactly one of 'source' and 'files'")
        return self

    @property
    def file_names(self) -> list[str]:
        """The files as they are written."""
        return [self.files] if isinstance(self.files, str) else list(self.files or ())

    def local_paths(self) -> list[str]:
        """Return the files as they are written."""
        return self.file_names


class DataSpec(Frozen):
    """Training, validation and test rows; without own sets, the last two are split off the training set."""

    train: SetSpec
    """The training rows."""
    validation: SetSpec | None = None
    """A set of its own for validation; by default it is split off the training set."""
    test: SetSpec | None = None
    """A set of its own to test on; by default it is split off the training set."""
    train_rows: int | None = Field(default=None, ge=1)
    """How many rows are trained on, drawn with the data seed; by default all that the splits leave."""
    validation_rows: int = Field(default=500, ge=1)
    """How many rows are split off for validation, if it has no set of its own."""
    test_rows: int = Field(default=1000, ge=1)
    """How many rows are split off for the test, if it has no set of its own."""
    seed: int = 0
    """Decides the split and every sub-sample; members have seeds of their own."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that does not fit the task does: stop with an error that names it, or be counted and left out."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """With ``on_bad_row: skip``, the share of a set's rows beyond which bad rows are an error all the same."""
