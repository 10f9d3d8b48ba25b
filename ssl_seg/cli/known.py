"""Typing errors in keys, answered in a second: torch and timm, which the config classes import, take many.

`known.json` lists the keys of each stage that stand where only a mapping's own keys can; what a plug-in may say is left
to the classes, as are all values. It is made from them, `python -m tests.cli.test_known`, and their words are these.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cache
from importlib import resources
from typing import Any

from ssl_seg.config import UserError, unknown

FILE = "known.json"


def check_keys(stage: str, values: Mapping[str, Any]) -> None:
    """Raise UserError for the first key that no config of a stage has; nothing where a stage is not listed."""
    known = _known().get(stage)
    if known is not None:
        _check(values, "", known)


def _check(values: Mapping[str, Any], section: str, known: Collection[str]) -> None:
    """First the keys of the section, `train.` or '' at the top, then those of its own sections."""
    own = [place.removeprefix(section) for place in known if place.startswith(section)]
    keys = [key for key in own if "." not in key]
    for key in values:
        if key not in keys:
            below = [place for place in own if place.count(".") == 1 and place.endswith(f".{key}")]
            raise UserError(f"{section.rstrip('.') or 'config'}: {unknown('key', key, keys, below)}")
    for key, value in values.items():
        inner = f"{section}{key}."
        if isinstance(value, Mapping) and any(place.startswith(inner) for place in known):
            _check(value, inner, known)


@cache
def _known() -> dict[str, list[str]]:
    return json.loads(resources.files("ssl_seg.cli").joinpath(FILE).read_text(encoding="utf-8"))
