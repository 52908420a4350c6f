"""Tokenized sets as files, and the key that says what they were made of: text is read and tokenized once per content.

One Arrow file per set holds its examples; its schema's metadata holds the rest of what is known of the set.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from raylora.data.catalog.assets import PREFIX, dataset_file
from raylora.data.sets import DataSets, LoadedSet
from raylora.data.task import Example
from raylora.spec import DataSpec, EvaluationSpec, SetSpec, TaskSpec

_FORMAT = 2
"""Raised when tokenizing, splitting or this file's layout changes: what was kept before is then made anew."""
_ROWS = pa.list_(pa.list_(pa.int32()))


def sets_key(
    data: DataSpec, evaluation: EvaluationSpec, task: TaskSpec, tokenizer: PreTrainedTokenizerBase,
    transfer: SetSpec | None = None, base_dir: Path | None = None, asks: bool = False,
) -> str | None:
    """Return a hash of all that decides what a run's sets are: the files' bytes, the specs and the tokenizer.

    None where the content cannot be known without reading it: a set from a hub without a commit as its revision, or
    a file that is not there (whoever reads it says so).
    """
    named = {**evaluation.in_distribution, **evaluation.out_of_distribution}
    sources = [data.train, data.validation, data.test, transfer, *named.values()]
    contents = [_content(source, base_dir or Path()) for source in sources if source is not None]
    return None if None in contents else _key(contents, data, evaluation, task, tokenizer, transfer, asks)


def wish_key(
    data: DataSpec, evaluation: EvaluationSpec, task: TaskSpec, tokenizer: PreTrainedTokenizerBase,
    transfer: SetSpec | None = None, asks: bool = False,
) -> str:
    """Return a hash of what is asked of a run's data, whatever that is: the specs and the tokenizer, no content."""
    return _key(None, data, evaluation, task, tokenizer, transfer, asks)


def content_key(packed: Mapping[str, bytes]) -> str:
    """Return a hash of sets that were packed: by what they are known whose source has no content to go by."""
    digests = [[name, hashlib.sha256(packed[name]).hexdigest()] for name in sorted(packed)]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:20]


def _key(
    contents: list[Any] | None, data: DataSpec, evaluation: EvaluationSpec, task: TaskSpec,
    tokenizer: PreTrainedTokenizerBase, transfer: SetSpec | None, asks: bool,
) -> str:
    named = {**evaluation.in_distribution, **evaluation.out_of_distribution}
    sections: list[Any] = [data, task, transfer, *named.values()]
    facts = [
        _FORMAT, contents, [section and section.model_dump(mode="json") for section in sections],
        list(evaluation.in_distribution), list(evaluation.out_of_distribution), _of_tokenizer(tokenizer),
        *(["asks"] if asks and transfer is not None else []),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def pack_sets(sets: DataSets) -> dict[str, bytes]:
    """Return a run's sets as files."""
    roles = _roles(sets)
    index = {"label_names": sets.label_names, "sets": [[role, loaded.name] for role, loaded in roles]}
    files = {f"{number:03d}.arrow": _pack(loaded) for number, (_, loaded) in enumerate(roles)}
    return {"index.json": json.dumps(index).encode(), **files}


def unpack_sets(files: Mapping[str, bytes]) -> DataSets:
    """Return the sets that were packed, equal to what they were."""
    index = json.loads(files["index.json"])
    found: dict[str, dict[str, LoadedSet]] = {"own": {}, "in_distribution": {}, "out_of_distribution": {}}
    for number, (role, name) in enumerate(index["sets"]):
        found[role][name] = _unpack(files[f"{number:03d}.arrow"])
    own = found.pop("own")
    return DataSets(
        train=own["train"], validation=own["validation"], test=own["test"], label_names=index["label_names"],
        in_distribution=found["in_distribution"], out_of_distribution=found["out_of_distribution"],
    )


def _roles(sets: DataSets) -> list[tuple[str, LoadedSet]]:
    return [
        *(("own", loaded) for loaded in (sets.train, sets.validation, sets.test)),
        *(("in_distribution", loaded) for loaded in sets.in_distribution.values()),
        *(("out_of_distribution", loaded) for loaded in sets.out_of_distribution.values()),
    ]


def _pack(loaded: LoadedSet) -> bytes:
    facts = {name: value for name, value in vars(loaded).items() if name not in ("examples", "text_keys", "content_of")}
    facts |= {"text_keys": sorted(loaded.text_keys), "content_of": dict(loaded.content_of)}
    has_types = any(example.token_types is not None for example in loaded.examples)
    columns: dict[str, Any] = {
        "id": pa.array([example.id for example in loaded.examples], pa.string()),
        "sequences": pa.array([example.sequences for example in loaded.examples], _ROWS),
        "label": _labels(loaded.examples),
        "spans": pa.array([example.spans for example in loaded.examples], pa.list_(pa.int32())),
    }
    if any(example.target_ranges for example in loaded.examples):
        columns["target_ranges"] = pa.array([example.target_ranges for example in loaded.examples], _ROWS)
    if has_types:
        columns["token_types"] = pa.array([example.token_types for example in loaded.examples], _ROWS)
    table = pa.table(columns).replace_schema_metadata({"set": json.dumps(facts)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _labels(examples: Sequence[Example]) -> pa.Array:
    labels = [example.label for example in examples]
    is_value = any(isinstance(label, float) for label in labels)
    return pa.array(labels, pa.float64() if is_value else pa.int64(), from_pandas=False)


def _unpack(content: bytes) -> LoadedSet:
    table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
    facts = json.loads(table.schema.metadata[b"set"])
    examples = [
        Example(
            row["id"], _tuples(row["sequences"]), row["label"], tuple(row["spans"]),
            tuple((first, last) for first, last in row.get("target_ranges") or ()),
            _tuples(row["token_types"]) if row.get("token_types") is not None else None,
        )
        for row in table.to_pylist()
    ]
    return LoadedSet(**{**facts, "examples": examples, "text_keys": frozenset(facts["text_keys"])})


def _tuples(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, rows))


def _content(source: SetSpec, base_dir: Path) -> Any:
    """Return what tells a set's content apart from another's, or None."""
    if source.files is not None:
        paths = [base_dir / source.places.get(name, name) for name in source.file_names]
        return [_sha256(path) for path in paths] if all(path.is_file() for path in paths) else None
    name = str(source.source)
    if name.startswith(PREFIX):
        return [_sha256(dataset_file(name))]
    return [name, source.revision] if re.fullmatch(r"[0-9a-f]{40}", source.revision or "") else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    digest = _digest_of(text)
    return [
        type(tokenizer).__name__, digest, tokenizer.padding_side, tokenizer.model_max_length,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        getattr(tokenizer, "chat_template", None),
    ]


_digests: dict[bytes, str] = {}
"""By a tokenizer's text; to sort a vocabulary takes a second for a large one, and a run asks several times."""


def _digest_of(text: str) -> str:
    """Return a hash of a tokenizer's JSON that does not depend on how it was used last."""
    seen = hashlib.sha256(text.encode()).digest()
    if seen not in _digests:
        content = json.loads(text)
        if isinstance(content, dict):
            for key in ("truncation", "padding"):  # what the latest call asked for, not what the tokenizer is
                content.pop(key, None)
        _digests[seen] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return _digests[seen]
