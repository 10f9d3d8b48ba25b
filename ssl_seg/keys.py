"""Every key that a config may have: its type, its default, and what it means, in the words beside it in the source.

A meaning has one home, the comment above a field or behind it. It is read from the source, as a person would, so what a
plug-in says of its own options is listed too.
"""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
import types
from abc import ABC
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from types import ModuleType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ssl_seg.config import Config, PathText, Plugin, UserError

IS_PATH = get_args(PathText)[1]
REQUIRED = "required"
BELOW = "..."  # the default of a mapping, whose keys have theirs
KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null", Any: "anything"}
BOUNDS = {
    annotated_types.Gt: ("gt", "above"),
    annotated_types.Ge: ("ge", "from"),
    annotated_types.Lt: ("lt", "below"),
    annotated_types.Le: ("le", "up to"),
}


@dataclass(frozen=True)
class Key:
    """A key of a config."""

    name: str  # as it is written
    place: str  # the same with the types that lead there: data.labelled.folder.masks
    type: str
    default: str  # as YAML; REQUIRED where there is none
    meaning: str


def keys_of(config: type[Config], pattern: str = "") -> list[Key]:
    """The keys of a config class whose names a pattern names: a key, what lies below it, a part of a word, or a glob.

    The options of a plug-in are listed where the pattern names its type: `tasks.denoise`, `data.labelled.folder`.
    Raises UserError, with the nearest, where there is none.
    """
    found = list(_walk(config, "", "", pattern.split("."), None))
    if not pattern:
        return found
    tests = (
        lambda key: key.place == pattern or key.place.startswith(f"{pattern}."),
        lambda key: fnmatchcase(key.name, pattern),
        lambda key: pattern in key.name,
        lambda key: pattern.lower() in key.meaning.lower(),
    )
    for test in tests:
        fitting = [key for key in found if test(key)]
        if fitting:
            return fitting
    places = [key.place for key in found]
    words = {place.rpartition(".")[2]: place for place in places}
    near = get_close_matches(pattern, places, n=1) or [words[word] for word in get_close_matches(pattern, words, n=1)]
    hint = f"did you mean {near[0]}?" if near else "a part of a word will do, and none lists all"
    raise UserError(f"{pattern}: no key is called so; {hint}")


def _walk(config: type[Config], written: str, place: str, wanted: Sequence[str], value: Config | None) -> Iterator[Key]:
    """The keys of a class, and of the classes in its fields; `value` is what stands there by default."""
    value = value if value is not None else _by_default(config)
    for name, field in config.model_fields.items():
        own = getattr(value, name) if value is not None else field.get_default(call_default_factory=True)
        key, inner = f"{written}{name}", f"{place}{name}"
        is_required = value is None and field.is_required()
        meaning = meaning_of(config, name) or next(map(_in_a_line, _classes(field.annotation)), "")
        default = REQUIRED if is_required else _in_yaml(own)
        yield Key(key, inner, _type(field.annotation, field.metadata), default, meaning)
        parts = inner.split(".")
        named = next(iter(wanted[len(parts) :]), "") if parts == list(wanted[: len(parts)]) else ""
        through = f"{key}." if get_origin(field.annotation) is not dict else ""
        for below in _classes(field.annotation):
            choices = _choices(below)
            chosen = choices.get(named)
            if choices and chosen is not None:
                prefix = through or f"{key}.{named}."
                yield from _walk(chosen, prefix, f"{inner}.{named}.", wanted, None)
            elif choices and isinstance(own, Config):
                yield from _walk(type(own), through, f"{inner}.", wanted, own)
            elif not choices and through:
                yield from _walk(below, through, f"{inner}.", wanted, own if isinstance(own, below) else None)


def places_of(config: type[Config], written: str = "") -> Iterator[str]:
    """The dotted keys that stand where only a mapping's own can: `train.lr`, and not what is a plug-in's to say."""
    for name, field in config.model_fields.items():
        yield f"{written}{name}"
        inner = field.annotation
        if inspect.isclass(inner) and issubclass(inner, Config) and not (issubclass(inner, Plugin) or _choices(inner)):
            yield from places_of(inner, f"{written}{name}.")


def meaning_of(config: type[Config], name: str) -> str:
    """The comment of a field, in the class that declares it last with one; '' where there is none."""
    for cls in config.__mro__:
        meaning = _meanings(cls).get(name) if issubclass(cls, Config) and cls is not Config else None
        if meaning:
            return meaning
    return ""


