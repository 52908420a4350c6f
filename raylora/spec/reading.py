"""Specs in and out: YAML with line numbers, overrides, every error at once, and a JSON schema."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from raylora.errors import SpecError, combine, suggest
from raylora.spec.base import Frozen, KindSpec
from raylora.spec.paths import beside
from raylora.spec.run import RunSpec
from raylora.spec.students import DistillSpec

S = TypeVar("S", bound=Frozen)
KeyPath = tuple[str | int, ...]
_DEFAULT_KINDS = {"adapter": "lora", "task": "classification", "quantization": "none", "loss": "kl",
                  "tracker": "tensorboard"}
_SEAM_OF = {"tracking": "tracker"}
"""Of keys that are not called as their seam is."""
_SECRET_KEY = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)
_OTHER_SHAPE = {"list_type", "dict_type", "model_type", "model_attributes_type",
                "string_type", "int_type", "float_type", "bool_type", "literal_error"}
"""What pydantic says of a value where its type expects one of another shape."""


def read_spec(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a YAML spec, apply ``a.b=c`` overrides and validate it.

    Its relative paths start at the current folder, or else beside the file.

    Raises:
        SpecError: with every problem found, each as ``file:line: key.path: what is wrong``.
    """
    return beside(parse_spec(_text_of(Path(path)), overrides, where=str(path)), Path(path).parent)


def read_given(path: str | Path | None, text: str | None, overrides: Sequence[str] = ()) -> RunSpec:
    """Return the spec that a command was given as a file or as text.

    Raises:
        SpecError: neither or both were given; else as :func:`read_spec`.
    """
    if (path is None) == (text is None):
        raise SpecError("give a spec file, or its YAML as text" if path is None else "a spec is given twice",
                        "raylora run SPEC, or --spec-yaml TEXT")
    return read_spec(path, overrides) if path is not None else parse_spec(str(text), overrides, "--spec-yaml")


def parse_spec(text: str, overrides: Sequence[str] = (), where: str = "<spec>") -> RunSpec:
    """Validate a YAML text; see :func:`read_spec`."""
    content, lines = _parse(text, overrides, where)
    return build_spec(content, where, lines)


def read_distill(path: str | Path, overrides: Sequence[str] = ()) -> DistillSpec:
    """Read a YAML file whose ``distill`` section says whom a finished run teaches; other sections are refused.

    Raises:
        SpecError: as :func:`read_spec`.
    """
    content, lines = _parse(_text_of(Path(path)), overrides, str(path))
    return _validated(_DistillFile, content, str(path), lines, "distill file").distill


class _DistillFile(Frozen):
    distill: DistillSpec


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: there is no such file", "write one with `raylora init`") from None
    except IsADirectoryError:
        raise SpecError(f"{path}: is a folder, not a spec file") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 at byte {error.start}", "save the file as UTF-8") from None


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""That of libyaml, where it is there: a run's whole spec takes a tenth of the time."""


def _parse(text: str, overrides: Sequence[str], where: str) -> tuple[dict, dict[KeyPath, int]]:
    try:
        loader = _SafeLoader(text)
        node = loader.get_single_node()
        content = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        raise SpecError(f"{where}: not valid YAML: {error}") from None
    for key, line in _repeated(node) if node is not None else ():
        raise SpecError(f"{where}:{line}: {'.'.join(map(str, key))}: is given twice", "keep one of them")
    if content is None:
        raise SpecError(f"{where}: the file is empty", "write a spec with `raylora init`")
    if not isinstance(content, dict):
        raise SpecError(f"{where}: expected keys and values, found a {type(content).__name__}")
    for override in overrides:
        _apply(content, override)
    return content, dict(_lines(node)) if node is not None else {}


def build_spec(content: dict, where: str = "<spec>", lines: dict[KeyPath, int] | None = None) -> RunSpec:
    """Validate a mapping; every problem is reported at once, with a suggestion where one is near."""
    return _validated(RunSpec, content, where, lines or {}, "run spec")


def _validated(model: type[S], content: dict, where: str, lines: dict[KeyPath, int], what: str) -> S:
    problems = [
        f"{_place(where, key, lines)}: looks like a secret; keep it out of specs, set it in the worker's environment"
        for key in _secret_keys(content)
    ]
    try:
        spec = model.model_validate(content)
    except ValidationError as error:
        found: dict[str, list[str]] = {}  # by place: each type that a key may have complains on its own
        for key, item in _of_their_shape([(_strip_tags(one["loc"], content), one) for one in error.errors()]):
            key, says = _deeper(key, _say(item, key, content, model), content)
            found.setdefault(_place(where, key, lines), []).append(says)
        problems += [f"{place}: {'; or: '.join(dict.fromkeys(says))}" for place, says in found.items()]
    if problems:
        raise SpecError(combine(sorted(set(problems)), f"{where} is not a valid {what}"))
    return spec


