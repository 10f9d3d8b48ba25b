from __future__ import annotations

import json
import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from pretext import colorize
from pretext.colorize import Colorize
from ssl_seg import rng
from ssl_seg.data.augment import Augment
from ssl_seg.data.loading import Samples
from ssl_seg.models import DecoderNet, DenseHead, Features
from ssl_seg.stages.start import prepare_tasks, recall
from ssl_seg.tasks import PretextTask, View
from ssl_seg.testing import check_pretext_task
from tests.small import Textured

CPU = torch.device("cpu")
FRACTION = st.floats(0.0, 1.0, width=32)
COLOUR = st.tuples(FRACTION, FRACTION, FRACTION)


def keys(count: int, seed: int = 0) -> Tensor:
    return rng.fold_in(rng.as_key(seed), torch.arange(count))


def pictures(count: int = 2, height: int = 20, width: int = 28) -> Tensor:
    """Smooth, and of all colours."""
    return F.interpolate(rng.uniform(keys(count, 9), (3, 4, 5)), size=(height, width), mode="bilinear")


def as_image(colours: np.ndarray | Tensor) -> Tensor:
    """`(N, 3)` as N images of one pixel."""
    return torch.as_tensor(colours)[..., None, None]


def random_colours(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 3))


def plain_logits(task: Colorize, view: View, seed: int = 3) -> Tensor:
    """Logits as a network might give them, float64 `(B, Q, h, w)`."""
    count, height, width = view.target.shape
    return rng.normal(keys(count, seed), (len(colorize.bins()), height, width)).double() * 3.0


# References: the formulas of IEC 61966-2-1 and CIE 15, in float64 and case by case

MATRIX = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
D65 = np.array([0.95047, 1.0, 1.08883])
DELTA = 6.0 / 29.0


