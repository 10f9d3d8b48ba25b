"""Stored values to pixels of 8 bits: which of them are black and white, for all channels or for each."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

Pair = tuple[float, float]  # black and white
Range = Pair | tuple[Pair, ...]  # of all channels, or of each in turn


def _as_range(value: Any) -> Range:
    """What a config says; one pair that stands in a list of its own is that of all channels."""
    given = value[0] if _is_list(value) and len(value) == 1 else value
    pairs = given if _is_list(given) and all(map(_is_list, given)) else [given]
    for pair in pairs:
        if not _is_list(pair) or len(pair) != 2 or not all(map(_is_number, pair)):
            raise ValueError("write [black, white], two finite numbers, or such a pair for each channel")
        if pair[0] >= pair[1]:
            raise ValueError(f"black ({pair[0]:g}) has to be less than white ({pair[1]:g})")
    found = tuple((float(black), float(white)) for black, white in pairs)
    return found[0] if len(found) == 1 else found


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


# As a key of a config: [black, white], or a list of these with one for each channel.
RangeField = Annotated[Range, BeforeValidator(_as_range)]


def pairs_of(value_range: Range) -> tuple[Pair, ...]:
    """Black and white of each channel; a single pair is that of all.

    >>> pairs_of((0.0, 4095.0)), len(pairs_of(((0.0, 1.0), (0.0, 2.0))))
    (((0.0, 4095.0),), 2)
    """
    first = value_range[0]
    return tuple(value_range) if isinstance(first, tuple) else (value_range,)  # pyright: ignore[reportReturnType]


def written_range(value_range: Range) -> str:
    """As a config has it.

    >>> written_range((0.0, 4095.0)), written_range(((0.0, 1.0), (0.5, 2.0)))
    ('[0,4095]', '[[0,1],[0.5,2]]')
    """
    pairs = [f"[{black:.10g},{white:.10g}]" for black, white in pairs_of(value_range)]
    return pairs[0] if len(pairs) == 1 else f"[{','.join(pairs)}]"


def say_range(value_range: Range) -> str:
    """Which values are black and white, in words.

    >>> say_range((0.0, 4095.0)), say_range(((0.0, 1.0), (0.0, 2.0)))
    ('0 is black and 4095 white', '0, 0 are black and 1, 2 white in the channels')
    """
    pairs = pairs_of(value_range)
    if len(pairs) == 1:
        return "{:g} is black and {:g} white".format(*pairs[0])
    blacks, whites = (", ".join(f"{value:g}" for value in column) for column in zip(*pairs, strict=True))
    return f"{blacks} are black and {whites} white in the channels"


def scaled(values: np.ndarray, value_range: Range, inverted: bool = False) -> np.ndarray:
    """Stored values `(H, W)` or `(H, W, 3)` as RGB `(H, W, 3)` uint8, given those that are black and white.

    Values beyond them are cut off, and what is no number is black; `inverted` says that the first of them is white.
    """
    return three_channels(in_bytes(values, value_range, inverted))


def in_bytes(values: np.ndarray, value_range: Range, inverted: bool = False) -> np.ndarray:
    """As `scaled`, of any number of channels `(H, W, C)`, which stay as many; a range for each needs as many."""
    first, *others = pairs_of(value_range)
    if others:
        each = zip(np.moveaxis(values, -1, 0), [first, *others], strict=True)
        return np.stack([in_bytes(channel, pair, inverted) for channel, pair in each], axis=-1)
    if values.dtype in (np.uint8, np.uint16):
        return _table(np.iinfo(values.dtype).max + 1, first, inverted)[values]
    return _to_bytes(values, first, inverted)


def _to_bytes(values: np.ndarray, value_range: Pair, inverted: bool) -> np.ndarray:
    shown = np.interp(values, value_range, (255, 0) if inverted else (0, 255))
    return np.rint(np.nan_to_num(shown)).astype(np.uint8)


@lru_cache(maxsize=8)
def _table(count: int, value_range: Pair, inverted: bool) -> np.ndarray:
    """The same of every value there can be: to look it up takes a tenth of the time."""
    return _to_bytes(np.arange(count), value_range, inverted)


def three_channels(array: np.ndarray) -> np.ndarray:
    """Grey `(H, W)` as `(H, W, 3)`; colours as they are."""
    return array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=-1)


def composite(image: np.ndarray) -> np.ndarray:
    """An image `(H, W, C)` of any number of channels as one that a person can look at, RGB `(H, W, 3)`.

    The first three channels are red, green and blue; one is grey, and of two blue is missing.
    """
    channels = image.shape[-1]
    if channels == 3:
        return image
    if channels == 1:
        return np.repeat(image, 3, axis=-1)
    shown = np.zeros((*image.shape[:2], 3), dtype=image.dtype)
    shown[..., : min(channels, 3)] = image[..., :3]
    return shown