def dump_spec(spec: RunSpec) -> str:
    """Return the spec as YAML that reads back to an equal spec."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a run spec, with every registered kind."""
    schema = RunSpec.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def diff_specs(old: RunSpec, new: RunSpec) -> list[str]:
    """Return ``key: old -> new`` for every leaf of the specs' identities that differs."""
    before, after = dict(_leaves(old.identity())), dict(_leaves(new.identity()))
    return [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def _apply(content: dict, override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise SpecError(f"override {override!r} is not of the form a.b=c")
    *parents, last = key.split(".")
    node = content
    for parent in parents:
        if isinstance(node.get(parent), str):  # `quantization: nf4` grows into a mapping
            node[parent] = {"kind": node[parent]}
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise SpecError(f"override {override!r}: {parent!r} is a value, not a section")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SpecError(f"override {override!r}: not valid YAML: {error}") from None


def _lines(node: yaml.Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _lines(value, (*path, key.value))
            yield (*path, key.value), key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, (*path, index))


def _repeated(node: yaml.Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    """Yield the keys that a mapping has twice: YAML silently keeps the last."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield (*path, key.value), key.start_mark.line + 1
            seen.add(str(key.value))
            yield from _repeated(value, (*path, key.value))


def _place(where: str, key: KeyPath, lines: dict[KeyPath, int]) -> str:
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    location = f"{where}:{line}" if line else where
    return f"{location}: {'.'.join(map(str, key))}" if key else location


def _strip_tags(location: Sequence[str | int], content: Any) -> KeyPath:
    """Drop what pydantic adds to a location (names of union branches) and keep the keys a person wrote."""
    key: list[str | int] = []
    for index, part in enumerate(location):
        follows = isinstance(content, dict) and part in content
        if follows or index == len(location) - 1 and re.fullmatch(r"[a-z_0-9]+", str(part)):
            key.append(part)
            content = content[part] if follows else None
        elif isinstance(content, list) and isinstance(part, int) and part < len(content):
            key.append(part)
            content = content[part]
    if len(key) > 1 and key[-1] in {"int", "str", "float", "bool"}:
        key.pop()
    return tuple(key)


def _of_their_shape(items: list[tuple[KeyPath, Any]]) -> list[tuple[KeyPath, Any]]:
    """Leave out what the other types of a key say that a list or a mapping stands there, where one type reads it."""
    return [
        (key, item) for key, item in items
        if not (item["type"] in _OTHER_SHAPE and isinstance(item["input"], dict | list) and any(
            other["type"] not in _OTHER_SHAPE and at[: len(key)] == key for at, other in items
        ))
    ]


def _deeper(key: KeyPath, says: str, content: Any) -> tuple[KeyPath, str]:
    """Return the place of a message that begins with keys below its own, and what it says of them."""
    named, colon, rest = says.partition(": ")
    below = tuple(named.split("."))
    for part in (*key, *below):
        is_there = isinstance(content, dict) and part in content or isinstance(content, list) and isinstance(part, int)
        content = content[part] if is_there else None
    return ((*key, *below), rest) if colon and content is not None else (key, says)


def _say(item: Any, key: KeyPath, content: dict, model: type[Frozen]) -> str:
    kind = item["type"]
    if kind == "extra_forbidden":
        return f"unknown key; {suggest(str(key[-1]), _known_keys(key[:-1], content, model))}"
    if kind == "missing":
        return "this key is required"
    if kind in {"model_type", "model_attributes_type"}:
        return f"expected keys of its own (got {item['input']!r}); known: {', '.join(_known_keys(key, content, model))}"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = item.get("input")
    return message if isinstance(given, dict | BaseModel) or kind == "value_error" else f"{message} (got {given!r})"


def _known_keys(path: KeyPath, content: dict, root: type[Frozen]) -> list[str]:
    """Return the field names of the model that stands at a key path."""
    from raylora import registry

    model: Any = root
    node: Any = content
    key = ""
    more: Mapping[str, str] = {}
    for part in path:
        if isinstance(part, int):
            node = node[part]
        else:
            key, node = part, node.get(part, {}) if isinstance(node, dict) else {}
        field = getattr(model, "model_fields", {}).get(part)
        model = _model_of(field.annotation) if field else model
        if isinstance(model, type) and issubclass(model, KindSpec) and not isinstance(node, list):
            seam = _SEAM_OF.get(key, key)
            default = _DEFAULT_KINDS.get(seam, "")
            if default:
                kind = (node or {}).get("kind", default)
                alias = registry.alias_of(seam, kind)
                more = alias.names if alias is not None else {}
                model = registry.load(seam, alias.kind if alias is not None else kind).Spec
    return sorted([*getattr(model, "model_fields", {}), *more])


def _model_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _model_of(part)
        if found is not None:
            return found
    return None


def _secret_keys(content: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    if isinstance(content, dict):
        for key, value in content.items():
            counts = isinstance(value, bool) or isinstance(value, int) and str(key).endswith("tokens")
            if isinstance(key, str) and _SECRET_KEY.search(key) and not counts:  # a switch, or a number of tokens
                yield (*path, key)
            yield from _secret_keys(value, (*path, key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from _secret_keys(value, (*path, index))


def _leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content
