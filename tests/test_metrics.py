from __future__ import annotations

import math

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics as sk
from torchmetrics.functional.image import peak_signal_noise_ratio

from ssl_seg.metrics import MAX_PSNR, ConfusionMatrix, mae, near_boundaries, psnr
from ssl_seg.scores import BAND_WIDTH, SegmentationScores


@st.composite
def cases(draw):
    """Truth and prediction, some classes absent, some pixels ignored."""
    classes = draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    pixels = draw(st.integers(1, 40))
    truth = rng.integers(0, draw(st.integers(1, classes)), pixels)
    prediction = rng.integers(0, draw(st.integers(1, classes)), pixels)
    truth[rng.random(pixels) < draw(st.sampled_from([0.0, 0.3]))] = 255
    return classes, truth, prediction


def scored(classes, truth, prediction) -> SegmentationScores:
    matrix = ConfusionMatrix(classes)
    matrix.update(truth, prediction)
    return matrix.scores()


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_scores_equal_scikit_learn(case):
    classes, truth, prediction = case
    scores = scored(classes, truth, prediction)
    y, p = truth[truth != 255], prediction[truth != 255]
    labels = list(range(classes))
    if not len(y):
        assert math.isnan(scores.accuracy)
        return
    options = {"labels": labels, "average": None, "zero_division": np.nan}
    in_truth, in_either = np.isin(labels, y), np.isin(labels, y) | np.isin(labels, p)
    assert (scores.confusion == sk.confusion_matrix(y, p, labels=labels)).all()
    assert scores.accuracy == pytest.approx(sk.accuracy_score(y, p))
    jaccard = sk.jaccard_score(y, p, labels=labels, average=None, zero_division=0)
    assert scores.iou == pytest.approx(np.where(in_either, jaccard, np.nan), nan_ok=True)
    assert scores.miou == pytest.approx(jaccard[in_either].mean())
    recall = np.where(in_truth, sk.recall_score(y, p, **options), np.nan)
    assert scores.class_accuracy == pytest.approx(recall, nan_ok=True)
    assert scores.dice == pytest.approx(sk.f1_score(y, p, **options), nan_ok=True)


def test_scores_equal_torchmetrics_and_smp_where_every_class_is_there():
    draw = torch.Generator().manual_seed(0)
    truth, prediction = (torch.randint(0, 4, (2, 9, 9), generator=draw) for _ in range(2))
    scores = scored(4, truth, prediction)
    theirs = torchmetrics.JaccardIndex("multiclass", num_classes=4, average="none")(prediction, truth)
    assert scores.iou == pytest.approx(theirs.numpy(), rel=1e-6)
    counts = smp.metrics.get_stats(prediction, truth, mode="multiclass", num_classes=4)
    summed = [count.sum(dim=0, keepdim=True) for count in counts]
    assert scores.iou == pytest.approx(smp.metrics.iou_score(*summed).numpy()[0], rel=1e-6)
    assert scores.dice == pytest.approx(smp.metrics.f1_score(*summed).numpy()[0], rel=1e-6)


def test_a_known_matrix():
    scores = SegmentationScores.from_confusion(np.array([[3, 1, 0], [0, 0, 0], [2, 0, 4]]))
    assert scores.iou == pytest.approx([3 / 6, 0, 4 / 6])
    assert scores.miou == pytest.approx((3 / 6 + 0 + 4 / 6) / 3)  # predicted but absent counts 0
    assert scores.accuracy == pytest.approx(7 / 10)
    assert scores.class_accuracy == pytest.approx([3 / 4, math.nan, 4 / 6], nan_ok=True)
    assert scores.dice == pytest.approx([6 / 9, 0, 8 / 10])


def test_a_class_that_nobody_names_is_nan_and_left_out_of_the_mean():
    scores = scored(3, [0, 1, 1], [0, 1, 0])
    assert math.isnan(scores.iou[2])
    assert scores.miou == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_an_empty_matrix_is_nan_throughout():
    scores = scored(3, np.full((2, 2), 255), np.zeros((2, 2)))
    assert not scores.confusion.any()
    assert math.isnan(scores.miou)
    assert math.isnan(scores.accuracy)
    assert np.isnan([scores.iou, scores.class_accuracy, scores.dice]).all()


def test_batches_and_processes_add_up():
    draw = np.random.default_rng(1)
    truth, prediction = draw.integers(0, 3, (4, 5, 5)), draw.integers(0, 3, (4, 5, 5))
    truth[0, 0] = 255
    whole = ConfusionMatrix(3)
    whole.update(truth, prediction)
    first, second = ConfusionMatrix(3), ConfusionMatrix(3)
    first.update(torch.from_numpy(truth[:1]), torch.from_numpy(prediction[:1]))
    second.update(torch.from_numpy(truth[1:]).byte(), prediction[1:])
    total = first + second
    assert torch.equal(total.counts, whole.counts)
    assert total.counts.dtype == torch.int64
    assert total.counts.sum() == 4 * 25 - 5
    assert first.counts.sum() == 20  # the sum is a new matrix


def test_matrices_of_different_classes_do_not_add_up():
    with pytest.raises(ValueError, match="same classes"):
        ConfusionMatrix(3) + ConfusionMatrix(4)


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        ([0, 1], [0, 3], "prediction holds class id 3, but there are 3 classes"),
        ([0, 1], [0, -1], "prediction holds class id -1"),
        ([0, 7], [0, 1], "truth holds class id 7"),
        ([0, 1], [0, 255], "prediction holds class id 255"),
        ([0, 1], [[0, 1]], r"truth is \(2,\) but prediction is \(1, 2\)"),
    ],
)
def test_ids_and_shapes_that_do_not_fit_are_refused(truth, prediction, message):
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        matrix.update(truth, prediction)
    assert not matrix.counts.any()


