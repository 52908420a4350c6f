"""Every key of a spec in words: type, range, default, unit and sentence, read from the pydantic models themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from raylora.spec.base import Frozen, KindSpec, Seam

NAME = "NAME"
"""Stands in a key path for a name that a person chooses."""
SECTION_DEFAULT = "its own defaults"
"""What a section is that is not given and may be left out."""

_WORDS: dict[Any, str] = {
    str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null", Any: "anything",
}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_UNITS = {"_s": "seconds", "_bytes": "bytes"}


@dataclass(frozen=True)
class Key:
    """One key that a spec may hold."""

    path: str
    """Such as ``optimization.lr``."""
    accepts: str
    """Its type in words, with choices and range."""
    default: str | None
    """As YAML would have it; None where the key is required."""
    unit: str
    says: str
    seam: str = ""
    """The seam whose kinds the key chooses from, if it does."""
    section: type[Frozen] | None = None
    """The model of the keys below it, if it has any."""
    below: str = ""
    """The path of the keys below it, where they are those of another section."""

    def record(self) -> dict[str, Any]:
        """Return the key as plain data."""
        return {"key": self.path, "type": self.accepts, "required": self.default is None, "default": self.default,
                "unit": self.unit, "says": self.says}


def keys_of(model: type[Frozen], prefix: str = "", seen: dict[type, str] | None = None) -> Iterator[Key]:
    """Yield the keys of a model in their order, each followed by those of its section; a section occurs once."""
    seen = {} if seen is None else seen
    for name in model.model_fields:
        key = key_of(model, name, prefix)
        if key.section is None:
            yield key
            continue
        path = section_path(key)
        yield Key(**{**vars(key), "below": seen.get(key.section, path)})
        if key.section not in seen:
            seen[key.section] = path
            yield from keys_of(key.section, path + ".", seen)


def key_of(model: type[Frozen], name: str, prefix: str = "") -> Key:
    """Return one key of a model."""
    field = model.model_fields[name]
    written: Any = field.annotation
    for item in field.metadata:
        written = Annotated[written, item]
    seam = next((part.seam for part in _parts(written) if isinstance(part, Seam)), "")
    section = next((part for part in _parts(written) if _is_section(part)), None) if not seam else None
    unit = next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), "")
    return Key(prefix + name, type_words(written), _default(field), unit, sentence(model, name), seam, section)


def section_path(key: Key) -> str:
    """Return the path below which a key's own keys stand."""
    return f"{key.path}.{NAME}" if key.accepts.startswith("mapping") else key.path


def sentence(model: type[Frozen], name: str) -> str:
    """Return what the docstring below a field says; a field that is declared again without one keeps its base's."""
    for owner in model.__mro__:
        field = getattr(owner, "model_fields", {}).get(name)
        if field is not None and field.description:
            return " ".join(cleandoc(field.description).split())
    return ""


def about(thing: Any) -> str:
    """Return the docstring of a class or a module, or nothing if it has none of its own."""
    text = cleandoc(vars(thing).get("__doc__") or "")
    return text if not text.startswith("Usage docs: https://docs.pydantic.dev") else ""


def type_words(annotation: Any) -> str:
    """Return a type in words, with its choices and its range."""
    return _either(_alternatives(annotation, ()))


def _alternatives(annotation: Any, bounds: Sequence[Any]) -> list[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        items = [item.metadata if isinstance(item, FieldInfo) else [item] for item in arguments[1:]]
        metadata = [each for item in items for each in item]
        seam = next((item for item in metadata if isinstance(item, Seam)), None)
        if seam is not None:
            return [f"a kind of {seam.seam}"]
        return _alternatives(arguments[0], [*metadata, *bounds])
    if origin in (Union, UnionType):
        return [word for part in arguments for word in _alternatives(part, bounds)]
    if origin is Literal:
        return [_plain(value) for value in arguments]
    if origin is list or (origin is tuple and arguments[-1] is ...):
        words = type_words(arguments[0])
        return [f"list of {words}s" if arguments[0] in (str, int, float) else f"list of {words}"]
    if origin is tuple:
        each = list(dict.fromkeys(map(type_words, arguments)))
        return [f"list of {len(arguments)}: each a {each[0]}" if len(each) == 1 else f"list of {'; '.join(each)}"]
    if origin is dict:
        return [f"mapping of names to {type_words(arguments[1])}"]
    if _is_section(annotation):
        return ["section"]
    return [_WORDS[annotation] + _range(bounds)] if annotation in (int, float) else [_WORDS[annotation]]


def _either(words: Sequence[str]) -> str:
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _range(bounds: Sequence[Any]) -> str:
    found = {name: getattr(item, name) for item in bounds for name in _BOUNDS if getattr(item, name, None) is not None}
    if "ge" in found and found.get("ge") == found.get("le"):
        return f", only {_plain(found['ge'])}"
    said = [f"{word} {_plain(found[name])}" for name, word in _BOUNDS.items() if name in found]
    return f" of {' and '.join(said)}" if said else ""


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield a type, its metadata and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _is_section(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, Frozen) and not issubclass(part, KindSpec)


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    return SECTION_DEFAULT if isinstance(value, Frozen) else _plain(value)


def _plain(value: Any) -> str:
    """Return a value as YAML has it, on one line; a mapping of a kind alone is the kind's name."""
    if isinstance(value, Mapping) and set(value) == {"kind"}:
        return str(value["kind"])
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, str) and re.fullmatch(r"[\w-]+", value):
        return value
    if isinstance(value, str):
        return json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True).partition("\n")[0]