def reference_lab(rgb: np.ndarray) -> np.ndarray:
    """`(N, 3)` to `(N, 3)`."""
    rgb = np.asarray(rgb, dtype=np.float64)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    relative = linear @ MATRIX.T / D65
    curved = np.where(relative > DELTA**3, np.cbrt(relative), relative / (3 * DELTA**2) + 4 / 29)
    x, y, z = curved.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def reference_rgb(lab: np.ndarray) -> np.ndarray:
    lightness, a, b = np.asarray(lab, dtype=np.float64).T
    y = (lightness + 16) / 116
    curved = np.stack([y + a / 500, y, y - b / 200], axis=1)
    relative = np.where(curved > DELTA, curved**3, 3 * DELTA**2 * (curved - 4 / 29))
    linear = np.clip(relative * D65 @ np.linalg.inv(MATRIX).T, 0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def reference_encoding(ab: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and shares of the five nearest bins by sorting all distances."""
    centres = colorize.bins().numpy()
    distance = np.sqrt(((ab[:, None] - centres) ** 2).sum(axis=2))
    ids = distance.argsort(axis=1, kind="stable")[:, :5]
    kernel = np.exp(-(np.take_along_axis(distance, ids, axis=1) ** 2) / (2 * 5.0**2))
    return ids, kernel / kernel.sum(axis=1, keepdims=True)


def one_hot(ids: np.ndarray | Tensor, shares: np.ndarray | Tensor) -> Tensor:
    """`(N, 5)` twice as `(N, Q)` float64."""
    ids, shares = torch.as_tensor(ids), torch.as_tensor(shares).double()
    return torch.zeros(len(ids), len(colorize.bins()), dtype=torch.float64).scatter_(1, ids, shares)


# The contract


@pytest.mark.parametrize(
    "task",
    [Colorize(), Colorize(target="ab"), Colorize(target="ab", distance="smooth_l1")],
    ids=["bins", "ab", "smooth_l1"],
)
def test_colorize_keeps_the_contract(task):
    check_pretext_task(task, size=(32, 32), keyed=False)


def test_colorize_is_found_by_its_name():
    assert PretextTask.model_validate({"type": "colorize", "target": "ab"}) == Colorize(target="ab")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "rgb"}, "'bins' or 'ab'"),
        ({"uniform": 0.0}, "greater than 0"),
        ({"uniform": 1.5}, "less than or equal to 1"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"frequencies": [0.5, 0.5]}, "frequencies are 309 shares, .* not 2 that add up to 1;"),
        ({"frequencies": [1.0] * 309}, "not 309 that add up to 309;"),
    ],
)
def test_colorize_refuses_options_without_meaning(options, words):
    with pytest.raises(ValidationError, match=words):
        Colorize.model_validate(options)


# Colour spaces


@given(colours=st.lists(COLOUR, min_size=1, max_size=20))
def test_lab_is_that_of_the_formulas_and_leads_back(colours):
    colours = np.array(colours)
    lab = colorize.rgb_to_lab(as_image(colours))
    np.testing.assert_allclose(lab[:, :, 0, 0], reference_lab(colours), atol=2e-4)  # D65 has five digits
    np.testing.assert_allclose(colorize.lab_to_rgb(lab)[:, :, 0, 0], colours, atol=1e-6)
    single = colorize.rgb_to_lab(as_image(colours).float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single[:, :, 0, 0], reference_lab(colours), atol=1e-3)
    np.testing.assert_allclose(colorize.lab_to_rgb(single)[:, :, 0, 0], colours, atol=2e-5)


@given(colours=st.lists(st.tuples(st.floats(0, 100), st.floats(-120, 120), st.floats(-120, 120)), min_size=1))
def test_rgb_is_that_of_the_formulas_inside_and_outside_the_gamut(colours):
    rgb = colorize.lab_to_rgb(as_image(np.array(colours)))
    assert 0 <= rgb.min() <= rgb.max() <= 1
    np.testing.assert_allclose(rgb[:, :, 0, 0], reference_rgb(np.array(colours)), atol=1e-6)


def test_lab_agrees_with_opencv_both_ways():
    colours = random_colours(5000).astype(np.float32)
    colours[:8] = np.array(np.meshgrid([0, 1], [0, 1], [0, 1])).reshape(3, 8).T
    lab = colorize.rgb_to_lab(as_image(colours))[:, :, 0, 0].numpy()
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4).astype(np.float32)
    np.testing.assert_allclose(lab, cv2.cvtColor(linear[None], cv2.COLOR_LRGB2LAB)[0], atol=0.05)
    # From encoded RGB OpenCV interpolates a table of 33 colours a side: it is that far from its own conversion above.
    by_table = cv2.cvtColor(colours[None], cv2.COLOR_RGB2LAB)[0]
    np.testing.assert_allclose(lab, by_table, atol=0.7)
    assert np.abs(lab - by_table).mean() < 0.1
    back = np.clip(cv2.cvtColor(lab[None], cv2.COLOR_LAB2RGB)[0], 0, 1)
    np.testing.assert_allclose(colorize.lab_to_rgb(as_image(lab))[:, :, 0, 0], back, atol=1e-3)


def test_known_colours():
    colours = as_image([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(colorize.rgb_to_lab(colours)[:, :, 0, 0], expected, atol=0.01)


def test_grey_has_no_colour_and_rising_lightness():
    grey = torch.linspace(0, 1, 500)[:, None].expand(-1, 3)
    lab = colorize.rgb_to_lab(as_image(grey))
    assert lab[:, 1:].abs().max() < 1e-3
    assert (lab[:, 0, 0, 0].diff() > 0).all()
    nearest = colorize.soft_bins(colorize.colour_code(as_image(grey)))[0][..., 0]
    assert (colorize.bins()[nearest] == 0).all()


# The view


def test_the_network_sees_lightness_three_times():
    images = pictures()
    view = Colorize().corrupt(images, keys(2))
    assert torch.equal(view.input[:, 0], view.input[:, 1])
    assert torch.equal(view.input[:, 0], view.input[:, 2])
    flat = images.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    expected = reference_lab(flat)[:, 0].reshape(2, 20, 28) / 100
    np.testing.assert_allclose(view.input[:, 0], expected, atol=1e-5)
    extremes = Colorize().corrupt(as_image([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), keys(2)).input
    assert 0 <= extremes.min() <= extremes.max() <= 1


def test_two_images_of_one_lightness_and_other_colours_look_the_same():
    lab = torch.tensor([[60.0, 30.0, 20.0], [60.0, -30.0, 20.0]], dtype=torch.float64)
    view = Colorize().corrupt(colorize.lab_to_rgb(as_image(lab)).float(), keys(2))
    torch.testing.assert_close(view.input[0], view.input[1])
    assert view.target[0] != view.target[1]


class Passed(DecoderNet):
    """Gives back the first map."""

    out_channels = 3

    def forward(self, features: Features) -> Tensor:
        return features[0]


@given(height=st.integers(1, 50), width=st.integers(1, 50))
def test_targets_have_the_predictions_size_at_every_size(height, width):
    padded = [-(-side // 32) * 32 for side in (height, width)]
    strides = (2, 4, 8, 16, 32)
    features = Features([torch.zeros(1, 3, padded[0] // stride, padded[1] // stride) for stride in strides], strides)
    head = DenseHead(Passed(), 2, stride=colorize.STRIDE)
    predicted = head(features, (height, width)).shape[-2:]
    image = torch.rand(1, 3, height, width)
    assert Colorize().corrupt(image, keys(1)).target.shape[-2:] == predicted
    assert Colorize(target="ab").corrupt(image, keys(1)).target.shape[-2:] == predicted


def test_targets_are_compact():
    view = Colorize().corrupt(pictures(2, 33, 47), keys(2))
    assert view.target.shape == (2, 9, 12)
    assert view.target.dtype == torch.int64
    view = Colorize(target="ab").corrupt(pictures(2, 33, 47), keys(2))
    assert view.target.shape == (2, 2, 9, 12)


@given(height=st.integers(1, 14), width=st.integers(1, 14))
def test_a_block_is_seen_by_two_pixels_astride_its_centre(height, width):
    image = rng.uniform(keys(1), (3, height, width))
    seen = colorize.at_stride(image)
    for row in range(seen.shape[2]):
        for column in range(seen.shape[3]):
            ends = [(min(4 * row + k, height - 1), min(4 * column + k, width - 1)) for k in (1, 2)]
            expected = sum(image[:, :, y, x] for y, x in ends) / 2
            torch.testing.assert_close(seen[:, :, row, column], expected)


def test_regression_wants_the_exact_colours():
    images = pictures()
    target = Colorize(target="ab").corrupt(images, keys(2)).target
    flat = colorize.at_stride(images).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    expected = reference_lab(flat)[:, 1:].reshape(2, 5, 7, 2) / colorize.AB_SCALE
    np.testing.assert_allclose(target.permute(0, 2, 3, 1), expected, atol=1e-4)


# Bins and encoding


def test_bins_are_the_corners_of_the_squares_that_hold_a_colour():
    centres = colorize.bins()
    assert centres.shape == (309, 2)
    assert (centres % 10 == 0).all()
    known = set(map(tuple, centres.int().tolist()))
    assert len(known) == 309
    assert known > {(0, 0), (80, 70), (80, -110), (-80, 80), (-90, 50)}  # beside red, blue, green
    assert not known & {(100, 70), (-50, -50), (0, 110), (-90, 0)}
    # The cube's edges too: they hold the most vivid colours.
    inside = random_colours(200_000)
    edges = np.where(random_colours(100_000, 1) < 0.5, random_colours(100_000, 2).round(), random_colours(100_000, 3))
    ab = reference_lab(np.concatenate([inside, edges]))[:, 1:]
    squares = np.unique(np.floor(ab / 10), axis=0).astype(int)
    corners = {(10 * (a + i), 10 * (b + j)) for a, b in squares.tolist() for i in (0, 1) for j in (0, 1)}
    assert corners <= known
    assert len(known - corners) <= 2  # a square that is only just touched


def test_soft_encoding_is_that_of_all_distances():
    ab = reference_lab(random_colours(3000))[:, 1:]
    ids, shares = colorize.soft_encode(torch.from_numpy(ab))
    expected_ids, expected_shares = reference_encoding(ab)
    np.testing.assert_allclose(shares, expected_shares, atol=1e-9)
    assert (ids.numpy() == expected_ids).all()
    assert (shares.diff(dim=1) <= 0).all()


def test_the_table_is_as_near_to_the_exact_encoding_as_it_says():
    colours = random_colours(3000)
    # One pixel an image: its code is that of the colour itself.
    ids, shares = (part[:, 0, 0] for part in colorize.soft_bins(colorize.colour_code(as_image(colours).float())))
    assert shares.sum(dim=1).numpy() == pytest.approx(1.0, abs=1e-6)
    assert (shares >= 0).all()
    assert ids.dtype == torch.int64
    off = (one_hot(ids, shares) - one_hot(*reference_encoding(reference_lab(colours)[:, 1:]))).abs().sum(dim=1) / 2
    assert off.mean() < 0.09
    assert off.max() < 0.4
    held = colorize.colour_table(CPU).ab[colorize.colour_code(as_image(colours).float())[:, 0, 0]]
    far = np.linalg.norm(held.numpy() - reference_lab(colours)[:, 1:], axis=1)
    assert far.mean() < 1.1
    assert far.max() < 3.5


def test_the_table_is_exact_for_its_own_colours():
    levels = np.random.default_rng(0).integers(0, colorize.LEVELS, (500, 3))
    colours = levels / (colorize.LEVELS - 1)
    code = colorize.colour_code(as_image(colours).float())
    assert code[:, 0, 0].tolist() == (levels @ [64 * 64, 64, 1]).tolist()
    ids, shares = (part[:, 0, 0] for part in colorize.soft_bins(code))
    ab = reference_lab(colours)[:, 1:]
    np.testing.assert_allclose(one_hot(ids, shares), one_hot(*reference_encoding(ab)), atol=2e-3)
    np.testing.assert_allclose(colorize.colour_table(CPU).ab[code[:, 0, 0]], ab, atol=1e-3)


def test_the_table_is_built_once():
    assert colorize.colour_table(CPU) is colorize.colour_table(torch.device("cpu"))


# Decoding


@pytest.mark.parametrize("bin_", [0, 150, 308])
def test_the_annealed_mean_of_a_sure_answer_is_its_bin(bin_):
    logits = torch.full((1, 309, 2, 3), -50.0)
    logits[:, bin_] = 50.0
    for temperature in (0.01, 0.38, 1.0):
        colour = colorize.annealed_mean(logits, temperature)
        assert colour.shape == (1, 2, 2, 3)
        torch.testing.assert_close(colour, colorize.bins()[bin_].float().view(1, 2, 1, 1).expand_as(colour))


def test_the_annealed_mean_lies_between_mode_and_mean():
    logits = rng.normal(keys(2), (309, 3, 4)).double()
    mode = colorize.bins()[logits.argmax(dim=1)].movedim(-1, 1)
    torch.testing.assert_close(colorize.annealed_mean(logits, 1e-5), mode)
    mean = torch.einsum("bqhw,qc->bchw", logits.exp() / logits.exp().sum(dim=1, keepdim=True), colorize.bins())
    torch.testing.assert_close(colorize.annealed_mean(logits, 1.0), mean)
    shares = logits.softmax(dim=1)
    powered = shares ** (1 / 0.38)
    annealed = torch.einsum("bqhw,qc->bchw", powered / powered.sum(dim=1, keepdim=True), colorize.bins())
    torch.testing.assert_close(colorize.annealed_mean(logits, 0.38), annealed)


# Loss


@pytest.mark.parametrize("prepared", [False, True])
def test_the_loss_is_the_cross_entropy_of_the_whole_distribution(prepared):
    images = pictures(2, 21, 18)
    task = Colorize().prepare(images) if prepared else Colorize()
    view = task.corrupt(images, keys(2))
    logits = plain_logits(task, view).requires_grad_()
    loss = task.loss(logits, view)
    (gradient,) = torch.autograd.grad((loss * torch.tensor([1.0, 3.0])).sum(), logits)

    ids, shares = colorize.soft_bins(view.target)
    wanted = one_hot(ids.reshape(-1, 5), shares.reshape(-1, 5))
    wanted = wanted.view(2, 6, 5, -1).movedim(-1, 1)  # (B, Q, h, w)
    weights = torch.ones(len(colorize.bins()), dtype=torch.float64)
    if prepared:
        weights = colorize.bin_weights(task.frequencies, 0.5)
    again = logits.detach().requires_grad_()
    by_pixel = -(wanted * again.log_softmax(dim=1)).sum(dim=1) * weights[wanted.argmax(dim=1)]
    naive = by_pixel.mean(dim=(1, 2))
    (naive_gradient,) = torch.autograd.grad((naive * torch.tensor([1.0, 3.0])).sum(), again)
    torch.testing.assert_close(loss, naive, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, naive_gradient, rtol=1e-4, atol=1e-8)


def test_a_flat_answer_costs_the_logarithm_of_the_bins():
    view = Colorize().corrupt(pictures(), keys(2))
    loss = Colorize().loss(torch.zeros(2, 309, 5, 7), view)
    assert loss.tolist() == pytest.approx([math.log(309)] * 2)


def test_the_best_answer_costs_the_entropy_of_the_shares():
    view = Colorize().corrupt(pictures(), keys(2))
    ids, shares = colorize.soft_bins(view.target)
    logits = torch.full((2, 309, 5, 7), -40.0).scatter_(
        1, ids.movedim(-1, 1), shares.clamp(min=1e-12).log().movedim(-1, 1)
    )
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(dim=-1).mean(dim=(1, 2))
    torch.testing.assert_close(Colorize().loss(logits, view), entropy, rtol=1e-4, atol=1e-4)
    for other in (logits * 1.3, logits.roll(1, 1)):
        assert (Colorize().loss(other, view) > entropy).all()


EXTREMES = [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.5]]


@pytest.mark.parametrize("target", ["bins", "ab"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
def test_losses_and_figures_are_finite_for_extreme_images_and_answers(target, size):
    images = as_image(EXTREMES).expand(-1, -1, *size).contiguous()
    task = Colorize(target=target).prepare(images[:1])  # all black: every other bin is empty
    view = task.corrupt(images, keys(6))
    channels = 309 if target == "bins" else 2
    shape = (6, channels, -(-size[0] // 4), -(-size[1] // 4))
    for scale in (0.0, 1.0, 1e4):
        prediction = (rng.normal(keys(6), shape[1:]) * scale).requires_grad_()
        loss = task.loss(prediction, view)
        (gradient,) = torch.autograd.grad(loss.sum(), prediction)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        for values in task.metrics(prediction, view).values():
            assert values.isfinite().all()
        picture = task.render(prediction, view)
        assert picture.shape == images.shape
        assert 0 <= picture.min() <= picture.max() <= 1


@pytest.mark.parametrize("target", ["bins", "ab"])
def test_losses_are_float32_in_half_precision(target):
    task = Colorize(target=target).prepare(pictures())
    view = task.corrupt(pictures(), keys(2))
    prediction = rng.normal(keys(2), (309 if target == "bins" else 2, 5, 7)).bfloat16()
    loss = task.loss(prediction, view)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, task.loss(prediction.float(), view))


# Rebalancing


def test_smoothing_and_weights_are_those_of_the_formulas():
    centres = colorize.bins().tolist()
    counts = rng.uniform(keys(1), (309,))[0].double() ** 8
    share = (counts / counts.sum()).tolist()
    blurred = [
        sum(share[j] * math.exp(-((a - c) ** 2 + (b - d) ** 2) / (2 * 5.0**2)) for j, (c, d) in enumerate(centres))
        for a, b in centres
    ]
    blurred = [value / sum(blurred) for value in blurred]
    assert colorize.smoothed(torch.tensor(share, dtype=torch.float64)).tolist() == pytest.approx(blurred, rel=1e-9)
    for uniform in (0.1, 0.5, 1.0):
        raw = [1 / ((1 - uniform) * value + uniform / 309) for value in blurred]
        mean = sum(value * weight for value, weight in zip(blurred, raw, strict=True))
        weights = colorize.bin_weights(tuple(blurred), uniform)
        assert weights.tolist() == pytest.approx([weight / mean for weight in raw], rel=1e-9)
        assert (torch.tensor(blurred, dtype=torch.float64) * weights).sum().item() == pytest.approx(1.0)
    assert colorize.bin_weights(tuple(blurred), 1.0).tolist() == pytest.approx([1.0] * 309)


def test_prepare_counts_the_pools_colours():
    images = torch.cat([pictures(2), torch.full((1, 3, 20, 28), 0.4)])
    task = Colorize().prepare(images)
    ids = colorize.soft_bins(Colorize().corrupt(images, keys(3)).target)[0][..., 0].flatten().tolist()
    counts = torch.zeros(309, dtype=torch.float64)
    for nearest in ids:
        counts[nearest] += 1
    expected = colorize.smoothed(counts / len(ids))
    assert task.frequencies == pytest.approx(expected.tolist(), rel=1e-12)
    assert task.model_copy(update={"frequencies": None}) == Colorize()
    grey = (colorize.bins() == 0).all(dim=1).nonzero().item()
    weights = colorize.bin_weights(task.frequencies, 0.5)
    assert weights.argmin() == grey
    assert weights[grey] < 1 < weights.max()


def test_prepare_keeps_what_is_given_and_measures_nothing_for_regression():
    given = Colorize(frequencies=[1 / 309] * 309)
    assert given.prepare(pictures()) == given
    assert Colorize(target="ab").prepare(pictures()) == Colorize(target="ab")


def test_a_pool_of_grey_images_is_told(capsys, monkeypatch):
    """Of a pool with colours nothing is said."""

    def pool():
        return Samples(Textured(count=4), Augment(crop=(32, 32)), seed=0)

    prepare_tasks({"colorize": Colorize()}, {"pool": pool()}, {}, quiet=False)
    assert not capsys.readouterr().err
    colours = Textured.read

    def grey(dataset, index):
        example = colours(dataset, index)
        example.image[:] = example.image[..., :1]
        return example

    monkeypatch.setattr(Textured, "read", grey)
    for task in (Colorize(), Colorize(target="ab")):
        prepare_tasks({"colorize": task}, {"pool": pool()}, {}, quiet=False)
        assert capsys.readouterr().err.startswith("tasks.colorize: 4 of 4 images that were looked at are grey")


def test_a_resumed_run_reads_the_frequencies_back():
    pool = Samples(Textured(count=3), Augment(crop=(32, 32)), seed=0)
    given = {"colorize": Colorize()}
    prepared = prepare_tasks(given, {"pool": pool}, {})
    assert prepared["colorize"].frequencies is not None
    record = {"given": given["colorize"].dump(), "prepared": prepared["colorize"].dump()}
    recorded = json.loads(json.dumps({"colorize": record}))
    assert recall(given["colorize"], recorded["colorize"]) == prepared["colorize"]
    assert prepare_tasks(given, {}, recorded) == prepared  # the pool is not asked


def test_the_colours_that_are_counted_are_those_of_the_stream_it_reads():
    sources = {
        stream: Samples(Textured(count=3, seed=seed), Augment(crop=(32, 32)), seed=0)
        for seed, stream in enumerate(("pool", "labelled"))
    }
    pool, labelled = (
        prepare_tasks({"colorize": Colorize(stream=stream)}, sources, {})["colorize"].frequencies for stream in sources
    )
    assert pool == prepare_tasks({"colorize": Colorize()}, {"pool": sources["pool"]}, {})["colorize"].frequencies
    assert labelled not in (None, pool)


def test_rare_colours_cost_more_once_the_pool_is_known():
    grey = torch.full((1, 3, 8, 8), 0.5)
    red = torch.tensor([0.8, 0.1, 0.1]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    both = torch.cat([grey, red])
    flat = torch.zeros(2, 309, 2, 2)
    unprepared = Colorize()
    prepared = unprepared.prepare(torch.cat([grey] * 9 + [red]))
    before, after = (task.loss(flat, task.corrupt(both, keys(2))) for task in (unprepared, prepared))
    torch.testing.assert_close(before[0], before[1])
    assert after[1] > 3 * after[0]
    level = Colorize(uniform=1.0).prepare(torch.cat([grey] * 9 + [red]))
    torch.testing.assert_close(level.loss(flat, level.corrupt(both, keys(2))), before)


# Figures and pictures


@pytest.mark.parametrize("target", ["bins", "ab"])
def test_a_right_answer_gives_the_picture_back(target):
    images = F.interpolate(rng.uniform(keys(2, 9), (3, 2, 2)) * 0.4 + 0.3, size=(34, 47), mode="bilinear")
    task = Colorize(target=target)
    view = task.corrupt(images, keys(2))
    assert (task.render_target(view) - images).abs().max() < 0.06
    assert (task.render_target(view) - images).abs().mean() < 0.01
    if target == "ab":
        answer = view.target
    else:
        ids, shares = colorize.soft_bins(view.target)
        answer = torch.full((2, 309, *view.target.shape[1:]), -40.0).scatter_(
            1, ids.movedim(-1, 1), shares.log().movedim(-1, 1)
        )
        task = task.model_copy(update={"temperature": 1.0})  # the shares' own mean is the colour, about
    assert (task.render(answer, view) - images).abs().mean() < 0.015
    assert (task.metrics(answer, view)["ab_error"] < 2.5).all()


def test_lightness_is_kept_at_full_resolution():
    images = pictures(2, 21, 30)
    task = Colorize(target="ab")
    view = task.corrupt(images, keys(2))
    picture = task.render(torch.zeros(2, 2, 6, 8), view)
    assert (picture.amax(dim=1) - picture.amin(dim=1)).max() < 1e-4  # no colour, so grey
    torch.testing.assert_close(colorize.lightness(picture), 100 * view.input[:, :1], atol=1e-2, rtol=0)


def test_figures_are_distances_in_ab():
    images = pictures()
    task = Colorize(target="ab")
    view = task.corrupt(images, keys(2))
    truth = view.target * colorize.AB_SCALE
    grey = task.metrics(torch.zeros_like(view.target), view)
    assert torch.equal(grey["ab_error"], grey["ab_error_of_grey"])
    torch.testing.assert_close(grey["ab_error"], truth.square().sum(dim=1).sqrt().mean(dim=(1, 2)))
    off = task.metrics((truth + torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)) / colorize.AB_SCALE, view)
    torch.testing.assert_close(off["ab_error"], torch.full((2,), 5.0))
    bins = Colorize()
    same = bins.metrics(torch.zeros(2, 309, 5, 7), bins.corrupt(images, keys(2)))["ab_error_of_grey"]
    torch.testing.assert_close(same, grey["ab_error"], atol=0.5, rtol=0)


def test_the_unweighted_figure_is_that_of_colours_as_frequent_as_they_are():
    images = pictures()
    task = Colorize().prepare(images)
    view = task.corrupt(images, keys(2))
    # The pool's own shares at every pixel: least is the weighted loss where each is times its bin's weight.
    frequencies = torch.tensor(task.frequencies, dtype=torch.float64)
    weights = colorize.bin_weights(task.frequencies, task.uniform)
    said, weighted = (
        share.log().float().view(1, -1, 1, 1).expand(2, -1, 5, 7) for share in (frequencies, frequencies * weights)
    )
    figures = task.metrics(weighted, view)
    plain = task.metrics(said, view)["ab_error"]
    torch.testing.assert_close(figures["ab_error_unweighted"], plain, rtol=1e-4, atol=0)
    assert not torch.allclose(figures["ab_error"], plain, rtol=1e-2)
    assert "ab_error_unweighted" not in Colorize().metrics(said, view)  # no weights to take back
    regressed = Colorize(target="ab")
    view = regressed.corrupt(images, keys(2))
    assert "ab_error_unweighted" not in regressed.metrics(view.target, view)


def test_the_guess_is_the_best_answer_that_does_not_look_at_the_image():
    images = pictures(24)
    task = Colorize().prepare(images)
    view = task.corrupt(images, keys(24))
    guess = task.guess(view)
    best = task.loss(guess, view).mean().item()
    for step in (0.3, -0.3):
        for some in (0, 150, 308):
            other = guess.clone()
            other[:, some] += step
            assert task.loss(other, view).mean().item() > best - 0.01
    assert best < task.loss(torch.zeros_like(guess), view).mean().item()
    grey = Colorize(target="ab")
    view = grey.corrupt(images, keys(24))
    assert not grey.guess(view).any()
    bare = Colorize()
    assert not bare.guess(bare.corrupt(images, keys(24))).any()