def test_bytes_without_a_class_are_refused():
    matrix = ConfusionMatrix(3)
    for truth, prediction, message in (
        ([0, 200], [0, 0], "truth holds class id 200"),
        ([0, 1], [0, 3], "prediction.* 3"),
    ):
        with pytest.raises(ValueError, match=message):
            matrix.update(np.array(truth, dtype=np.uint8), np.array(prediction, dtype=np.uint8))
    assert not matrix.counts.any()


@settings(max_examples=40, deadline=None)
@given(
    case=cases(),
    kind=st.sampled_from([np.uint8, np.uint16, np.int16, np.int32, np.int64]),
    ignored=st.sampled_from([-1, 0, 1, 3, 250]),
)
def test_any_kind_of_integer_and_any_ignored_id_counts_alike(case, kind, ignored):
    classes, truth, prediction = case
    truth = np.where(truth == 255, 0 if ignored < 0 else ignored, truth)
    matrix = ConfusionMatrix(classes, ignore_index=ignored)
    outside = (truth != ignored) & (truth >= classes)
    truth[outside] = 0
    matrix.update(truth.astype(kind), prediction.astype(kind))
    counted = truth != ignored
    if counted.any():
        expected = sk.confusion_matrix(truth[counted], prediction[counted], labels=list(range(classes)))
        np.testing.assert_array_equal(matrix.counts, expected)
    else:
        assert not matrix.counts.any()


def test_an_ignored_id_beyond_all_bytes_costs_nothing():
    matrix = ConfusionMatrix(2, ignore_index=2**31 - 1)
    matrix.update(np.array([0, 1, 2**31 - 1]), np.array([0, 0, 1]))
    np.testing.assert_array_equal(matrix.counts, [[1, 0], [1, 0]])


def test_the_prediction_at_an_ignored_pixel_may_be_anything():
    assert scored(2, [255, 1], [77, 1]).accuracy == 1.0


def test_psnr_and_mae_equal_torchmetrics_per_sample():
    draw = torch.Generator().manual_seed(2)
    a, b = torch.rand(3, 3, 6, 5, generator=draw), torch.rand(3, 3, 6, 5, generator=draw)
    for i in range(3):
        assert psnr(a, b)[i].item() == pytest.approx(
            peak_signal_noise_ratio(a[i], b[i], data_range=1.0).item(), rel=1e-5
        )
    expected = sk.mean_absolute_error(a.flatten(1).numpy().T, b.flatten(1).numpy().T, multioutput="raw_values")
    assert mae(a, b).numpy() == pytest.approx(expected, rel=1e-5)


def test_psnr_counts_only_where_it_should():
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    b[:, :, :2] = 0.1
    where = torch.zeros(2, 1, 4, 4)
    where[0, :, :2] = 1.0
    assert psnr(a, b, where)[0].item() == pytest.approx(20.0, abs=1e-4)
    assert mae(a, b, where)[0].item() == pytest.approx(0.1)
    assert psnr(a, b, where)[1].isnan()
    assert mae(a, b, where)[1].isnan()


def test_psnr_of_the_truth_is_finite():
    picture = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    assert psnr(picture, picture).item() == MAX_PSNR


def near_by_hand(label: np.ndarray, reach: int) -> np.ndarray:
    """Pixel by pixel, as the docstring says it."""
    near = np.zeros(label.shape, dtype=bool)
    for (row, column), own in np.ndenumerate(label):
        window = label[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
        near[row, column] = own != 255 and bool(((window != own) & (window != 255)).any())
    return near


@given(
    label=arrays(
        np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.sampled_from([0, 1, 2, 254, 255])
    )
)
def test_near_boundaries_are_those_of_every_pixel_s_own_window(label: np.ndarray) -> None:
    before = label.copy()
    np.testing.assert_array_equal(near_boundaries(label), near_by_hand(label, reach=1))
    np.testing.assert_array_equal(label, before)


@pytest.mark.parametrize(("size", "reach"), [((360, 480), 4), ((40, 60), 1), ((300, 900), 7)])
def test_the_band_is_as_wide_as_the_diagonal_says(size: tuple[int, int], reach: int) -> None:
    label = np.zeros(size, dtype=np.uint8)
    label[:, size[1] // 2 :] = 7
    columns = np.flatnonzero(near_boundaries(label).all(axis=0))
    assert columns.tolist() == list(range(size[1] // 2 - reach, size[1] // 2 + reach))
    assert reach == max(1, round(BAND_WIDTH * np.hypot(*size)))


def test_where_ignored_pixels_adjoin_there_is_no_boundary_but_a_thin_line_of_them_hides_none() -> None:
    label = np.zeros((360, 480), dtype=np.uint8)
    label[:, 200:203] = 255
    assert not near_boundaries(label).any(), "one class on both sides"
    label[:, 203:] = 1
    assert np.flatnonzero(near_boundaries(label)[0]).tolist() == [199, 203], "each sees over the line, 4 pixels far"
    label[:, 190:203] = 255
    assert not near_boundaries(label).any(), "a broad one says that nobody knows where the boundary is"
