"""How sure and how right: against torchmetrics, scikit-learn, and the same written pixel by pixel."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from ssl_seg.calibration import (
    BINS,
    DOUBTS,
    Confidences,
    Pixels,
    Temperature,
    fit_temperature,
    in_words,
    left_out_in_words,
    temperature_in_words,
)


def drawn(seed: int, count: int = 4000, classes: int = 5, sharpness: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits `(N, K)`, and classes that are drawn by the shares of the logits / 2: over-confident by design."""
    random = np.random.default_rng(seed)
    logits = (sharpness * random.standard_normal((count, classes))).astype(np.float32)
    gumbel = random.gumbel(size=logits.shape)
    return logits, (logits / 2 + gumbel).argmax(axis=1)


def told(logits: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The confidence of each pixel, and whether it is right."""
    return torch.from_numpy(logits).softmax(dim=1).amax(dim=1).numpy(), logits.argmax(axis=1) == truth


def confidences(seed: int, count: int = 4000) -> Confidences:
    return Confidences.of(*told(*drawn(seed, count)))


@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_is_that_of_torchmetrics(seed: int) -> None:
    logits, truth = drawn(seed)
    shares = torch.from_numpy(logits).softmax(dim=1)
    wanted = multiclass_calibration_error(shares, torch.from_numpy(truth), 5, n_bins=BINS, norm="l1").item()
    assert Confidences.of(*told(logits, truth)).ece == pytest.approx(wanted, abs=1e-6)
    assert wanted > 0.05, "else nothing is compared"


def test_of_two_classes_it_is_that_of_the_surer_one() -> None:
    logits, truth = drawn(7, classes=2)
    confidence, right = told(logits, truth)
    wanted = binary_calibration_error(torch.from_numpy(confidence), torch.from_numpy(right), n_bins=BINS).item()
    assert Confidences.of(confidence, right).ece == pytest.approx(wanted, abs=1e-5), "it sums in float32"


def test_the_curve_is_that_of_scikit_learn() -> None:
    confidence, right = told(*drawn(0))
    said, held, shares = Confidences.of(confidence, right).curve()
    wanted_held, wanted_said = calibration_curve(right, confidence, n_bins=BINS)
    np.testing.assert_allclose(said, wanted_said, atol=1e-6)
    np.testing.assert_allclose(held, wanted_held, atol=1e-12)
    assert shares.sum() == pytest.approx(1)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(2**-6, 1, width=32), st.booleans()), min_size=1, max_size=60))
def test_it_is_what_a_loop_over_pixels_says(pixels: list[tuple[float, bool]]) -> None:
    found = Confidences.of(np.array([own for own, _ in pixels]), np.array([own for _, own in pixels]))
    bins: dict[int, list[tuple[float, bool]]] = {}
    for own, is_right in pixels:
        place = min(BINS - 1, int(np.float32(own) * np.float32(BINS)))
        bins.setdefault(place, []).append((float(np.float32(own)), is_right))
    ece = sum(abs(sum(right for _, right in own) - sum(share for share, _ in own)) for own in bins.values())
    assert found.ece == pytest.approx(ece / len(pixels), abs=1e-9)
    assert found.ece >= abs(found.overconfidence) - 1e-12
    assert 0 <= found.aurc <= 1
    assert found.error_of_surest(1.0) == pytest.approx(found.error)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 400))
def test_parts_add_up_to_the_whole(seed: int, cut: int) -> None:
    confidence, right = told(*drawn(seed, count=500))
    whole = Confidences.of(confidence, right)
    summed = Confidences.of(confidence[:cut], right[:cut]) + Confidences.of(confidence[cut:], right[cut:])
    for column in ("pixels", "right", "doubted", "doubted_right"):
        np.testing.assert_array_equal(getattr(summed, column), getattr(whole, column))
    np.testing.assert_allclose(summed.confidence, whole.confidence, rtol=1e-14)
    again = Confidences.load(whole.dump())
    assert again.named() == whole.named(), "as JSON has it"


def test_leaving_out_is_told_as_of_sorted_pixels() -> None:
    confidence, right = told(*drawn(1, count=20_000))
    found = Confidences.of(confidence, right)
    wrong = ~right[np.argsort(-confidence, kind="stable")]
    risks = wrong.cumsum() / np.arange(1, len(wrong) + 1)
    assert found.aurc == pytest.approx(risks.mean(), abs=1e-3)
    for coverage in (0.5, 0.8, 0.9, 0.99):
        kept = round(coverage * len(wrong))
        assert found.error_of_surest(coverage) == pytest.approx(risks[kept - 1], abs=2e-3), coverage
    assert found.error_of_surest(0.5) < found.error_of_surest(0.9) < found.error


def test_leaving_out_by_hand() -> None:
    found = Confidences.of(np.array([0.99, 0.9, 0.6, 0.6]), np.array([True, True, False, True]))
    assert found.error_of_surest(0.5) == 0
    assert found.error_of_surest(0.75) == pytest.approx(0.5 / 3), "of equally sure ones a half of each"
    # 0 over the first half; then e / n, e from 0 to 1 and n from 2 to 4: the integral of x / 2 / (2 + x) over 0 to 2
    assert found.aurc == pytest.approx((1 - math.log(2)) / 4)


def test_the_surest_pixels_are_told_apart() -> None:
    """A trained network says 0.999 of most pixels: equal bins of shares could leave out none of them."""
    doubts = 2.0 ** -np.arange(1, 24)
    found = Confidences.of((1 - doubts).astype(np.float32), np.ones(23, dtype=bool))
    assert (found.doubted > 0).sum() == 23
    assert (found.pixels > 0).sum() < 6
    edges = Confidences.of(np.array([0.0, 1.0]), np.array([True, False]))
    assert (edges.doubted[0], edges.doubted[DOUBTS - 1]) == (1, 1)
    assert (edges.pixels[0], edges.pixels[-1]) == (1, 1)


def test_where_no_pixel_counts_there_is_no_figure() -> None:
    none = Confidences.none()
    assert none.named() == {"ece": None, "overconfidence": None, "aurc": None}
    assert math.isnan(none.error_of_surest(0.9))
    assert in_words(none) == left_out_in_words(none) == "no pixel counts"


def of_pixels(seed: int, sharpness: float = 4.0) -> Pixels:
    logits, truth = drawn(seed, count=8000, sharpness=sharpness)
    return Pixels(logits, truth, np.random.default_rng(seed).uniform(0.5, 2, len(truth)), images=3)


def test_the_temperature_is_found_that_was_planted() -> None:
    """Classes are drawn by the shares at temperature 2."""
    fitted = fit_temperature(of_pixels(3), "digest")
    assert fitted is not None
    assert fitted.value == pytest.approx(2, abs=0.1)
    assert fitted.nll[1] < fitted.nll[0]
    assert fitted.ece[1] < 0.02 < fitted.ece[0]
    assert (fitted.images, fitted.pixels, fitted.split) == (3, 8000, "digest")
    assert Temperature.load(fitted.dump()) == fitted


def test_it_is_the_likeliest_by_another_way_of_looking() -> None:
    pixels = of_pixels(5)

    def loss(inverse: np.ndarray) -> float:
        shares = log_softmax(pixels.logits.astype(np.float64) * inverse[0], axis=1)
        return -float(np.average(shares[np.arange(len(shares)), pixels.truth], weights=pixels.weights))

    wanted = minimize(loss, [1.0], method="L-BFGS-B").x[0]
    fitted = fit_temperature(pixels, "")
    assert fitted is not None
    assert 1 / fitted.value == pytest.approx(wanted, rel=1e-3)
    assert fitted.nll[1] == pytest.approx(loss(np.array([wanted])), abs=1e-6)


def test_a_temperature_changes_no_class_and_no_accuracy() -> None:
    pixels = of_pixels(6)
    for temperature in (0.3, 3.0):
        assert pixels.confidences(temperature).error == pytest.approx(pixels.confidences().error)
    assert pixels.confidences(3.0).mean_confidence < pixels.confidences().mean_confidence


def test_where_nothing_is_wrong_there_is_no_temperature() -> None:
    pixels = of_pixels(8)
    assert fit_temperature(Pixels(pixels.logits, pixels.logits.argmax(axis=1), pixels.weights, 1), "") is None
    assert fit_temperature(Pixels.of_all([], 5), "") is None
    overflowing = np.full((3, 5), np.nan, dtype=np.float32)
    broken = Pixels(overflowing, np.zeros(3, dtype=np.int64), np.ones(3), 1)
    assert fit_temperature(broken, "") is None
    assert Confidences.of(overflowing[:, 0], np.ones(3, dtype=bool)).mean_confidence == 0
    hopeless = Pixels(pixels.logits, pixels.logits.argmin(axis=1), pixels.weights, 1)
    fitted = fit_temperature(hopeless, "")
    assert fitted is not None
    assert fitted.value == pytest.approx(20, rel=1e-3), "shares that say the opposite are made alike, and no more"


def test_figures_in_words() -> None:
    confidence = np.repeat(np.float32([0.9, 0.6]), [800, 200])
    right = np.arange(1000) % 10 < np.repeat([8, 4], [800, 200])
    found = Confidences.of(confidence, right)
    assert in_words(found) == (
        "ECE 12.00 %, over-confident by 12.00 points: on average it says 84.0 % and is right 72.0 % of the time; "
        "when it says 90 % it is right 80 %"
    )
    assert left_out_in_words(found, 0.2) == (
        "leave out the least sure 20 % of the pixels and the error falls from 28.0 % to 20.0 %"
    )
    assert "under-confident by 40.00 points" in in_words(Confidences.of(np.full(5, 0.6), np.ones(5, dtype=bool)))
    assert left_out_in_words(Confidences.of(np.full(5, 0.6), np.ones(5, dtype=bool))).endswith(
        "goes from 0.0 % to 0.0 %"
    )
    fitted = Temperature(1.618, 24, 98304, "", (0.5, 0.3), (0.073, 0.019))
    assert temperature_in_words(fitted) == (
        "temperature 1.62, fitted on 98,304 pixels of 24 validation images; "
        "there (in-sample) the ECE falls from 7.30 % to 1.90 %"
    )


def test_a_temperature_at_the_end_of_the_search_is_told() -> None:
    """Logits that point away from the truth: no temperature is high enough."""
    logits = np.tile(np.array([[9.0, 0.0]], dtype=np.float32), (200, 1))
    logits[1::2] = -logits[1::2]
    truth = (logits[:, 0] > 0).astype(np.int64)
    fitted = fit_temperature(Pixels(logits, truth, np.ones(200), 2), "")
    assert fitted is not None
    assert "at the end of what is sought" in temperature_in_words(fitted)


def test_it_needs_no_torch_and_no_scipy() -> None:
    script = "import sys\nfrom ssl_seg import calibration\nassert not {'torch', 'scipy'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
