"""The pictures a person looks at: rows of panels, and class ids in colour.

Images may have any number of channels: what is shown of them is their `composite`.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from ssl_seg.images import composite, resize_image, resize_mask
from ssl_seg.losses import IGNORE_INDEX

IGNORE_COLOUR = (224, 224, 224)
FIRST_HUE = 105  # of 180: the first class is often the background or the sky, and a large area is calm in blue
GAP = 4  # white pixels between panels
WRONG_COLOUR = (255, 90, 0)  # light beside the dimmed image, for those too who do not tell red from green
MENDED_COLOUR = (60, 170, 255)
WRONG_SHADING = 0.4  # its share that the image may take away
DIMMED = 0.4
CAPTION = 24  # pixels of a line's height
CELL = 240  # pixels of a side of a picture on a contact sheet
PANEL_SIDE = 400  # pixels of a panel's longer side: four of them fill a page, and a row takes about 300 kB


def palette(num_classes: int) -> np.ndarray:
    """One RGB colour a class, `(256, 3)` uint8, far apart in hue and lightness; ids without a class are light grey.

    Colours step by the golden angle around the hue circle, so neighbouring ids differ for any number of classes.
    """
    table = np.full((256, 3), IGNORE_COLOUR, dtype=np.uint8)
    index = np.arange(num_classes)
    hue = (FIRST_HUE + index * 137.508 / 2) % 180  # OpenCV's hues count half degrees
    saturation = np.array([200, 130, 235])[index % 3]
    value = np.array([200, 245, 140])[index // 3 % 3]
    hsv = np.stack([hue, saturation, value], axis=-1).astype(np.uint8)[None]
    table[:num_classes] = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]
    return table


def to_uint8(image: Tensor) -> np.ndarray:
    """`(..., 3, H, W)` floats in [0, 1] as `(..., H, W, 3)` uint8."""
    bytes_ = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return bytes_.movedim(-3, -1).cpu().numpy()


def at_most(size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of an image's panel where pixels are shown as they are: smaller only where a side exceeds `PANEL_SIDE`.

    Four photographs of 12 megapixels would else make a sheet of 147, which takes 26 s to write, once an evaluation.
    """
    return size if max(size) <= PANEL_SIDE else _panel_size(size)


