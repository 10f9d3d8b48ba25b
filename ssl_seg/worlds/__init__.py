"""The contract of a world: scenes drawn from a key, every pixel known. One world a file beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from ssl_seg.config import Plugin


@dataclass(frozen=True)
class Scene:
    """A drawn picture, RGB `(H, W, 3)` uint8, and what is known of it; all maps are `(H, W)`, None where not drawn."""

    image: np.ndarray
    label: np.ndarray  # class ids, uint8
    depth: np.ndarray | None = None  # uint16, larger is farther
    instances: np.ndarray | None = None  # uint16, 0 where no object stands


def edges(scene: Scene) -> np.ndarray:
    """Boundaries between classes and between objects, `(H, W)` bool: where the pixel to the right or below differs."""
    found = np.zeros(scene.label.shape, dtype=bool)
    for ids in (scene.label, scene.instances):
        if ids is not None:
            found[:, :-1] |= ids[:, :-1] != ids[:, 1:]
            found[:-1] |= ids[:-1] != ids[1:]
    return found


class World(Plugin, ABC):
    """Draws scenes. Pure, with integers only: a key gives the same pixels in every process and on every machine."""

    package: ClassVar[str] = "ssl_seg.worlds"
    group: ClassVar[str] = "ssl_seg.worlds"
    moves: ClassVar[bool] = False  # whether the frames of a scene differ

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """One name a class id."""

    @abstractmethod
    def draw(self, key: Tensor, size: tuple[int, int], frame: int = 0) -> Scene:
        """The scene of a scalar int64 key at `size` (H, W); a world that moves shows it as the camera's `frame`."""


def check_spans(**spans: tuple[int, int]) -> None:
    """Raise ValueError for a field of [least, most] whose ends are the wrong way round."""
    for name, (least, most) in spans.items():
        if least > most:
            raise ValueError(f"{name} is [least, most], not [{least}, {most}]; turn the two around")
