"""The world `shapes`: what tells the class is what was planted and nothing else, and every dial turns one thing.

To accept a change of the pixels: `python -m tests.worlds.test_shapes`, and say in the commit why they moved.
"""

from __future__ import annotations

import json
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_score

from ssl_seg import load, rng
from ssl_seg.config import UserError
from ssl_seg.worlds import Scene, World, edges
from ssl_seg.worlds.drawing import ONE, SINE
from ssl_seg.worlds.shapes import WALL, Shapes, silhouette
from tests import GOLDEN

KEPT = GOLDEN / "worlds_shapes.json"
SETTINGS = {
    "default": {},
    "every cue": {"cue": ["colour", "texture", "shape", "layout"], "classes": 8},
    "dials far": {"noise": 0.3, "light": 1.0, "blur": 12, "imbalance": 100, "shadow": False, "objects": [20, 30]},
    "dials near": {"noise": 0.0, "light": 0.0, "blur": 0, "classes": 2},
}
SIZES = ((48, 64), (120, 90))
FACTORS = ("colour", "texture", "shape", "layout")


def key(number: int):
    return rng.fold_in(rng.as_key(9), number)


def digests() -> dict[str, dict[str, str]]:
    kept = {}
    for name, values in SETTINGS.items():
        world = load(World, {"type": "shapes", **values})
        for size in SIZES:
            scene = world.draw(key(3), size)
            maps = {"image": scene.image, "label": scene.label, "depth": scene.depth, "instances": scene.instances}
            kept[f"{name} {size[0]}x{size[1]}"] = {
                part: sha256(pixels.astype("<u2").tobytes()).hexdigest()[:16] for part, pixels in maps.items()
            }
    return kept


def test_the_pixels_are_those_that_were_kept() -> None:
    assert digests() == json.loads(KEPT.read_text())


def test_the_sine_table_is_the_same_on_every_machine() -> None:
    exact = ONE * np.sin(2 * np.pi * np.arange(len(SINE)) / len(SINE))
    assert np.abs(np.abs(exact % 1 - 0.5)).min() > 1e-6, "a libm that errs in the last bit rounds alike"
    np.testing.assert_array_equal(SINE, np.rint(exact))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**62), st.integers(2, 8), st.sampled_from(FACTORS))
def test_a_scene_of_any_size_is_whole(height: int, width: int, seed: int, classes: int, cue: str) -> None:
    world = Shapes(classes=classes, cue=(cue,), objects=(1, 40))
    scene = world.draw(rng.as_key(seed), (height, width))
    assert scene.image.shape == (height, width, 3)
    assert scene.label.max() < len(world.class_names) == classes + 1
    ids = scene.instances
    np.testing.assert_array_equal(scene.label == 0, ids == 0)
    np.testing.assert_array_equal(scene.depth == WALL, ids == 0)
    for number in np.unique(ids)[1:]:
        assert len(np.unique(scene.label[ids == number])) == len(np.unique(scene.depth[ids == number])) == 1


