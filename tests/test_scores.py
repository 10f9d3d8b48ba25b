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
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    jaccard_score,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)
from torchmetrics.functional.classification import multiclass_specificity

from ssl_seg.config import UserError
from ssl_seg.metrics import ConfusionMatrix
from ssl_seg.reports.console import score_lines
from ssl_seg.scores import (
    AVERAGES,
    COLUMNS,
    IMAGES_FILE,
    Average,
    ImageConfusions,
    Row,
    SegmentationScores,
    averages_in,
    image_confusion_bytes,
    mean_iou,
    named_scores,
    read_image_confusion,
    split_digest,
)
from tests import ROOT

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

    def digest_of(listed: list[Row]) -> str:
        return ImageConfusions.from_rows(("road", "sky", "tree"), listed).digest

    other = [rows[0]._replace(name="image"), *rows[1:]]
    pixels = [rows[0]._replace(digest="other pixels"), *rows[1:]]
    turned = [own._replace(index=2 - own.index) for own in rows]
    digests = {digest_of(rows), digest_of(turned), digest_of(rows[:2]), digest_of(other), digest_of(pixels)}
    assert len(digests) == 5
    assert digest_of(rows) == split_digest((own.name, own.digest) for own in rows)
    counted = [rows[0]._replace(count=rows[0].count + 1), *rows[1:]]
    assert digest_of(counted) == digest_of(rows), "what a model answers is no part of it"


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


# ---- averages ----

PIXELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60).map(np.array)
FIGURES = ("recall", "specificity", "precision", "f1", "accuracy", "jaccard")


def of_pixels(truth: np.ndarray, prediction: np.ndarray, num_classes: int = 6) -> SegmentationScores:
    """The last class is in neither."""
    matrix = np.zeros((num_classes, num_classes), dtype=int)
    np.add.at(matrix, (truth, prediction), 1)
    return SegmentationScores.from_confusion(matrix)


@given(pixels=PIXELS)
@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
def test_averages_are_scikit_learn_s(average: Average, pixels: np.ndarray) -> None:
    truth, prediction = pixels.T
    found = of_pixels(truth, prediction).averaged(average)
    assert tuple(found) == FIGURES
    precision, recall, f1, _ = precision_recall_fscore_support(truth, prediction, average=average, zero_division=0)
    assert [found["precision"], found["recall"], found["f1"]] == pytest.approx([precision, recall, f1])
    assert found["jaccard"] == pytest.approx(jaccard_score(truth, prediction, average=average, zero_division=0))


@given(pixels=PIXELS)
def test_specificity_and_accuracy_are_of_each_class_against_the_rest(pixels: np.ndarray) -> None:
    truth, prediction = pixels.T
    scores = of_pixels(truth, prediction)
    of_classes = multilabel_confusion_matrix(truth, prediction).reshape(-1, 4)
    tn, fp, fn, tp = of_classes.T
    accuracy = (tp + tn) / len(truth)
    some = tn + fp > 0
    specificity = tn[some] / (tn + fp)[some]
    macro, weighted, pooled = (scores.averaged(name) for name in ("macro", "weighted", "one_vs_rest_micro"))
    assert macro["accuracy"] == pytest.approx(accuracy.mean())
    assert weighted["accuracy"] == pytest.approx(np.average(accuracy, weights=tp + fn))
    assert pooled["accuracy"] == pytest.approx((tp + tn).sum() / of_classes.sum())
    shares = np.divide(tn.sum(), (tn + fp).sum()) if some.any() else math.nan
    assert pooled["specificity"] == pytest.approx(shares, nan_ok=True)
    assert macro["specificity"] == pytest.approx(specificity.mean() if some.any() else math.nan, nan_ok=True)
    weights = (tp + fn)[some]
    expected = np.average(specificity, weights=weights) if weights.sum() else math.nan
    assert weighted["specificity"] == pytest.approx(expected, nan_ok=True)


def test_specificity_is_torchmetrics_s_where_every_class_occurs() -> None:
    truth, prediction = np.random.default_rng(1).integers(0, 5, (2, 400))
    scores = of_pixels(truth, prediction, 5)
    pair = torch.from_numpy(prediction), torch.from_numpy(truth)
    for ours, theirs in {"macro": "macro", "weighted": "weighted", "one_vs_rest_micro": "micro"}.items():
        expected = multiclass_specificity(*pair, num_classes=5, average=theirs).item()
        assert scores.averaged(ours)["specificity"] == pytest.approx(expected, abs=1e-6)


@given(pixels=PIXELS)
def test_one_against_the_rest_summed_says_no_more_than_pixel_accuracy(pixels: np.ndarray) -> None:
    scores = of_pixels(*pixels.T)
    right, found = scores.accuracy, scores.averaged("one_vs_rest_micro")
    assert found["recall"] == found["precision"] == found["f1"] == right
    assert right == pytest.approx(accuracy_score(*pixels.T))
    assert found["jaccard"] == pytest.approx(right / (2 - right))
    count = len(np.unique(pixels))
    assert found["accuracy"] == pytest.approx(1 - 2 * (1 - right) / count)
    if count > 1:
        assert found["specificity"] == pytest.approx(1 - (1 - right) / (count - 1))
    micro = scores.averaged("micro")
    assert math.isnan(micro["specificity"])
    assert {**micro, "specificity": 0, "accuracy": 0} == {**found, "specificity": 0, "accuracy": 0}
    assert micro["accuracy"] == right


