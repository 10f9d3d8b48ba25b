"""Confusion matrices image by image against dense ones and scikit-learn; the file they are kept in."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from ssl_seg.config import UserError
from ssl_seg.scores import (
    COLUMNS,
    IMAGES_FILE,
    ImageConfusions,
    Row,
    SegmentationScores,
    image_confusion_bytes,
    mean_iou,
    read_image_confusion,
    split_digest,
)

CLASSES = ("road", "Straße", "never")
AWKWARD = ("ü/ö.png", "two\nlines", "no \udcff text", "")


def row(index: int, matrix: np.ndarray, name: str = "an image") -> Row:
    """Of a matrix; half of the pixels of each cell, rounded down, lie near boundaries."""
    cells = np.flatnonzero(matrix)
    counts = matrix.ravel()[cells]
    return Row(index, name, cells, counts, counts // 2, f"digest {index}")


def of_matrices(matrices: list[np.ndarray], names: tuple[str, ...] = CLASSES) -> ImageConfusions:
    return ImageConfusions.from_rows(names, [row(index, matrix) for index, matrix in enumerate(matrices)])


def drawn(count: int, seed: int = 0, num_classes: int = 3) -> list[np.ndarray]:
    """Sparse matrices; the third image has no pixel that counts."""
    random = np.random.default_rng(seed)
    shape = (count, num_classes, num_classes)
    matrices = random.integers(0, 50, shape) * (random.random(shape) < 0.4)
    matrices[2:3] = 0
    return list(matrices)


def kept(folder: Path, parts: dict[str, ImageConfusions]) -> dict[str, ImageConfusions]:
    (folder / IMAGES_FILE).write_bytes(image_confusion_bytes(parts))
    return read_image_confusion(folder)


def assert_equal(one: ImageConfusions, other: ImageConfusions) -> None:
    assert (one.class_names, one.names, one.digest) == (other.class_names, other.names, other.digest)
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(one, column), getattr(other, column))
        assert getattr(one, column).dtype == getattr(other, column).dtype == np.int32


MATRICES = st.lists(
    st.lists(st.integers(0, 3) | st.just(0), min_size=9, max_size=9).map(lambda cells: np.reshape(cells, (3, 3))),
    max_size=6,
)


@given(matrices=MATRICES, data=st.data())
def test_it_is_the_dense_matrices(matrices: list[np.ndarray], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(matrices))))
    found = ImageConfusions.from_rows(CLASSES, [row(index, matrices[index]) for index in order])
    assert_equal(found, of_matrices(matrices))  # whichever process had which image
    dense = np.array(matrices, dtype=np.int64).reshape(-1, 3, 3)
    np.testing.assert_array_equal(found.total(), dense.sum(axis=0))
    chosen = data.draw(st.lists(st.integers(0, len(matrices) - 1), max_size=9)) if matrices else []
    np.testing.assert_array_equal(found.total(chosen), dense[chosen].sum(axis=0))
    np.testing.assert_equal(found.scores(chosen).miou, SegmentationScores.from_confusion(dense[chosen].sum(0)).miou)
    alone = [SegmentationScores.from_confusion(matrix).miou for matrix in dense]
    np.testing.assert_array_equal(found.per_image_miou(), alone)


@given(matrices=MATRICES)
def test_at_boundaries_are_the_dense_matrices_of_those_pixels(matrices: list[np.ndarray]) -> None:
    near = of_matrices(matrices).at_boundaries()
    halves = [matrix // 2 for matrix in matrices]
    assert_columns(near, of_matrices(halves))
    assert near.names == of_matrices(matrices).names, "an image without such a pixel is still there"
    expected = SegmentationScores.from_confusion(np.sum([np.zeros((3, 3), dtype=int), *halves], axis=0)).miou
    np.testing.assert_equal(near.scores().miou, expected)


def assert_columns(one: ImageConfusions, other: ImageConfusions) -> None:
    for column in ("image", "cell", "count"):
        np.testing.assert_array_equal(getattr(one, column), getattr(other, column))


def test_the_named_figures_are_those_of_the_matrices() -> None:
    found = of_matrices(drawn(5))
    named = found.named()
    scores = found.scores()
    assert named["miou"] == scores.miou
    assert named["iou/road"] == scores.iou[0]
    assert named["band/miou"] == found.at_boundaries().scores().miou != scores.miou
    nothing = of_matrices([np.zeros((3, 3), dtype=int)]).named()
    assert nothing == dict.fromkeys(nothing, None) | {"averaged_classes": 0}


def test_other_images_labels_names_or_another_order_have_another_digest() -> None:
    rows = [row(index, matrix, f"image {index}") for index, matrix in enumerate(drawn(3))]
    digests = {split_digest(rows), split_digest(rows[::-1]), split_digest(rows[:2])}
    digests.add(split_digest([rows[0]._replace(name="image"), *rows[1:]]))
    digests.add(split_digest([rows[0]._replace(digest="other pixels"), *rows[1:]]))
    assert len(digests) == 5
    counted = [rows[0]._replace(count=rows[0].count + 1), *rows[1:]]
    assert split_digest(counted) == split_digest(rows), "what a model answers is no part of it"


def test_an_image_s_score_is_scikit_learn_s() -> None:
    random = np.random.default_rng(3)
    truth, prediction = random.integers(0, 4, (2, 5, 200))
    truth[1] = prediction[1] = 2
    matrices = [np.zeros((5, 5), dtype=int) for _ in truth]
    for matrix, true, predicted in zip(matrices, truth, prediction, strict=True):
        np.add.at(matrix, (true, predicted), 1)
    found = of_matrices(matrices, ("a", "b", "c", "d", "never"))
    expected = [jaccard_score(*pair, average="macro") for pair in zip(truth, prediction, strict=True)]
    assert found.per_image_miou() == pytest.approx(expected)


def test_an_image_without_a_counted_pixel_is_there_and_has_no_score() -> None:
    found = of_matrices(drawn(5))
    assert len(found) == 5
    assert np.isnan(found.per_image_miou()).tolist() == [False, False, True, False, False]
    assert math.isnan(found.scores([2, 2]).miou)


@pytest.mark.parametrize(
    ("images", "num_worst", "num_best"), [(0, 0, 0), (1, 1, 0), (2, 1, 1), (3, 2, 1), (8, 4, 4), (20, 4, 4)]
)
def test_the_worst_and_the_best_share_no_image(images: int, num_worst: int, num_best: int) -> None:
    matrices = np.random.default_rng(images).integers(1, 50, (images, 3, 3))
    found = of_matrices([np.zeros((3, 3), dtype=int), *matrices])  # the first has no score
    miou = found.per_image_miou()
    worst, best = found.extremes(4)
    assert (len(worst), len(best)) == (num_worst, num_best)
    assert len({*worst, *best}) == num_worst + num_best
    ordered = np.sort(miou[np.isfinite(miou)])
    np.testing.assert_array_equal(miou[worst], ordered[:num_worst])
    np.testing.assert_array_equal(miou[best], ordered[::-1][:num_best])


def test_equal_images_are_taken_once_and_in_a_fixed_order() -> None:
    found = of_matrices([np.eye(3, dtype=int)] * 5)
    assert found.extremes(4) == ([0, 1, 2], [4, 3])


def test_the_file_gives_back_what_was_written_whatever_the_names(tmp_path: Path) -> None:
    rows = [row(index, matrix, AWKWARD[index]) for index, matrix in enumerate(drawn(4))]
    parts = {"val": ImageConfusions.from_rows(CLASSES, rows), "test": of_matrices([]), "one": of_matrices(drawn(1))}
    read = kept(tmp_path, parts)
    assert list(read) == ["val", "test", "one"]
    assert read["val"].names == AWKWARD
    for part, found in parts.items():
        assert_equal(read[part], found)


@pytest.mark.parametrize(
    ("column", "value"),
    [("image", 3), ("image", -1), ("cell", 9), ("count", -1), ("band", 10_000), ("band", -1)],
)
def test_a_file_without_sense_is_refused_though_its_digest_is_right(column: str, value: int, tmp_path: Path) -> None:
    found = of_matrices(drawn(3))
    spoilt = getattr(found, column).copy()
    spoilt[-1] = value
    with pytest.raises(UserError, match=f"{IMAGES_FILE}: damaged"):
        kept(tmp_path, {"val": replace(found, **{column: spoilt})})
    with pytest.raises(UserError, match=f"{IMAGES_FILE}: damaged"):
        kept(tmp_path, {"val": replace(found, **{column: spoilt[:-1]})})


@pytest.mark.parametrize(
    "about",
    [
        *([], 5, {}, {"classes": ["a"]}, {"classes": ["a"], "names": {}}),
        {"classes": ["a"], "names": [], "digests": {}},
        {"classes": [1], "names": {"val": []}, "digests": {"val": ""}},
        {"classes": ["a"], "names": {"val": 3}, "digests": {"val": ""}},
        {"classes": ["a"], "names": {}, "digests": {"val": 1}},
        {"classes": ["a"], "names": {"val": []}, "digests": {}},
        {"classes": ["a"], "names": {"val": []}, "digests": {"val": ""}},  # and the columns are not all there
    ],
)
def test_a_header_without_sense_is_refused_though_its_digest_is_right(about: Any, tmp_path: Path) -> None:
    arrays = {"val/image": np.zeros(1, dtype=np.int32)}
    digest = hashlib.sha256(json.dumps(about).encode() + b"\0val/image\0int32\0" + bytes(4)).hexdigest()
    written = {**about, "sha256": digest} if isinstance(about, dict) else about
    (tmp_path / IMAGES_FILE).write_bytes(safetensors.numpy.save(arrays, {"about": json.dumps(written)}))
    with pytest.raises(UserError, match=f"{IMAGES_FILE}: damaged"):
        read_image_confusion(tmp_path)


def test_a_header_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / IMAGES_FILE).write_bytes(safetensors.numpy.save({}, {"about": "[" * 100_000}))
    with pytest.raises(UserError, match=f"{IMAGES_FILE}: damaged"):
        read_image_confusion(tmp_path)


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    kept(tmp_path, {"val": of_matrices(drawn(3))})
    script = (
        "import sys\n"
        "from ssl_seg.scores import read_image_confusion\n"
        f"assert len(read_image_confusion({str(tmp_path)!r})['val']) == 3\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_flipped_bit_and_no_cut_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / IMAGES_FILE
    classes = ("a", "b", "c")  # no escapes: d and D are the same digit in one
    kept(tmp_path, {"val": of_matrices(drawn(3), classes), "test": of_matrices(drawn(1, seed=1), classes)})
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(bytes(damaged) if place % 8 else whole[:place])
        with pytest.raises(UserError, match=f"{IMAGES_FILE}: damaged") as caught:
            read_image_confusion(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_folder_without_the_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there; give a finished run"):
        read_image_confusion(tmp_path)


def test_a_batch_of_matrices_has_the_miou_of_each() -> None:
    matrices = np.stack(drawn(12, num_classes=5)).reshape(3, 4, 5, 5)
    matrices[0, 1, 2] = matrices[0, 1, :, 2] = 0  # a class that is nowhere
    hits = np.diagonal(matrices, axis1=-2, axis2=-1)
    found = mean_iou(hits, matrices.sum(axis=-1) + matrices.sum(axis=-2) - hits)
    each = [SegmentationScores.from_confusion(matrix).miou for matrix in matrices.reshape(-1, 5, 5)]
    np.testing.assert_array_equal(found.ravel(), each)
    assert np.isnan(found[0, 2]), "the third has no pixel that counts"
    assert np.isfinite(found).sum() == 11
