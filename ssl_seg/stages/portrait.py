"""Portraits: the subject as it is, what lies behind it out of focus.

`classic` is Goswami and Kumarasamy (2020), pixel for pixel: the border softened by one small kernel, the background by
another. `soft` is what a wide lens shows: a matte in place of the border (by the guided filter of He, Sun and Tang,
"Guided Image Filtering", PAMI 2013), and a blur that grows with the distance from the subject, in linear light. That is
a normalized convolution (Knutsson and Westin, CVPR 1993) of background pixels alone, so no subject bleeds into it.

Ours, since OpenCV's main modules have no guided filter, and no library a blur with an alpha of this kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from pydantic import Field
from torch import Tensor

from ssl_seg import images
from ssl_seg.config import Config, PathText, PathTexts, UserError, user_path
from ssl_seg.models import RGB
from ssl_seg.stages.looking import Looker
from ssl_seg.terminal import say, watch_signals
from ssl_seg.training.processes import DeviceName, choose_device
from ssl_seg.weights.export import load_model, range_of, read_model_info

BORDER_KERNEL = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=np.float32) / 16
BACKGROUND_KERNEL = np.full((5, 5), 1 / 25, dtype=np.float32)
BEHIND, BORDER, SUBJECT = range(3)
LEVELS = 6  # blurs of growing width, between which a pixel's is interpolated: more are not told apart
COARSE = 6  # a blur of more pixels is made of a smaller image: a disc of 100 takes a second then, not a minute
GAMMA = 2.2  # of sRGB, nearly
FILL = 1e-3  # a neighbour's weight, beside 1 of each background pixel: what counts where the kernel reaches none
SMOOTH = 1e-4  # guided filter: a variance of grey in [0, 1] below which the matte does not follow the image


class PortraitConfig(Config):
    """`ssl-seg portrait RUN IMAGE --subject CLASS --out FILE.png`. Lengths are shares of the image's diagonal."""

    model: PathText  # a run folder or its model/
    images: PathTexts  # files
    subject: str  # the class that stays in focus
    border: str | None = None  # a class that is the subject's outline, as in the pets' trimaps
    style: Literal["soft", "classic"] = "soft"  # a lens with its depth; or theirs, two small kernels
    # disc: highlights become the round spots of an open lens. gaussian: no shapes at all.
    kernel: Literal["disc", "gaussian"] = "disc"
    blur: float = Field(default=0.02, gt=0, le=0.2)  # radius of the widest: 12 pixels at 480 x 360, as of a fast lens
    near: float = Field(default=0.3, ge=0, le=1)  # of it right behind the subject; with 0 a sharp rim remains about it
    reach: float = Field(default=0.3, gt=0, le=1)  # how far from the subject the blur is at its widest
    edge: float = Field(default=0.01, gt=0, le=0.1)  # half of the matte's width: outlines are some pixels off
    sharpen: float = Field(default=0.0, ge=0, le=5)  # of an unsharp mask on the subject; 0 leaves its every bit
    device: DeviceName = "auto"


class Seen(NamedTuple):
    """What the model says of the subject in an image."""

    share: np.ndarray  # (H, W) float32 in [0, 1]: of the subject, against its strongest rival; from 0.5 on it is taken
    kinds: np.ndarray  # (H, W) uint8: BEHIND, BORDER or SUBJECT


def portrait(config: PortraitConfig, out: str | Path) -> tuple[Path, ...]:
    """Write a portrait of every image: to the file `out` if that ends with .png, else `out/NAME.png`.

    Raises UserError before any work where that would replace a file, and at the end, when the others are written, for
    images that show no pixel of the subject.
    """
    model, resize = load_model(config.model)
    places = _places(config, user_path(out))
    subject = _class_id(config.subject, "subject", model.class_names)
    border = None if config.border is None else _class_id(config.border, "border", model.class_names)
    if border is not None and (border == subject or len(model.class_names) < 3):
        raise UserError(f"border: beside {config.border} the model needs a subject and a background; leave it out")
    if model.image_channels != RGB:
        raise UserError(
            f"model: takes images of {model.image_channels} channels (model.channels), and a portrait is of a "
            "photograph in colours; name a model of RGB"
        )
    looker = Looker.of([(model, resize)], choose_device(config.device))
    value_range = range_of(read_model_info(config.model))
    written, without = [], []
    with watch_signals():
        for name, place in zip(config.images, places, strict=True):
            image = images.picture_of(user_path(name), value_range)
            seen = _seen(looker, image, name, subject, border)
            if not (seen.kinds == SUBJECT).any():
                say(f"{images.show_path(name)}: shows no {config.subject}, as the model sees it")
                without.append(name)
                continue
            drawn = classic(image, seen.kinds) if config.style == "classic" else soft(image, seen.share, config)
            images.write_image(place, drawn)
            written.append(place)
    if without:
        raise UserError(
            f"{len(without)} of {len(places)} images show no {config.subject} ({images.show_path(without[0])} first) "
            "and have no portrait; look at their masks (ssl-seg predict), or leave them out"
        )
    return tuple(written)