def test_of_two_objects_the_nearer_is_seen() -> None:
    size = (120, 160)
    overlaps = 0
    for number in range(8):
        scene = Shapes(objects=(20, 20)).draw(key(number), size)
        nearest = np.full(size, WALL, dtype=np.int64)
        covered = np.zeros(size, dtype=np.int64)
        for thing in Shapes(objects=(20, 20)).things(key(number), size):
            mask = silhouette(thing)
            middle = mask.shape[0] // 2
            rows, columns = np.nonzero(mask)
            rows, columns = rows + thing.row - middle, columns + thing.column - middle
            inside = (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
            place = rows[inside], columns[inside]
            nearest[place] = np.minimum(nearest[place], thing.depth)
            covered[place] += 1
        np.testing.assert_array_equal(scene.depth, nearest)
        overlaps += (covered > 1).sum()
    assert overlaps > 1000


def test_edges_are_where_a_neighbour_is_another_class_or_object() -> None:
    label = np.array([[0, 0, 1], [0, 0, 1], [2, 2, 2]], dtype=np.uint8)
    objects = np.array([[0, 0, 1], [0, 0, 2], [3, 3, 3]], dtype=np.uint16)
    image = np.zeros((3, 3, 3), dtype=np.uint8)
    np.testing.assert_array_equal(edges(Scene(image, label)), [[0, 1, 0], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(edges(Scene(image, label, None, objects)), [[0, 1, 1], [1, 1, 1], [0, 0, 0]])


# ---- the planted truth


def _traits(scene: Scene) -> list[tuple[int, dict[str, list[float]]]]:
    """Of every object that shows enough pixels its class, and figures of its colour, texture, shape and place."""
    grey = cv2.cvtColor(scene.image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    height, width = grey.shape
    padded = np.pad(grey, 1, mode="edge")
    around = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0)]
    above = np.stack([padded[y : y + height, x : x + width] > grey * 1.03 for y, x in around])
    changes = (above != np.roll(above, 1, axis=0)).sum(axis=0)
    patterns = np.where(changes <= 2, above.sum(axis=0), 9)  # Ojala et al., PAMI 2002: alike for every rotation
    gradients = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    found = []
    for number in np.unique(scene.instances)[1:]:
        mask = (scene.instances == number).astype(np.uint8)
        inner = cv2.erode(np.pad(mask, 1), np.ones((3, 3)))[1:-1, 1:-1] > 0
        if inner.sum() < 80:
            continue
        x, y = (gradient[inner] for gradient in gradients)
        energy = (x * x + y * y).mean()
        one_way = np.hypot((x * x - y * y).mean(), 2 * (x * y).mean()) / (energy + 1)
        histogram = np.bincount(patterns[inner], minlength=10) / inner.sum()
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        outline = max(contours, key=len)
        sides = sorted(cv2.minAreaRect(outline)[1])
        hull = max(1.0, cv2.contourArea(cv2.convexHull(outline)))
        area, length = mask.sum(), cv2.arcLength(outline, True)
        hu = cv2.HuMoments(cv2.moments(mask, True)).ravel()[:4]
        rows, columns = np.nonzero(mask)
        figures = {
            "colour": [*scene.image[inner].mean(axis=0)],
            "texture": [np.sqrt(energy) / grey[inner].mean(), one_way, *histogram],
            "shape": [area / hull, sides[0] / sides[1], length**2 / area, len(contours), *np.log(np.abs(hu) + 1e-12)],
            "layout": [rows.mean() / height, columns.mean() / width],
        }
        found.append((int(scene.label[mask > 0][0]), figures))
    return found


@lru_cache(maxsize=8)
def _accuracies(cue: tuple[str, ...]) -> dict[str, float]:
    """How often a forest tells the class of an unseen object by figures of one factor alone; chance is 1/6."""
    # Without noise: of dark colours it makes another share, and texture's figures would measure that.
    world = Shapes(cue=cue, noise=0, objects=(10, 14))
    found = [traits for number in range(32) for traits in _traits(world.draw(key(number), (180, 240)))]
    truth = [kind for kind, _ in found]
    accuracies = {}
    for factor in FACTORS:
        figures = [traits[factor] for _, traits in found]
        forest = RandomForestClassifier(12, random_state=0)
        accuracies[factor] = cross_val_score(forest, figures, truth, cv=3).mean()
    return accuracies


@pytest.mark.parametrize("cue", [("colour",), ("texture",), ("shape",), ("layout",), ("colour", "layout")])
def test_the_class_is_told_by_the_cues_and_by_nothing_else(cue: tuple[str, ...]) -> None:
    accuracies = _accuracies(cue)
    for factor in FACTORS:
        if factor in cue:
            assert accuracies[factor] > 0.75, (factor, accuracies)
        else:
            assert accuracies[factor] < 0.27, (factor, accuracies)  # chance and four standard errors


def test_what_is_no_cue_is_drawn_apart_from_the_class() -> None:
    world = Shapes(cue=("shape",), imbalance=20)
    things = [thing for number in range(300) for thing in world.things(key(number), (60, 80))]
    assert all(thing.shape == thing.kind for thing in things)
    for factor in ("colour", "texture"):
        table = np.zeros((6, 6))
        for thing in things:
            table[thing.kind, getattr(thing, factor)] += 1
        expected = table.sum(axis=1, keepdims=True) / 6  # even, whatever the class and however rare it is
        assert ((table - expected) ** 2 / expected).sum() < 60, (
            "the 99.9 % point of chi squared with 30 degrees is 59.7"
        )


def test_a_zone_holds_the_centres_of_its_class() -> None:
    for classes, size in ((3, (60, 90)), (5, (60, 90)), (8, (90, 60))):
        world = Shapes(classes=classes, cue=("layout",), objects=(30, 30))
        centres = {}
        for number in range(20):
            for thing in world.things(key(number), size):
                centres.setdefault(thing.kind, []).append((thing.row, thing.column))
        boxes = {kind: (np.min(places, axis=0), np.max(places, axis=0)) for kind, places in centres.items()}
        assert len(boxes) == classes
        for kind, (low, high) in boxes.items():
            for other, (other_low, other_high) in boxes.items():
                assert kind == other or (high < other_low).any() or (other_high < low).any()


def test_classes_are_named_by_what_tells_them() -> None:
    assert Shapes(classes=3).class_names == ("background", "disc", "ring", "triangle")
    assert Shapes(classes=2, cue=("texture", "colour")).class_names == ("background", "red_plain", "green_striped")
    assert Shapes(classes=2, cue=("layout",)).class_names == ("background", "zone1", "zone2")


# ---- the dials


def _scenes(size: tuple[int, int] = (120, 160), count: int = 4, **dials: object) -> list[Scene]:
    world = Shapes(**{"noise": 0, "light": 0, "blur": 0, **dials})
    return [world.draw(key(number), size) for number in range(count)]


def _rising(values: list[float], by: float = 1.1) -> bool:
    return all(after > before * by for before, after in pairwise(values))


def test_dials_of_the_picture_leave_the_scene_alone() -> None:
    plain = _scenes(count=1)[0]
    for dials in ({"noise": 0.3}, {"light": 1.0}, {"blur": 12}, {"shadow": False}):
        scene = _scenes(count=1, **dials)[0]
        assert (scene.image != plain.image).any()
        for part in ("label", "depth", "instances"):
            np.testing.assert_array_equal(getattr(scene, part), getattr(plain, part))


def test_noise_has_the_deviation_that_is_asked_for() -> None:
    clean = np.stack([scene.image for scene in _scenes()]).astype(float)
    middle = (clean > 90) & (clean < 165)  # where nothing is cut off
    for deviation in (0.01, 0.02, 0.05, 0.1):
        noisy = np.stack([scene.image for scene in _scenes(noise=deviation)])
        difference = (noisy - clean)[middle]
        assert difference.std() == pytest.approx(deviation * 255, rel=0.03)
        assert abs(difference.mean()) < 0.2
        neighbours = np.corrcoef((noisy - clean)[..., :-1, :].ravel(), (noisy - clean)[..., 1:, :].ravel())[0, 1]
        assert abs(neighbours) < 0.02
    spread = [np.std(np.stack([s.image for s in _scenes(noise=noise)]) - clean) for noise in (0, 0.02, 0.1, 0.2, 0.3)]
    assert _rising(spread)


def test_light_spreads_brightness_over_the_picture() -> None:
    even = np.stack([scene.image for scene in _scenes()]).mean(axis=-1)
    spreads = []
    for light in (0, 0.1, 0.3, 0.6, 1.0):
        lit = np.stack([scene.image for scene in _scenes(light=light)]).mean(axis=-1)
        ratios = lit / even
        spreads.append(ratios.std())
        assert np.abs(ratios - 1).max() <= light + 0.05
    assert spreads[0] == 0
    assert _rising(spreads[1:])


def test_light_changes_gradually_in_wide_pictures_too() -> None:
    size = (150, 3200)
    for number in range(4):  # lamps on several sides
        dark = Shapes(objects=(1, 1), noise=0, blur=0, light=0).draw(key(number), size).image
        lit = Shapes(objects=(1, 1), noise=0, blur=0, light=1).draw(key(number), size).image
        gain = np.where(dark < 120, lit / np.maximum(dark, 1), np.nan)  # lighter ones are cut off at white
        assert np.nanmax(np.abs(np.diff(gain, axis=1))) < 0.2
        assert np.nanmax(gain) - np.nanmin(gain) > 1, "else nothing is lit"


def test_blur_takes_detail_and_no_brightness() -> None:
    blurs = (0, 1, 2, 4, 8, 12)
    pictures = [np.stack([scene.image for scene in _scenes(blur=blur)]).astype(float) for blur in blurs]
    detail = [np.abs(np.diff(picture, axis=2)).mean() for picture in pictures]
    assert _rising(detail[::-1])
    assert np.ptp([picture.mean() for picture in pictures]) < 1
    kernel = np.convolve([1, 1, 1], [1, 1, 1]) / 9  # two boxes of 3: a pyramid
    expected = cv2.sepFilter2D(pictures[0][0], cv2.CV_64F, kernel, kernel)
    np.testing.assert_allclose(pictures[2][0], expected, atol=0.51)


def test_imbalance_is_the_ratio_of_the_first_class_to_the_last() -> None:
    seen = []
    for ratio in (1, 3, 10, 100):
        world = Shapes(imbalance=ratio, objects=(30, 30))
        things = [thing for number in range(40) for thing in world.things(key(number), (40, 40))]
        counts = np.bincount([thing.kind for thing in things], minlength=6)
        shares = ratio ** -(np.arange(6) / 5)
        np.testing.assert_allclose(counts / counts.sum(), shares / shares.sum(), atol=0.04)
        seen.append(counts[0] / counts[-1])
    assert _rising(seen)


def test_so_many_objects_stand_there_as_asked() -> None:
    counts = {len(Shapes(objects=(2, 4)).things(key(number), (50, 50))) for number in range(40)}
    assert counts == {2, 3, 4}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"cue": []}, "cue: "),
        ({"cue": ["colour", "smell"]}, "cue.1: "),
        ({"cue": ["colour", "colour"]}, "twice"),
        ({"objects": [5, 2]}, "least, most"),
        ({"objects": [0, 2]}, "objects.0: "),
        ({"classes": 9}, "classes: "),
        ({"noise": 0.5}, "noise: "),
        ({"light": -1}, "light: "),
        ({"blur": 1.5}, "blur: "),
        ({"imbalance": 0}, "imbalance: "),
    ],
)
def test_wrong_dials_are_one_line(values: dict[str, object], named: str) -> None:
    with pytest.raises(UserError) as refused:
        load(World, {"type": "shapes", **values})
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValidationError):
        Shapes(**values)


if __name__ == "__main__":
    KEPT.write_text(json.dumps(digests(), indent=1) + "\n")
