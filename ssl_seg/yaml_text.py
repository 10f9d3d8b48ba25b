"""What a YAML text would cost, and where it does not mean what it says: looked at before anybody reads it.

A config may be a stranger's. Ours, because PyYAML and OmegaConf bound nothing: ten lines of aliases or of references
between keys stand for 10^10 items, and some thousand brackets overflow Python's stack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

MAX_CHARACTERS = 2**20  # a hundred times the longest config of ours
MAX_DEPTH = 50  # of mappings and lists in each other; ours have 6
MAX_ITEMS = 100_000  # with every alias and reference written out; a study of ours has 200
MAX_DIGITS = 100
PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is there
LONG_NUMBER = re.compile(rf"[-+]?(0[xb])?([0-9_:.]{{{MAX_DIGITS},}}|(?<=0x)[0-9a-fA-F_]{{{MAX_DIGITS},}})")
# YAML 1.1, which PyYAML reads, takes 0123 for 83 and 1:30 for 90; YAML 1.2 takes the one for 123, the other for text.
ODD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[1-9][0-9_]*(:[0-5]?[0-9])+)")
REFERENCE = re.compile(r"\$\{([\w.\[\]-]+)\}")
ESCAPED = re.compile(r"\\[\\$]")


def checked(text: str) -> str:
    """The text of a YAML file, its odd numbers in quotes: so a folder 0123 keeps its name, and a seed 0123 is 123.

    Raises ValueError for what would take too much to read, and YAMLError for what is no YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters, of {MAX_CHARACTERS} at most")
    opened: list[tuple[str | None, int]] = []  # the anchor of each collection we are in, and the items before it
    sizes: dict[str, int | None] = {}  # items behind each anchor; None while we are in it
    odd: list[tuple[int, int]] = []
    items = 0
    for event in yaml.parse(text, Loader=PARSER):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, items))
            if len(opened) > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} mappings and lists in each other")
            if event.anchor:
                sizes[event.anchor] = None
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = items - before
        elif isinstance(event, yaml.ScalarEvent):
            items += 1
            if event.anchor:
                sizes[event.anchor] = 1
            if event.implicit[0]:  # without quotes
                _refuse_long_number(event.value)
                if ODD_NUMBER.fullmatch(event.value):
                    odd.append((event.end_mark.index - len(event.value), event.end_mark.index))
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)  # PyYAML names an alias without an anchor
            if size is None:
                raise ValueError(f"*{event.anchor} stands within what it names, so it has no end")
            items += size
        if items > MAX_ITEMS:
            raise ValueError(f"more than {MAX_ITEMS} items, with every alias written out")
    for start, end in reversed(odd):
        text = f"{text[:start]}'{text[start:end]}'{text[end:]}"
    return text


def check_references(values: Mapping[str, Any]) -> None:
    """Raise ValueError where the `${key}` in `values` lead in a circle, or stand for too many items."""
    sizes: dict[str, int | None] = {}  # of what each key stands for; None while it is being looked at

    def size_of(value: Any, at: tuple[str, ...]) -> int:
        if isinstance(value, Mapping):
            return sum(size_of(inner, (*at, str(key))) for key, inner in value.items())
        if isinstance(value, list):
            return sum(size_of(inner, (*at, str(index))) for index, inner in enumerate(value))
        if not isinstance(value, str) or "${" not in value:
            return 1
        text = ESCAPED.sub("", value)
        keys = REFERENCE.findall(text)
        if len(keys) < text.count("${"):
            raise ValueError(f"{_short(value)}: write ${{a.key}}, with a key of the config")
        size = 1 + len(value) // MAX_DIGITS + sum(referred(_absolute(key, at)) for key in keys)
        if size > MAX_ITEMS:
            raise ValueError(f"{_short(value)}: stands for more than {MAX_ITEMS} items")
        return size

    def referred(key: tuple[str, ...]) -> int:
        name = ".".join(key)
        if name not in sizes:
            sizes[name] = None
            sizes[name] = size_of(_select(values, key), key)
        size = sizes[name]
        if size is None or len(sizes) > MAX_ITEMS:
            raise ValueError(f"${{{_short(name)}}}: leads back to itself")
        return size

    if size_of(values, ()) > MAX_ITEMS:
        raise ValueError(f"more than {MAX_ITEMS} items, with every reference written out")


def _absolute(key: str, at: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of a key as a reference at `at` names it: a dot in front is the mapping it stands in."""
    plain = key.lstrip(".")
    parts = tuple(part for part in re.split(r"[.\[\]]", plain) if part)
    return (*at[: max(0, len(at) - len(key) + len(plain))], *parts) if plain != key else parts


def _select(values: Any, key: tuple[str, ...]) -> Any:
    """What lies at a key, through references on the way; None where there is nothing, which OmegaConf tells."""
    found, left = values, list(key)
    for _ in range(MAX_ITEMS):
        passed = REFERENCE.fullmatch(found) if isinstance(found, str) else None
        if not left:
            return found
        if passed:
            at = key[: len(key) - len(left)]
            found, left = values, [*_absolute(passed[1], at), *left]
            key = tuple(left)
        elif isinstance(found, list) and left[0].isdecimal() and int(left[0]) < len(found):
            found = found[int(left.pop(0))]
        elif isinstance(found, Mapping):
            found = found.get(left.pop(0))
        else:
            return None
        if len(left) > MAX_DEPTH:
            break
    raise ValueError(f"${{{_short('.'.join(key))}}}: leads back to itself")


def _refuse_long_number(text: str) -> None:
    if len(text) > MAX_DIGITS and LONG_NUMBER.fullmatch(text):
        raise ValueError(f"a number of {len(text)} digits ({text[:10]}...); no key takes more than 20")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
