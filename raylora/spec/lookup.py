"""From what a person asks about, such as ``optimization.lr``, ``adapter.peft`` or ``dora``, to what is known of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raylora import registry
from raylora.errors import SpecError, nearest
from raylora.spec.keys import NAME, Key, key_of, keys_of, section_path
from raylora.spec.kinds import SEAMS, WHERE, Kind, kind_of, papers_in, written_out
from raylora.spec.run import RunSpec


@dataclass(frozen=True)
class Topic:
    """What was found: a key, with those below it or the kinds it chooses from, a kind, or an alias of one."""

    key: Key | None = None
    below: Sequence[Key] = ()
    kinds: Sequence[str] = ()
    aliases: Sequence[str] = ()
    kind: Kind | None = None
    alias: str = ""
    of_kind: str = ""
    """The kind that the key belongs to, where it is a kind's."""

    def record(self) -> dict[str, Any]:
        """Return the topic as plain data."""
        found: dict[str, Any] = {}
        if self.alias and self.kind is not None:
            alias = registry.ALIASES[self.kind.seam][self.alias]
            found |= {"alias": self.alias, "method": alias.says, "stands_for": written_out(alias),
                      "short_keys": dict(alias.names)}
        if self.key is not None:
            found |= self.key.record()
        if self.of_kind:
            found["of_kind"] = self.of_kind
        if self.kinds:
            found |= {"kinds": list(self.kinds), "aliases": list(self.aliases)}
        if self.below:
            found["keys"] = [key.record() for key in self.below]
        if self.kind is not None:
            found |= self.kind.record()
        return found


def sections() -> list[Key]:
    """Return the top keys of a run spec."""
    return [key_of(RunSpec, name) for name in RunSpec.model_fields]


def look_up(name: str) -> list[Topic]:
    """Return what a name may mean; several things where it is no whole path.

    Raises:
        SpecError: nothing has the name; the message says what is nearest.
    """
    parts = name.split(".")
    found = _from_the_top(parts) or _from_a_seam(parts) or _bare_kinds(parts) or _endings(parts)
    if not found:
        near = nearest(name, _known(parts))
        heads = ", ".join(dict.fromkeys([*RunSpec.model_fields, *SEAMS]))
        hint = f"did you mean {near!r}?" if near else f"known sections: {heads}"
        raise SpecError(f"there is no key or kind {name!r}", hint)
    return found


def _from_the_top(parts: Sequence[str]) -> list[Topic]:
    """Follow a path from the run spec down, into a kind where it names one."""
    model: Any = RunSpec
    prefix = ""
    rest = list(parts)
    while rest:
        if rest[0] not in model.model_fields:
            return []
        key = key_of(model, rest.pop(0), prefix)
        if key.seam:
            return _in_seam(key, key.seam, rest) if rest else [_topic(key)]
        if key.section is None or not rest:
            return [] if rest else [_topic(key)]
        if section_path(key).endswith(f".{NAME}"):  # in_distribution.tweets.rows: any name will do
            key = Key(**{**vars(key), "path": f"{key.path}.{rest.pop(0)}"})
        if not rest:
            return [_topic(key)]
        model, prefix = key.section, key.path + "."
    return []


def _from_a_seam(parts: Sequence[str]) -> list[Topic]:
    """Follow a path that starts with a seam's name, such as ``quantization.optq``."""
    if parts[0] not in SEAMS:
        return []
    key = next(topic.key for topic in _from_the_top(WHERE[parts[0]].split(".")) if topic.key is not None)
    return _in_seam(key, parts[0], parts[1:]) if parts[1:] else [_topic(key)]


def _in_seam(key: Key, seam: str, rest: Sequence[str]) -> list[Topic]:
    """Return a kind, an alias, a kind's key, or a key of every kind that has it."""
    if rest[0] in registry.REGISTRY[seam] or registry.alias_of(seam, rest[0]):
        one = _kind_topic(seam, rest[0])
        return _keys_named(seam, [one.kind], rest[1]) if rest[1:] and one.kind is not None else [one]
    if len(rest) > 1:
        return []
    return _keys_named(seam, _all_kinds(seam), rest[0])


def _keys_named(seam: str, kinds: Sequence[Kind], name: str) -> list[Topic]:
    found = [(kind, key) for kind in kinds for key in kind.keys if key.path == name]
    return [
        Topic(key=Key(**{**vars(key), "path": f"{WHERE[seam]}.{key.path}"}), of_kind=kind.name) for kind, key in found
    ]


def _bare_kinds(parts: Sequence[str]) -> list[Topic]:
    """Return the kinds and aliases of that name, in whatever seam."""
    if len(parts) > 1:
        return []
    return [
        _kind_topic(seam, parts[0]) for seam in SEAMS
        if parts[0] in registry.REGISTRY[seam] or registry.alias_of(seam, parts[0])
    ]


def _endings(parts: Sequence[str]) -> list[Topic]:
    """Return the keys of the run spec whose path ends so, or those of any kind."""
    ending = "." + ".".join(parts)
    found = [_topic(key) for key in keys_of(RunSpec) if key.path.endswith(ending)]
    if found or len(parts) > 1:
        return found
    return [topic for seam in SEAMS for topic in _keys_named(seam, _all_kinds(seam), parts[0])]


def _all_kinds(seam: str) -> list[Kind]:
    return [kind_of(seam, kind) for kind in registry.kinds(seam)]


def _topic(key: Key) -> Topic:
    if key.seam:
        return Topic(key, kinds=registry.kinds(key.seam), aliases=sorted(registry.ALIASES.get(key.seam, {})))
    below = tuple(keys_of(key.section, section_path(key) + ".")) if key.section is not None else ()
    return Topic(key, below)


def _kind_topic(seam: str, name: str) -> Topic:
    alias = registry.alias_of(seam, name)
    if alias is None:
        return Topic(kind=kind_of(seam, name))
    kind = kind_of(seam, alias.kind)
    methods = {method: options for method, options in kind.methods.items() if method == alias.keys.get("method")}
    return Topic(kind=replace(kind, methods=methods, papers=papers_in(alias.says)), alias=name)


def _known(parts: Sequence[str]) -> Iterator[str]:
    """Yield what could have been meant; keys of kinds only for a path that leads to them, whose modules are loaded."""
    yield from (key.path for key in keys_of(RunSpec))
    for seam in SEAMS:
        names = [*registry.kinds(seam), *registry.ALIASES.get(seam, {})]
        yield from (seam, *names, *(f"{seam}.{name}" for name in names), *(f"{WHERE[seam]}.{name}" for name in names))
        for start in dict.fromkeys((seam, WHERE[seam])):
            inner = parts[len(start.split(".")):] if ".".join(parts).startswith(start + ".") else []
            if len(inner) == 2 and inner[0] in names:
                topic = _kind_topic(seam, inner[0])
                yield from (f"{start}.{inner[0]}.{key.path}" for key in topic.kind.keys) if topic.kind else ()
            elif len(inner) == 1:
                yield from dict.fromkeys(f"{start}.{key.path}" for kind in _all_kinds(seam) for key in kind.keys)