def grid(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Panels `(H, W, 3)` uint8 in rows with a white gap between; smaller ones are scaled to the largest, unsmoothed."""
    height = max(panel.shape[0] for row in rows for panel in row)
    width = max(panel.shape[1] for row in rows for panel in row)
    columns = max(len(row) for row in rows)
    sheet_size = (len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    sheet = np.full(sheet_size, 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, panel in enumerate(row):
            fitted = cv2.resize(panel, (width, height), interpolation=cv2.INTER_NEAREST)
            top, left = y * (height + GAP), x * (width + GAP)
            sheet[top : top + height, left : left + width] = fitted
    return sheet


def legend(names: Sequence[str], colours: np.ndarray, width: int) -> np.ndarray:
    """A swatch and a name for each class, wrapped to `width`, as RGB `(H, width, 3)` uint8: laid under a sheet.

    Text is as large on a sheet of any width as on a printed page: about 24 px where the sheet has 1,600.
    """
    text_height = max(10, min(24, width // 66))
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, text_height / 30  # its capitals are 21 px high at scale 1, its lines 30
    swatch, line = text_height * 3 // 2, text_height * 2
    places = []
    x = y = GAP
    for name in names:
        (length, _), _ = cv2.getTextSize(name, font, scale, 1)
        entry = swatch + text_height // 2 + length + text_height
        if x > GAP and x + entry > width:
            x, y = GAP, y + line
        places.append((x, y))
        x += entry
    strip = np.full((y + line, width, 3), 255, dtype=np.uint8)
    for number, (name, (x, y)) in enumerate(zip(names, places, strict=True)):
        strip[y : y + text_height + GAP, x : x + swatch] = colours[number]
        baseline = (x + swatch + text_height // 2, y + text_height)
        cv2.putText(strip, name, baseline, font, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return strip


def overlay(image: np.ndarray, ids: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Class colours laid half over an image; both `(H, W, ...)`, ids `(H, W)` uint8."""
    return cv2.addWeighted(composite(image), 0.4, colours[ids], 0.6, 0)


def error_map(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Where a prediction is wrong, in one strong colour on the dimmed grey image; ignored pixels are plain light grey.

    The colour is shaded by the image, so that one sees what was mistaken.
    `image` `(H, W, 3)` uint8, `truth` and `prediction` `(H, W)` uint8 ids; gives `(H, W, 3)` uint8.
    """
    grey = cv2.cvtColor(composite(image), cv2.COLOR_RGB2GRAY)
    drawn = np.repeat((grey * DIMMED).astype(np.uint8)[..., None], 3, axis=-1)  # (H, W) -> (H, W, 3)
    wrong = truth != prediction
    shade = 1 - WRONG_SHADING * (1 - grey[wrong, None] / 255)
    drawn[wrong] = (WRONG_COLOUR * shade).astype(np.uint8)
    drawn[truth == IGNORE_INDEX] = IGNORE_COLOUR
    return drawn


def change_map(image: np.ndarray, truth: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where `other` is right and `one` was wrong, and the other way round, in two colours as `error_map` has one.

    A pixel that both have wrong, or both right, shows the dimmed image. Arrays as for `error_map`.
    """
    grey = cv2.cvtColor(composite(image), cv2.COLOR_RGB2GRAY)
    drawn = np.repeat((grey * DIMMED).astype(np.uint8)[..., None], 3, axis=-1)  # (H, W) -> (H, W, 3)
    right_before, right_after = one == truth, other == truth
    for changed, colour in ((right_after & ~right_before, MENDED_COLOUR), (right_before & ~right_after, WRONG_COLOUR)):
        shade = 1 - WRONG_SHADING * (1 - grey[changed, None] / 255)
        drawn[changed] = (colour * shade).astype(np.uint8)
    drawn[truth == IGNORE_INDEX] = IGNORE_COLOUR
    return drawn


def change_row(
    image: np.ndarray, truth: np.ndarray, one: np.ndarray, other: np.ndarray, class_names: Sequence[str]
) -> np.ndarray:
    """Image | truth | one prediction | another | where that is better or worse; colours below, as `error_row`."""
    size = _panel_size(truth.shape)
    image = resize_image(composite(image), size)
    truth, one, other = (resize_mask(ids, size) for ids in (truth, one, other))
    colours = palette(len(class_names))
    row = grid([[image, colours[truth], colours[one], colours[other], change_map(image, truth, one, other)]])
    shown = sorted({*np.unique(truth), *np.unique(one), *np.unique(other)} - {IGNORE_INDEX})
    names = [*(class_names[index] for index in shown), "better", "worse", "ignored"]
    swatches = [*colours[shown], MENDED_COLOUR, WRONG_COLOUR, IGNORE_COLOUR]
    return np.vstack([row, legend(names, np.array(swatches, dtype=np.uint8), row.shape[1])])


def error_row(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Image | prediction | truth | errors, and below the colours of the classes that occur; uint8 `(H, W, 3)`.

    Each panel's longer side is `PANEL_SIDE`, whatever the image's.
    """
    size = _panel_size(truth.shape)
    image = resize_image(composite(image), size)
    truth, prediction = resize_mask(truth, size), resize_mask(prediction, size)
    colours = palette(len(class_names))
    row = grid([[image, colours[prediction], colours[truth], error_map(image, truth, prediction)]])
    shown = sorted({*np.unique(truth), *np.unique(prediction)} - {IGNORE_INDEX})
    names = [*(class_names[index] for index in shown), "wrong", "ignored"]
    swatches = [*colours[shown], WRONG_COLOUR, IGNORE_COLOUR]
    return np.vstack([row, legend(names, np.array(swatches, dtype=np.uint8), row.shape[1])])


def boxed(image: np.ndarray, side: int) -> np.ndarray:
    """An image `(H, W, 3)` of any size in the middle of a grey square `(side, side, 3)`."""
    scale = side / max(image.shape[:2])
    size = (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))
    panel = np.full((side, side, 3), 128, dtype=np.uint8)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    panel[top : top + size[0], left : left + size[1]] = resize_image(composite(image), size)
    return panel


def caption(text: str, width: int) -> np.ndarray:
    """A line of text as RGB `(H, width, 3)` uint8, to stand above a row; what does not fit is cut off.

    OpenCV's letters are ASCII: others are written as `?`.
    """
    strip = np.full((CAPTION, width, 3), 255, dtype=np.uint8)
    plain = text.encode("ascii", "replace").decode()
    cv2.putText(strip, plain, (GAP, CAPTION - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return strip


def contact_sheet(
    title: str,
    pictures: Sequence[tuple[str, np.ndarray | None, np.ndarray | None]],
    names: Sequence[str],
    strange: int,
) -> np.ndarray:
    """Below a legend, captions with each image beside its class ids laid over it, two of them in a row.

    An image or ids that are not there leave a dark panel; ids of another size are drawn alone. `strange` is an id that
    is no class, drawn in the colour of what is wrong.
    """
    colours = palette(max(1, len(names)))
    colours[strange] = WRONG_COLOUR
    cells = []
    for text, image, ids in pictures:
        panel = np.full((CELL, CELL, 3), 64, dtype=np.uint8)
        shown = [panel if image is None else boxed(image, CELL)]
        if names and ids is None:
            shown.append(panel)
        elif names and ids is not None:
            fits = image is not None and image.shape[:2] == ids.shape
            shown.append(boxed(overlay(image, ids, colours) if fits and image is not None else colours[ids], CELL))
        row = grid([shown])
        cells.append(np.vstack([caption(text, row.shape[1]), row]))
    abreast = 2 if names else 4
    white = (
        np.full_like(cells[0], 255) if cells else np.full((GAP, 2 * CELL + GAP if names else CELL, 3), 255, np.uint8)
    )
    rows = [cells[start : start + abreast] for start in range(0, len(cells), abreast)] or [[white]]
    sheet = grid([[*row, *[white] * (abreast - len(row))] for row in rows])
    wrong = [*names, "no class", "ignored"]
    swatches = np.array([*colours[: len(names)], WRONG_COLOUR, IGNORE_COLOUR], dtype=np.uint8)
    key = [legend(wrong, swatches, sheet.shape[1])] if names else []
    return np.vstack([caption(title, sheet.shape[1]), *key, sheet])


def _panel_size(size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) with the longer side `PANEL_SIDE`."""
    scale = PANEL_SIDE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
