"""The world `nuclei`: its masks fit what is seen, each dial turns one thing, and a key gives the same pixels.

To accept a change of the pixels: `python -m tests.worlds.test_nuclei`; look at a sheet of them, say in the commit why.
"""

from __future__ import annotations

import json
from hashlib import sha256
from itertools import combinations, pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from ssl_seg import load, rng
from ssl_seg.config import UserError
from ssl_seg.datasets.synthetic import Synthetic
from ssl_seg.testing import check_dataset
from ssl_seg.worlds import Scene, World
from ssl_seg.worlds.nuclei import HIDDEN, MOST, Nuclei
from tests import GOLDEN

KEPT = GOLDEN / "worlds_nuclei.json"
LOOKS = ("fluorescence", "stained", "bright")
SIZE = (96, 120)


def key(number: int):
    return rng.fold_in(rng.as_key(9), number)


def digests() -> dict[str, str]:
    kept = {}
    for look in LOOKS:
        for number, size in enumerate(((48, 64), (120, 90))):
            scene = Nuclei(looks=(look,)).draw(key(number), size)
            pixels = np.dstack([scene.image, scene.instances]).astype("<u2")
            kept[f"{look} {size[0]}x{size[1]}"] = sha256(pixels.tobytes()).hexdigest()[:16]
    return kept


def scenes(count: int = 12, size: tuple[int, int] = SIZE, **dials: object) -> list[Scene]:
    world = Nuclei(**dials)
    return [world.draw(key(number), size) for number in range(count)]


def test_the_pixels_are_those_that_were_kept() -> None:
    assert digests() == json.loads(KEPT.read_text())


def test_it_is_a_data_set_as_any_other() -> None:
    check_dataset(Synthetic(kind="nuclei", count=6, size=(40, 56)))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(0, 2**62), st.sampled_from(LOOKS))
def test_a_picture_of_any_size_is_whole(height: int, width: int, seed: int, look: str) -> None:
    scene = Nuclei(looks=(look,), cover=(1, 90), radius=(5, 300)).draw(rng.as_key(seed), (height, width))
    assert scene.image.shape == (height, width, 3)
    assert scene.image.dtype == scene.label.dtype == np.uint8
    np.testing.assert_array_equal(scene.label, scene.instances > 0)
    assert scene.instances.max() <= MOST


@pytest.mark.parametrize("look", LOOKS)
def test_brightness_tells_nuclei_from_the_ground(look: str) -> None:
    """By the area under the curve, which no threshold of a picture's own is needed for; 0.5 tells nothing."""
    areas = []
    for scene in scenes(looks=(look,)):
        if 0 < scene.label.mean() < 1:
            grey = cv2.cvtColor(scene.image, cv2.COLOR_RGB2GRAY).ravel().astype(float)
            areas.append(roc_auc_score(scene.label.ravel(), grey if look == "fluorescence" else -grey))
    assert np.median(areas) > 0.93
    assert min(areas) > 0.6, "dark ones in stained tissue are told by their colour"


def test_looks_are_drawn_as_often_as_they_are_named() -> None:
    pictures = scenes(60, (24, 24), looks=("fluorescence", "fluorescence", "bright"), radius=(50, 50), cover=(2, 2))
    bright = np.mean([scene.image.mean() > 128 for scene in pictures])
    assert 0.15 < bright < 0.55, "a third, within four standard errors"


def test_a_nucleus_mostly_touches_and_seldom_hides_others() -> None:
    touching = 0
    for number in range(12):
        nuclei = Nuclei(cover=(40, 60)).nuclei(key(number), SIZE)
        areas = []
        for nucleus in nuclei:
            area = np.zeros(SIZE, dtype=bool)
            area[nucleus.here] = nucleus.seen
            areas.append(area)
        below = np.zeros(SIZE, dtype=bool)
        for area in areas:
            assert (area & below).sum() * 100 <= HIDDEN * area.sum()
            below |= area
        touching += sum((first & second).any() for first, second in combinations(areas, 2))
    assert touching > 50


def test_the_dials_of_what_is_drawn() -> None:
    sizes = []
    for radius in (30, 60, 120):
        areas = [
            np.bincount(scene.instances.ravel())[1:]
            for scene in scenes(8, (160, 160), radius=(radius, radius), cover=(30, 30))
        ]
        sizes.append(np.median(np.concatenate(areas)))
    assert all(2 < large / small < 6 for small, large in pairwise(sizes)), "twice the radius is four times the area"
    covers = [np.mean([scene.label for scene in scenes(cover=(cover, cover))]) for cover in (5, 15, 45)]
    assert all(more > 1.5 * less for less, more in pairwise(covers))


def test_noise_changes_the_picture_and_not_the_mask() -> None:
    clean, noisy = scenes(noise=0.0), scenes(noise=0.2)
    for before, after in zip(clean, noisy, strict=True):
        np.testing.assert_array_equal(before.instances, after.instances)
    spread = np.std(
        np.stack([scene.image for scene in noisy]) - np.stack([scene.image for scene in clean]).astype(float)
    )
    assert 5 < spread < 0.2 * 255


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"looks": []}, "looks: "),
        ({"looks": ["xray"]}, "looks.0: "),
        ({"radius": [90, 20]}, "radius is [least, most]"),
        ({"cover": [0, 20]}, "cover.0: "),
        ({"noise": 0.5}, "noise: "),
    ],
)
def test_wrong_dials_are_one_line(values: dict[str, object], named: str) -> None:
    with pytest.raises(UserError) as refused:
        load(World, {"type": "nuclei", **values})
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValidationError):
        Nuclei(**values)


if __name__ == "__main__":
    KEPT.write_text(json.dumps(digests(), indent=1) + "\n")
