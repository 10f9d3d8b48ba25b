"""The world `aerial`: roads lead on, what grows over them hides no mask, each dial turns one thing.

To accept a change of the pixels: `python -m tests.worlds.test_aerial`; look at a sheet of them, say in the commit why.
"""

from __future__ import annotations

import json
from hashlib import sha256
from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score

from ssl_seg import load, rng
from ssl_seg.config import UserError
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.testing import check_dataset
from ssl_seg.worlds import Scene, World
from ssl_seg.worlds.aerial import Aerial
from ssl_seg.worlds.drawing import Dice
from tests import GOLDEN

KEPT = GOLDEN / "worlds_aerial.json"
SIZE = (128, 160)


def key(number: int):
    return rng.fold_in(rng.as_key(9), number)


def digests() -> dict[str, str]:
    kept = {}
    for number, size in enumerate(((48, 64), (120, 90), (96, 96))):
        scene = Aerial().draw(key(number), size)
        pixels = np.dstack([scene.image, scene.label])
        kept[f"{size[0]}x{size[1]}"] = sha256(pixels.tobytes()).hexdigest()[:16]
    return kept


def scenes(count: int = 8, size: tuple[int, int] = SIZE, **dials: object) -> list[Scene]:
    world = Aerial(**dials)
    return [world.draw(key(number), size) for number in range(count)]


def test_the_pixels_are_those_that_were_kept() -> None:
    assert digests() == json.loads(KEPT.read_text())


def test_it_is_a_data_set_as_any_other() -> None:
    check_dataset(Synthetic(kind="aerial", count=6, size=(40, 56)))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(0, 2**62), st.integers(1, 30))
def test_a_picture_of_any_size_is_whole(height: int, width: int, seed: int, ground: int) -> None:
    scene = Aerial(ground=(ground, ground), trees=(0, 100)).draw(rng.as_key(seed), (height, width))
    assert scene.image.shape == (height, width, 3)
    assert scene.label.shape == (height, width)
    assert scene.image.dtype == scene.label.dtype == np.uint8
    assert scene.label.max() <= 1


def test_roads_lead_on() -> None:
    """Nearly all of the mask is of pieces that reach the picture's border, as car parks need not."""
    inner = total = 0
    for scene in scenes(24):
        count, pieces = cv2.connectedComponents(scene.label, connectivity=8)
        border = np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])
        lonely = set(range(1, count)) - set(border.tolist())
        inner += np.isin(pieces, list(lonely)).sum()
        total += scene.label.sum()
    assert total > 0.05 * 24 * SIZE[0] * SIZE[1]
    assert inner < 0.02 * total


def test_a_pixel_s_colour_does_not_tell_a_road() -> None:
    """A forest on the colours of half of the pictures, asked about the rest; alleys, yards and roofs look alike."""
    pictures = scenes(24, noise=0.0)
    rows = [(scene.image[::3, ::3].reshape(-1, 3), scene.label[::3, ::3].ravel()) for scene in pictures]
    colours, roads = (np.concatenate(parts) for parts in zip(*rows[:12], strict=True))
    forest = RandomForestClassifier(20, min_samples_leaf=20, random_state=0).fit(colours, roads)
    colours, roads = (np.concatenate(parts) for parts in zip(*rows[12:], strict=True))
    area = roc_auc_score(roads, forest.predict_proba(colours)[:, 1])
    assert 0.55 < area < 0.85


def test_the_dials() -> None:
    widths = []
    for ground in (5, 10, 20):
        labels = [scene.label for scene in scenes(ground=(ground, ground))]
        widths.append(np.mean([cv2.distanceTransform(label, cv2.DIST_L2, 5).max() for label in labels]))
    assert all(1.3 < near / far < 3 for near, far in pairwise(widths)), "half as many pixels where each covers twice"
    bare, grown = scenes(trees=(0, 0)), scenes(trees=(100, 100))
    green = []
    for pictures in (bare, grown):
        colours = np.concatenate([scene.image[scene.label == 1] for scene in pictures]).astype(int)
        green.append((colours[:, 1] - colours[:, [0, 2]].max(axis=1)).mean())
    assert green[1] > green[0] + 1, "crowns hang over the roads"
    for before, after in zip(bare, grown, strict=True):
        np.testing.assert_array_equal(before.label, after.label)


def test_roads_are_as_wide_wherever_the_picture_is_taken_from() -> None:
    """The share of roads, which a pixel's size must not change: near or far, a town is the same town."""
    shares = [np.mean([scene.label for scene in scenes(24, (96, 96), ground=(own, own))]) for own in (6, 14, 30)]
    assert max(shares) < 1.5 * min(shares)


def test_no_roof_lies_on_an_alley() -> None:
    from ssl_seg.worlds.aerial import _Town, _View

    alleys = 0
    for number in range(12):
        dice = Dice(rng.fold_in(key(number), "picture"))
        town = _Town(dice, _View(dice, (200, 200), 3))
        bare = town.image.copy()
        roofs = np.zeros(town.label.shape, dtype=np.uint8)
        town._roof = lambda box, colour, gabled, town=town, roofs=roofs: town.view.fill(roofs, box, 1)
        town.blocks(Dice(rng.fold_in(key(number), "blocks")))
        assert (town.image != bare).any()
        alleys += town.label.sum()
        assert (town.label & cv2.erode(roofs, np.ones((3, 3), np.uint8))).sum() == 0
    assert alleys > 5000


def test_noise_changes_the_picture_and_not_the_mask() -> None:
    clean, noisy = scenes(noise=0.0), scenes(noise=0.2)
    for before, after in zip(clean, noisy, strict=True):
        np.testing.assert_array_equal(before.label, after.label)
    spread = np.std(
        np.stack([scene.image for scene in noisy]) - np.stack([scene.image for scene in clean]).astype(float)
    )
    assert 5 < spread < 0.2 * 255


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"ground": [14, 6]}, "ground is [least, most]"),
        ({"ground": [0, 6]}, "ground.0: "),
        ({"trees": [5, 101]}, "trees.1: "),
        ({"noise": 0.5}, "noise: "),
    ],
)
def test_wrong_dials_are_one_line(values: dict[str, object], named: str) -> None:
    with pytest.raises(UserError) as refused:
        load(World, {"type": "aerial", **values})
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValidationError):
        Aerial(**values)


if __name__ == "__main__":
    KEPT.write_text(json.dumps(digests(), indent=1) + "\n")
