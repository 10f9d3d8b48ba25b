"""A street as a driver sees it: eleven classes, in one-point perspective, as a picture or as a clip.

A scene is a plan (the kind of place, its widths, the light) and blocks of 40 m along the street, each drawn from a key
of its own, so that the street goes on for as long as the camera drives. A frame moves the camera and the traffic only.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ssl_seg import rng
from ssl_seg.worlds import Scene, World
from ssl_seg.worlds.drawing import Dice
from ssl_seg.worlds.street.hiding import seen
from ssl_seg.worlds.street.layout import Layout
from ssl_seg.worlds.street.materials import CLASSES
from ssl_seg.worlds.street.perspective import NEAR, Picture
from ssl_seg.worlds.street.plan import BLOCK, BLOCKS, camera, draw_plan
from ssl_seg.worlds.street.surface import Surface, expose
from ssl_seg.worlds.street.things import Scenery

PARTS = torch.stack([rng.as_key(part) for part in ("plan", "block", "traffic", "end", "noise")])


class Street(World):
    """A driver's view of a street, with CamVid's classes; frames follow each other at 30 a second.

    The camera, the places and how much of the picture a class takes are CamVid's, with more of what is rare there. A
    fence, a railing or a bare tree takes what is seen between its bars and twigs, as in CamVid's masks.
    """

    moves: ClassVar[bool] = True

    # Any: a pretraining wants them all. One alone makes a domain gap for a study.
    weather: Literal["any", "sunny", "overcast", "dusk", "rain"] = "any"
    # the kind of street; any draws one
    place: Literal["any", "town", "avenue", "suburb", "park", "junction", "open"] = "any"
    traffic: int = Field(100, ge=0, le=400)  # per cent of the cars; 100 gives about CamVid's 6 % of the pixels
    crowd: int = Field(100, ge=0, le=400)  # per cent of the people, on foot and on bicycles

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASSES

    def draw(self, key: Tensor, size: tuple[int, int], frame: int = 0) -> Scene:
        of_plan, of_blocks, of_traffic, of_end, of_noise = rng.fold_in(key, PARTS)
        plan = draw_plan(Dice(of_plan), self.weather, self.place)
        view = camera(plan, size, frame)
        picture = Picture(view)
        scenery = Scenery(picture, plan, frame)
        layout = Layout(scenery, self.traffic, self.crowd)
        first = (view.at[2] + NEAR) // BLOCK
        numbers = torch.arange(first, first + BLOCKS + 1)
        others = torch.stack([of_traffic, of_end, rng.fold_in(of_noise, frame)])
        *blocks, traffic, end, noise = Dice.several(torch.cat([rng.fold_in(of_blocks, numbers), others]))
        for number, block in zip(numbers.tolist(), blocks, strict=True):
            layout.lay(number, block)
        layout.drive(traffic)
        layout.close(end)
        surface = Surface(scenery)
        surface.sky()
        surface.ground()
        for paint in scenery.ground:
            paint()
        surface.cast()
        for thing in seen(scenery.things, view):
            thing.paint()
        if plan.wet:
            surface.mirror()
        image = expose(picture, plan, noise)
        return Scene(image, np.ascontiguousarray(picture.rgba[..., 3]))
