"""Pictures drawn from a seed, with exact masks: nothing to download, and every pixel is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

import cv2
import numpy as np
from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ssl_seg import rng
from ssl_seg.config import known_to_0_1, load
from ssl_seg.datasets import Dataset, Example
from ssl_seg.images import check_size
from ssl_seg.worlds import Scene, World
from ssl_seg.worlds.squares import Squares

# A run reads an image several times (leaks, training, scores, panels), and a street of this size takes 30 ms to draw:
# these are kept, 80 MB in each process at most. Larger ones would take more memory than they are worth.
SMALL = 40_000  # pixels
KEPT = 512  # images

Side = Annotated[int, Field(ge=2)]  # pixels; the smallest picture that has room for a box


class Synthetic(Dataset):
    """`count` pictures of a world, each a function of `seed` and its number alone.

    `kind` names the world (a file in `ssl_seg/worlds/`), or holds its options too: `kind: {type: street, ...}`.
    """

    kind: SerializeAsAny[World] = Squares()  # the world, or a mapping of its type and options
    count: int = Field(default=500, ge=1, le=1_000_000)  # every start of a run lists their names
    size: Annotated[tuple[Side, Side], AfterValidator(check_size)] = (512, 512)  # (H, W)
    seed: int = 0  # the same seed gives the same pixels
    clip: PositiveInt = 1  # frames of one scene that follow each other, where the world moves
    # 1 gives the lightness of what is drawn, for a network that takes grey. A run takes model.channels for it.
    channels: Literal[1, 3] = 3

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return known_to_0_1(self, dump(self), since=("channels",))

    @model_validator(mode="after")
    def _check_clip(self) -> Self:
        if self.clip > 1 and not self.kind.moves:
            raise ValueError(f"clip: {self.kind.type} does not move; leave clip out")
        return self

    @property
    def num_channels(self) -> int:
        return self.channels

    def in_channels(self, count: int) -> Self:
        if "channels" in self.model_fields_set or count not in (1, 3):
            return super().in_channels(count)
        return load(type(self), {**self.dump(), "channels": count})

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.kind.class_names

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """The picture with all that is known of it."""
        number, frame = divmod(range(self.count)[index], self.clip)
        key = rng.fold_in(rng.fold_in(rng.as_key(self.seed), self.kind.type), number)
        return self.kind.draw(key, self.size, frame)

    def read(self, index: int) -> Example:
        image, label = self._drawn(index)
        if self.channels == 1:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
        return Example(image, label, self.name(index))

    def _drawn(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if self.size[0] * self.size[1] > SMALL:
            scene = self.scene(index)
            return scene.image, scene.label
        image, label = _kept(_Drawing(self.model_dump_json(), index, self))
        # Copies, since a reader may write into what it is given.
        return image.copy(), label.copy()

    def name(self, index: int) -> str:
        return f"{self.kind.type}_{range(self.count)[index]:06d}"

    def sequence(self, index: int) -> str:
        """The scene, where several frames show one."""
        return f"{self.kind.type}_{range(self.count)[index] // self.clip:06d}" if self.clip > 1 else ""


@dataclass(frozen=True)
class _Drawing:
    """Which picture: known by the data set's words, for a world of somebody's own may have fields without a hash."""

    words: str
    index: int
    dataset: Synthetic = field(compare=False)


@lru_cache(maxsize=KEPT)
def _kept(drawing: _Drawing) -> tuple[np.ndarray, np.ndarray]:
    scene = drawing.dataset.scene(drawing.index)
    return scene.image, scene.label