@cache
def _meanings(config: type[Config]) -> dict[str, str]:
    """The comments beside the fields of a class: those above, then those behind.

    A field without any, right below one with a comment above, is of the same group and shares that.
    """
    module = inspect.getmodule(config)
    if module is None or "<locals>" in config.__qualname__:
        return {}
    tree, alone, behind = _read(module)
    body: list[ast.stmt] = tree.body
    for part in config.__qualname__.split("."):
        (own,) = [node for node in body if isinstance(node, ast.ClassDef) and node.name == part][-1:] or [None]
        if own is None:
            return {}
        body = own.body
    found, group, end = dict[str, str](), list[str](), 0
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            above = [alone[line] for line in range(first, node.lineno)]
            inside = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            after = [text for line in inside if (text := alone.get(line) or behind.get(line))]
            group = group if first == end + 1 and not above else above
            found[node.target.id] = " ".join([*above, *after] or group)
            end = inside.stop - 1
    return found


@cache
def _read(module: ModuleType) -> tuple[ast.Module, dict[int, str], dict[int, str]]:
    """The source of a module, and its comments by their lines: those that stand alone, and those behind code."""
    try:
        source = inspect.getsource(module)
    except OSError:  # of a module that has no file
        source = ""
    alone, behind = dict[int, str](), dict[int, str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            kind = alone if token.line.lstrip().startswith("#") else behind
            kind[token.start[0]] = token.string.lstrip("#").strip()
    return ast.parse(source), alone, behind


def _by_default(config: type[Config]) -> Config | None:
    """The config that nothing is said to; None where something has to be said."""
    if inspect.isabstract(config) or any(field.is_required() for field in config.model_fields.values()):
        return None
    try:
        return config()
    except (ValidationError, UserError):  # fields that are wrong alone
        return None


# ---- words ----


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What may be written, in words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inside[0], inside[1:])
    bounds = [f" {word} {getattr(own, slot):g}" for own in _flat(metadata) for slot, word in _bounds(own)]
    if origin is Literal:
        return " | ".join(map(str, inside))
    if origin in (Union, types.UnionType):
        kinds = [_type(own, metadata if own in (int, float) else ()) for own in inside if own is not type(None)]
        return " or ".join(dict.fromkeys([*kinds, *(["null"] if type(None) in inside else [])]))
    if origin is tuple:
        return f"list of {_type(inside[0])}" if inside[-1] is ... else f"[{', '.join(map(_type, inside))}]"
    if origin is list:
        return f"list of {_type(inside[0])}"
    if origin is dict:
        return f"mapping of names to {_type(inside[1])}"
    if any(own is IS_PATH for own in metadata):
        return "path"
    choices = _choices(annotation)
    if choices:
        return f"type: {' | '.join(sorted(choices))}"
    return KINDS.get(annotation, "mapping") + " and".join(bounds)


def _bounds(own: Any) -> Iterator[tuple[str, str]]:
    for kind, bound in BOUNDS.items():
        if isinstance(own, kind):
            yield bound


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for own in metadata:
        yield from own.metadata if isinstance(own, FieldInfo) else [own]


def _in_yaml(value: Any) -> str:
    """A default as it would be written; of a config its keys say it, of a plug-in its type."""
    if isinstance(value, Config):
        return value.type if isinstance(value, Plugin) else _word_of(type(value)) or BELOW
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _in_a_line(config: type[Config]) -> str:
    """What a class says of itself first."""
    return (inspect.getdoc(config) or "").partition("\n")[0]


# ---- classes ----


def _classes(annotation: Any) -> list[type[Config]]:
    """The config classes that a field may hold, its families of plug-ins as one."""
    if get_args(annotation):
        found = [own for part in get_args(annotation) for own in _classes(part)]
        return list(dict.fromkeys(found))
    return [annotation] if inspect.isclass(annotation) and issubclass(annotation, Config) else []


@cache
def _choices(family: Any) -> dict[str, type[Config]]:
    """The classes that a word chooses from, by that word; {} for what is no family."""
    if not (inspect.isclass(family) and issubclass(family, Config)):
        return {}
    if not (inspect.isabstract(family) or ABC in family.__bases__):
        return {}
    if issubclass(family, Plugin):
        return {name: family.choose(name) for name in family.names()}
    return {word: own for own in family.__subclasses__() if (word := _word_of(own))}


def _word_of(config: type[Config]) -> str:
    """What chooses a class of a family that has no files of its own; '' for what is of none."""
    word = getattr(config, "name", "")
    return word if isinstance(word, str) else ""
