"""Boundary IoU and Hausdorff distances: against the authors' code, scipy's distances, and cases by hand."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.spatial.distance import directed_hausdorff

from ssl_seg.config import UserError
from ssl_seg.contours import (
    FILE,
    Contour,
    Contours,
    boundary_overlap,
    contours_of,
    hausdorff_95,
    inner_boundary,
    read_contours,
    table_bytes,
)

CLASSES = ("ground", "disc", "never")


def blobs(seed: int, height: int = 60, width: int = 80, share: float = 0.5) -> np.ndarray:
    """A smooth random mask, which the image's edge cuts here and there."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((height, width)), 4)
    return noise > np.quantile(noise, 1 - share)


def square(side: int, top: int, left: int, size: int = 100) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def mask_to_boundary(mask: np.ndarray, dilation_ratio: float = 0.02) -> np.ndarray:
    """As in boundary_iou_api of Cheng et al. 2021, `boundary_iou/utils/boundary_utils.py`."""
    h, w = mask.shape
    img_diag = np.sqrt(h**2 + w**2)
    dilation = round(float(dilation_ratio * img_diag))
    dilation = max(dilation, 1)
    new_mask = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    kernel = np.ones((3, 3), dtype=np.uint8)
    new_mask_erode = cv2.erode(new_mask, kernel, iterations=dilation)
    mask_erode = new_mask_erode[1 : h + 1, 1 : w + 1]
    return mask - mask_erode