# ---- theirs ----


def classic(image: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """An image `(H, W, 3)` uint8 with its border by 1 2 1, its background by the mean of 5 x 5, its subject as it is.

    Of a model without a border, one is made by the morphological gradient of the subject: a pixel to either side, since
    what softens it reaches no farther.
    """
    if not (kinds == BORDER).any():
        gradient = cv2.morphologyEx((kinds == SUBJECT).astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
        kinds = np.where(gradient == 1, BORDER, kinds)
    softened = np.where((kinds == BORDER)[..., None], cv2.filter2D(image, -1, BORDER_KERNEL), image)
    return np.where((kinds == BEHIND)[..., None], cv2.filter2D(image, -1, BACKGROUND_KERNEL), softened)


# ---- a lens's ----


def soft(image: np.ndarray, share: np.ndarray, config: PortraitConfig) -> np.ndarray:
    """An image `(H, W, 3)` uint8 with all behind the subject out of focus; `share` is as `Seen` has it."""
    diagonal = float(np.hypot(*share.shape))
    edge = max(1.0, config.edge * diagonal)
    alpha = matte(image, share, edge)
    light = (image.astype(np.float32) / 255) ** GAMMA
    radius = config.blur * diagonal
    behind = background(
        light, outline(share) <= -edge, config.kernel, (config.near * radius, radius), config.reach * diagonal
    )
    front = light
    if config.sharpen:
        front = np.clip(light + config.sharpen * (light - cv2.GaussianBlur(light, (0, 0), 1.5)), 0, 1)
    mixed = alpha[..., None] * front + (1 - alpha[..., None]) * behind
    drawn = np.rint(255 * np.clip(mixed, 0, 1) ** (1 / GAMMA)).astype(np.uint8)
    if not config.sharpen:
        drawn[alpha == 1] = image[alpha == 1]
    return drawn


def matte(image: np.ndarray, share: np.ndarray, edge: float) -> np.ndarray:
    """How much of each pixel is subject: `(H, W)` float32 in [0, 1]; 1 and 0 from `edge` pixels off the outline on.

    Between, the share follows the image's own edges. However unsure the network is, the subject's inside is whole.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    followed = guided(grey, share, max(1, round(edge)))
    slope = outline(share) / edge
    return np.clip(followed, np.clip(slope, 0, 1), np.clip(1 + slope, 0, 1))


def outline(share: np.ndarray) -> np.ndarray:
    """How far each pixel lies within the subject, below 0 outside of it: `(H, W)` float32 pixels."""
    inside = (share >= 0.5).astype(np.uint8)
    return _distance(inside) - _distance(1 - inside)


def guided(guide: np.ndarray, values: np.ndarray, radius: int) -> np.ndarray:
    """He, Sun and Tang's filter of `values` `(H, W)` by a grey `guide` `(H, W)`, both float32 in [0, 1].

    In each window the result is a linear function of the guide.
    """

    def mean(array: np.ndarray) -> np.ndarray:
        return cv2.blur(array, (2 * radius + 1, 2 * radius + 1))

    mean_guide = mean(guide)
    mean_values = mean(values)
    variance = mean(guide * guide) - mean_guide**2
    slope = (mean(guide * values) - mean_guide * mean_values) / (variance + SMOOTH)
    offset = mean_values - slope * mean_guide
    return mean(slope) * guide + mean(offset)


def background(
    light: np.ndarray, sure: np.ndarray, kernel: str, radii: tuple[float, float], reach: float
) -> np.ndarray:
    """What lies behind a subject, `(H, W, 3)` float32, its blur growing from the first of `radii` to the second.

    Of pixels that surely are background, bool `(H, W)`: under the subject and its edge the nearest of them go on.
    """
    free = sure.astype(np.float32)
    if not free.any():
        return light
    taken = 1 - free.astype(np.uint8)
    _, nearest = cv2.distanceTransformWithLabels(taken, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL)
    labels = np.asarray(nearest, dtype=np.int32)
    colours = np.zeros((int(labels.max()) + 1, 3), dtype=np.float32)
    colours[labels[free == 1]] = light[free == 1]
    plate = np.where(free[..., None] == 1, light, colours[labels])
    steps = np.clip(_distance(free.astype(np.uint8)) / reach, 0, 1) * (LEVELS - 1)
    drawn = np.zeros_like(light)
    for level, radius in enumerate(np.linspace(*radii, LEVELS)):
        part = np.clip(1 - np.abs(steps - level), 0, 1)[..., None]
        if part.any():
            weights = _blurred(free, kernel, radius)[..., None]
            sums = _blurred(plate * free[..., None], kernel, radius)
            drawn += part * (sums + FILL * plate) / (weights + FILL)
    return drawn


def _blurred(array: np.ndarray, kernel: str, radius: float) -> np.ndarray:
    if radius < 0.5:
        return array
    shrink = max(1, int(radius / COARSE))
    height, width = array.shape[:2]
    small = cv2.resize(array, (-(-width // shrink), -(-height // shrink)), interpolation=cv2.INTER_AREA)
    radius /= shrink
    if kernel == "gaussian":
        blurred = cv2.GaussianBlur(small, (0, 0), radius / 2)  # as wide as the disc: the same variance
    else:
        side = np.arange(-int(radius + 1), int(radius + 1) + 1)
        disc = np.clip(radius + 0.5 - np.hypot(side, side[:, None]), 0, 1).astype(np.float32)  # its rim in part
        blurred = cv2.filter2D(small, -1, disc / disc.sum())
    return cv2.resize(blurred, (width, height), interpolation=cv2.INTER_LINEAR)


def _distance(inside: np.ndarray) -> np.ndarray:
    """`(H, W)` float32: of pixels that are 1, the way in pixels to the nearest that is 0."""
    return cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


# ---- what the model says ----


def _seen(looker: Looker, image: np.ndarray, name: str, subject: int, border: int | None) -> Seen:
    share = np.empty(image.shape[:2], dtype=np.float32)
    kinds = np.empty(image.shape[:2], dtype=np.uint8)
    for block in looker.blocks(image, name):
        share[block.rows, block.columns] = _share(block.values, subject, border).cpu().numpy()
        ids = block.values.argmax(dim=0).cpu().numpy()
        kinds[block.rows, block.columns] = np.select([ids == subject, ids == border], [SUBJECT, BORDER], BEHIND)
    return Seen(share, kinds)


def _share(shares: Tensor, subject: int, border: int | None) -> Tensor:
    """`(H, W)` of `(K, H, W)`: half of a border's pixel is the subject's."""
    rivals = [number for number in range(len(shares)) if number not in (subject, border)]
    own = shares[subject]
    other = shares[rivals].amax(dim=0)
    if border is not None:
        own = own + shares[border] / 2
        other = other + shares[border] / 2
    return own / (own + other)


def _class_id(name: str, key: str, class_names: Sequence[str]) -> int:
    if name in class_names:
        return class_names.index(name)
    close = get_close_matches(name, class_names, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"it tells {', '.join(class_names)} apart"
    raise UserError(f"{key}: the model knows no class '{name}'; {hint}")


def _places(config: PortraitConfig, out: Path) -> list[Path]:
    """Where each portrait is written."""
    if not config.images:
        raise UserError("portrait: names no image; give one or more files behind the run")
    if out.suffix.lower() == ".png":
        if len(config.images) > 1:
            raise UserError(f"--out {out}: is one file for {len(config.images)} images; name a folder")
        places = [out]
    else:
        places = [out / f"{Path(name).stem}.png" for name in config.images]
    for place in places:
        if place.exists() or places.count(place) > 1:
            raise UserError(f"--out {place}: exists already, or would be of two images; name another")
    return places