@given(pixels=PIXELS)
def test_the_macro_average_is_over_the_classes_of_the_miou(pixels: np.ndarray) -> None:
    scores = of_pixels(*pixels.T)
    assert scores.averaged("macro")["jaccard"] == pytest.approx(scores.miou)
    # A class that is predicted but absent has a recall of 0; of one class alone scikit-learn warns.
    if set(pixels[:, 1]) <= set(pixels[:, 0]) > {pixels[0, 0]}:
        assert scores.averaged("macro")["recall"] == pytest.approx(balanced_accuracy_score(*pixels.T))
    more = of_pixels(*pixels.T, num_classes=40)
    for average in AVERAGES:
        np.testing.assert_equal(more.averaged(average), scores.averaged(average))


def test_absent_classes_count_as_in_the_miou() -> None:
    scores = SegmentationScores.from_confusion(np.array([[6, 2, 0], [0, 0, 0], [0, 0, 0]]))
    macro = scores.averaged("macro")
    assert macro["jaccard"] == scores.miou == pytest.approx((6 / 8 + 0) / 2)
    assert macro["recall"] == pytest.approx((6 / 8 + 0) / 2), "the second class is predicted and not there"
    assert macro["precision"] == pytest.approx((1 + 0) / 2)
    assert macro["specificity"] == pytest.approx(6 / 8), "the first has no pixel of others"
    nothing = SegmentationScores.from_confusion(np.zeros((3, 3), dtype=int))
    assert all(math.isnan(value) for average in AVERAGES for value in nothing.averaged(average).values())


def test_ignored_pixels_are_in_no_average() -> None:
    random = np.random.default_rng(2)
    truth, prediction = random.integers(0, 3, (2, 20, 20))
    ignored = random.random((20, 20)) < 0.3
    matrix = ConfusionMatrix(3)
    matrix.update(torch.from_numpy(np.where(ignored, 255, truth)), torch.from_numpy(prediction))
    scores = SegmentationScores.from_confusion(matrix.counts)
    kept = of_pixels(truth[~ignored], prediction[~ignored], 3)
    for average in AVERAGES:
        np.testing.assert_equal(scores.averaged(average), kept.averaged(average))


def test_the_example_of_the_page() -> None:
    """Three classes, 100 pixels of which 80 are right, and the rarest class is never found: docs/how_it_works.md."""
    scores = SegmentationScores.from_confusion(np.array([[60, 10, 0], [5, 20, 0], [0, 5, 0]]))
    lines = score_lines("test", scores, ("road", "car", "rider"), ["macro", "weighted", "one_vs_rest_micro"])
    assert lines == [
        "test mIoU 0.4333, pixel accuracy 0.8000",
        "  road  0.8000",
        "  car   0.5000",
        "  rider 0.0000",
        "                macro  weighted  one_vs_rest_micro",
        "  recall       0.5524    0.8000             0.8000",
        "  specificity  0.8778    0.8333             0.9000",
        "  precision    0.4982    0.7890             0.8000",
        "  f1           0.5185    0.7889             0.8000",
        "  accuracy     0.8667    0.8425             0.8667",
        "  jaccard      0.4333    0.6850             0.6667",
    ]
    page = (ROOT / "docs" / "how_it_works.md").read_text()
    assert "\n".join(lines) in page
    (missing,) = [line for line in score_lines("val", scores, ("a", "b", "c"), ["micro"]) if "specificity" in line]
    assert missing.split() == ["specificity", "-"]


def test_the_pattern_of_a_published_table() -> None:
    """34 classes, four in five pixels right: recall, precision and F1 are one number, the others near 1."""
    matrix = np.full((34, 34), 2)
    np.fill_diagonal(matrix, 264)
    found = SegmentationScores.from_confusion(matrix).averaged("one_vs_rest_micro")
    assert {name: round(value, 4) for name, value in found.items()} == {
        "recall": 0.8,
        "precision": 0.8,
        "f1": 0.8,
        "jaccard": 0.6667,
        "specificity": 0.9939,
        "accuracy": 0.9882,
    }


def test_averages_are_named_only_where_they_are_asked_for() -> None:
    found = of_matrices(drawn(5))
    plain = found.named()
    assert averages_in(plain) == ()
    asked = found.named(["macro", "micro"])
    assert list(asked)[: len(plain) - 1] == list(plain)[:-1], "the others stay where they are"
    assert averages_in(asked) == ("macro", "micro")
    assert asked["micro/specificity"] is None
    assert asked["macro/f1"] == found.scores().averaged("macro")["f1"]
    assert asked.items() >= plain.items()
    assert named_scores(found.scores(), CLASSES, ["macro"]).keys() == found.named(["macro"]).keys() - {"band/miou"}