def surface(mask: np.ndarray) -> np.ndarray:
    """The places `(N, 2)` of the outline, as MedPy's `__surface_distances` finds it."""
    cross = ndimage.generate_binary_structure(2, 1)
    return np.argwhere(mask ^ ndimage.binary_erosion(mask, structure=cross, iterations=1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(8, 200), st.integers(8, 200))
def test_the_boundary_is_that_of_the_authors(seed: int, height: int, width: int) -> None:
    mask = blobs(seed, height, width)
    np.testing.assert_array_equal(inner_boundary(mask), mask_to_boundary(mask.astype(np.uint8)) > 0)


def test_the_boundary_of_a_square_by_hand() -> None:
    """2 % of a diagonal of 141 are 3 pixels: of a square of 20 a frame of 3."""
    assert inner_boundary(square(20, 30, 30)).sum() == 20**2 - 14**2
    assert inner_boundary(square(20, 0, 30)).sum() == 20**2 - 14**2, "where the image cuts it off there is one too"
    # Moved by 10: the frames meet where one's column crosses the other's row.
    hits, union = boundary_overlap(square(20, 30, 30), square(20, 30, 40))
    assert (hits, union) == (2 * (3 * 10) + 2 * 0, 2 * (20**2 - 14**2) - 60)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_both_figures_are_symmetric_and_1_and_0_of_the_same(one: int, other: int) -> None:
    first, second = blobs(one), blobs(other, share=0.3)
    assert boundary_overlap(first, second) == boundary_overlap(second, first)
    assert hausdorff_95(first, second) == hausdorff_95(second, first)
    hits, union = boundary_overlap(first, first)
    assert hits == union > 0
    assert hausdorff_95(first, first) == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_distance_is_that_of_nearest_neighbours(one: int, other: int) -> None:
    first, second = blobs(one), blobs(other, share=0.3)
    places = surface(first), surface(second)
    there = cKDTree(places[1]).query(places[0])[0]
    back = cKDTree(places[0]).query(places[1])[0]
    wanted = max(np.percentile(there, 95), np.percentile(back, 95))
    assert hausdorff_95(first, second) == pytest.approx(wanted, abs=1e-9)
    assert there.max() == pytest.approx(directed_hausdorff(*places)[0])
    assert hausdorff_95(first, second) <= max(there.max(), back.max()) + 1e-9


@pytest.mark.parametrize("shift", [1, 2, 5])
def test_a_big_square_that_is_moved_is_so_far_away(shift: int) -> None:
    assert hausdorff_95(square(60, 10, 10), square(60, 10, 10 + shift)) == shift


def test_where_one_mask_is_empty_it_is_the_diagonal() -> None:
    empty, full = np.zeros((30, 40), dtype=bool), np.ones((30, 40), dtype=bool)
    assert hausdorff_95(empty, full) == hausdorff_95(full, empty) == 50
    assert hausdorff_95(empty, empty) == 0


def test_a_lone_pixel_far_away_is_no_twentieth_of_an_outline() -> None:
    mask = square(40, 10, 10)
    dotted = mask.copy()
    dotted[95, 95] = True
    assert hausdorff_95(mask, dotted) == 0, "the plain Hausdorff distance is 65"


def ids(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8)


def test_of_an_image_class_by_class() -> None:
    truth, prediction = ids(square(20, 30, 30)), ids(square(20, 30, 40))
    ground, disc = contours_of(truth, prediction, CLASSES, "a.png")
    assert (disc.image, disc.of_class, disc.shown_in) == ("a.png", "disc", "both")
    assert disc.boundary_iou == 60 / 348
    assert disc.hd95 == 10
    assert ground.of_class == "ground"
    (only, lost) = contours_of(truth, np.zeros_like(truth), CLASSES, "b.png")
    assert (only.shown_in, lost.shown_in, lost.hd95) == ("both", "truth", math.hypot(100, 100))
    assert contours_of(np.full_like(truth, 255), prediction, CLASSES, "c.png") == []


def test_ignored_pixels_are_of_no_class() -> None:
    truth, prediction = ids(square(20, 30, 30)), ids(square(40, 20, 20))
    ring = square(40, 20, 20) & ~square(20, 30, 30)
    truth[ring] = 255
    _, disc = contours_of(truth, prediction, CLASSES, "a.png")
    assert (disc.boundary_iou, disc.hd95) == (1, 0), "what is said of them counts nowhere"


def test_boundaries_are_summed_and_distances_averaged() -> None:
    rows = (
        Contour("a", "disc", "both", 10, 20, 4.0),
        Contour("b", "disc", "truth", 0, 20, 50.0),
        Contour("a", "ground", "both", 30, 40, 1.0),
    )
    assert Contours(CLASSES, rows).named() == {
        "boundary/miou": (0.25 + 0.75) / 2,
        "boundary/iou/ground": 0.75,
        "boundary/iou/disc": 0.25,
        "boundary/iou/never": None,
        "hd95": 14.0,
        "hd95_one_sided": 1,
        "hd95/ground": 1.0,
        "hd95/disc": 27.0,
        "hd95/never": None,
    }
    none = Contours(CLASSES, ()).named()
    assert (none["boundary/miou"], none["hd95"], none["hd95_one_sided"]) == (None, None, 0)


def test_a_table_is_read_back(tmp_path: Path) -> None:
    name = 'a "quoted", name\nin two lines'
    rows = tuple(contours_of(ids(blobs(1)), ids(blobs(2)), CLASSES, name))
    parts = {"val": Contours(CLASSES, rows), "test": Contours(CLASSES, rows[:1])}
    assert read_contours(tmp_path, CLASSES) == {}
    (tmp_path / FILE).write_bytes(table_bytes(parts))
    assert read_contours(tmp_path, CLASSES) == parts
    head, first, *_ = (tmp_path / FILE).read_text().split("\n")
    assert head == "part,image,class,in,boundary_hits,boundary_union,boundary_iou,hd95"
    assert first.startswith("val,")


@pytest.mark.parametrize("damage", ["disc,both,5,4,1.0,0", "cat,both,1,4,1.0,0", "disc,here,1,4,1.0,0", "disc,both"])
def test_a_damaged_table_is_refused(damage: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(f"{table_bytes({}).decode()}val,a.png,{damage}\n")
    with pytest.raises(UserError, match=r"contours\.csv: damaged; score the run's model anew"):
        read_contours(tmp_path, CLASSES)
