from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict, ValidationError
from scipy import stats
from torch import Tensor, nn

from pretext.denoise import Denoise, add_noise, poisson
from pretext.inpaint import Inpaint
from pretext.restore import Restore
from pretext.rotate import Rotate
from ssl_seg import losses, rng
from ssl_seg.models import EncoderSpec, Features, ModelConfig
from ssl_seg.tasks import PretextTask, View, partners
from ssl_seg.testing import check_pretext_task

NOISES = ("gaussian", "poisson", "speckle", "salt_and_pepper")
DISTANCES = ("mse", "l1", "charbonnier", "smooth_l1")
RARE = 1e-4  # fixed keys: a test passes always or never


def keys(count: int, seed: int = 0) -> Tensor:
    return rng.fold_in(rng.as_key(seed), torch.arange(count))


def pictures(count: int = 3, height: int = 20, width: int = 28) -> Tensor:
    return rng.uniform(keys(count, 9), (3, height, width))


# Every built-in task with every option keeps the contract

BUILT_IN = [
    Denoise(),
    Denoise(noise="gaussian", target="noise"),
    Denoise(noise="poisson"),
    Denoise(noise="poisson", target="noise"),
    Denoise(noise="speckle"),
    Denoise(noise="salt_and_pepper"),
    Denoise(noise=NOISES, sigma=(0.2, 0.2)),
    *[Denoise(distance=distance) for distance in DISTANCES[1:]],
    Inpaint(),
    Inpaint(fill="zero"),
    Inpaint(fill="noise", outside=0.0),
    Inpaint(mask="strokes"),
    Inpaint(mask="strokes", number=1, width=(0.001, 0.001), size=(0.001, 0.001)),
    Inpaint(mask="grid"),
    Inpaint(mask="grid", share=0.75),
    Inpaint(mask="grid", grid=2, share=0.01),
    *[Inpaint(distance=distance) for distance in DISTANCES[1:]],
    Inpaint(mask="grid", share=0.75, decoder="light"),
    Inpaint(relative=True),
    Denoise(relative=True, noise=("gaussian", "poisson")),
    Denoise(residual=True, relative=True),
    Denoise(residual=True, target="noise"),
    Inpaint(residual=True, mask="grid"),
    Denoise(decoder="deep"),
    Denoise(decoder="light"),
    Rotate(),
]


@pytest.mark.parametrize("task", BUILT_IN, ids=repr)
def test_built_in_tasks_keep_the_contract(task):
    check_pretext_task(task, size=(48, 48))


# Which decoder draws the answer


def head_and_features(decoder: str) -> tuple[nn.Module, Features]:
    config = ModelConfig.model_validate({"encoder": "resnet10t", "decoder": {"channels": [16, 16, 8, 8, 8]}})
    torch.manual_seed(0)
    encoder = config.build_encoder().eval()
    head = Denoise(decoder=decoder).head(config.spec(encoder)).eval()
    with torch.no_grad():
        return head, encoder(pictures(2, 64, 96))


@pytest.mark.parametrize("decoder", ["deep", "light"])
def test_without_skips_an_answer_comes_from_the_coarsest_map_alone(decoder):
    head, features = head_and_features(decoder)
    answer = head(features, (64, 96))
    assert answer.shape == (2, 3, 64, 96)
    others = replace(features, maps=[*(level + 1 for level in features.maps[:-1]), features[-1]])
    assert torch.equal(head(others, (64, 96)), answer)
    coarsest = replace(features, maps=[*features.maps[:-1], features[-1] + 1])
    assert not torch.equal(head(coarsest, (64, 96)), answer)
    full, _ = head_and_features("full")
    assert not torch.equal(full(others, (64, 96)), full(features, (64, 96)))


def test_a_deep_decoder_is_the_whole_one_and_a_light_one_is_small():
    full, deep, light = (head_and_features(decoder)[0].decoder.state_dict() for decoder in ("full", "deep", "light"))
    assert {name: value.shape for name, value in deep.items()} == {name: value.shape for name, value in full.items()}
    assert not light.keys() & full.keys()
    usual = ModelConfig().spec(ModelConfig().build_encoder()).dense(3).decoder
    assert sum(value.numel() for value in light.values()) < 0.1 * sum(value.numel() for value in usual.parameters())


def test_the_usual_decoder_is_not_written_down():
    assert "decoder" not in Denoise().dump()
    assert Denoise(decoder="light").dump()["decoder"] == "light"
    assert PretextTask.model_validate(Denoise(decoder="light").dump()) == Denoise(decoder="light")


# ... and so do other people's, while the check finds what is wrong


class Invert(PretextTask):
    """A sound task of a third party: which of two negatives is it?"""

    strength: float = 1.0

    def corrupt(self, image: Tensor, key: Tensor) -> View:
        negative = rng.randint(key, (1, 1, 1), 0, 2)
        return View(torch.where(negative == 1, self.strength * (1 - image), image), image)

    def head(self, encoder: EncoderSpec) -> nn.Module:
        return encoder.dense(3)

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        return losses.regression("mse", prediction, view.target, view.loss_mask)


def test_a_task_of_a_test_file_is_checked_in_one_line():
    check_pretext_task(Invert())


class Unkeyed(Invert):
    def corrupt(self, image: Tensor, key: Tensor) -> View:
        return View(1 - image, image)


def test_a_task_without_randomness_says_so():
    with pytest.raises(AssertionError, match="another key gives the same view; say keyed=False"):
        check_pretext_task(Unkeyed())
    check_pretext_task(Unkeyed(), keyed=False)


class Twice(Invert):
    def corrupt(self, image: Tensor, key: Tensor) -> View:
        view = super().corrupt(image, key)
        return View(torch.cat([view.input, 1 - view.input]), view.target)

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        first, second = prediction.chunk(2)
        return super().loss((first + second) / 2, view)


def test_a_task_may_show_several_inputs_a_sample():
    check_pretext_task(Twice())


class Mixed(Invert):
    """The left half of the partner, as its own key darkens it."""

    mixes: ClassVar[bool] = True

    def corrupt(self, image: Tensor, key: Tensor) -> View:
        dark = image * rng.uniform(key, (1, 1, 1), 0.5, 1.0)
        left = torch.arange(image.shape[-1], device=image.device) < image.shape[-1] // 2
        return View(torch.where(left, partners(dark), dark), torch.where(left, partners(image), image))


def test_a_task_may_mix_an_image_with_its_partner_if_it_says_so():
    check_pretext_task(Mixed())

    class Silent(Mixed):
        mixes: ClassVar[bool] = False

    with pytest.raises(AssertionError, match="has to say mixes = True"):
        check_pretext_task(Silent())


class MixedWithTheNext(Mixed):
    def corrupt(self, image: Tensor, key: Tensor) -> View:
        return View((image + image.roll(1, 0)) / 2 * rng.uniform(key, (1, 1, 1)), image)


class NotInPlace(Twice):
    in_place: ClassVar[bool] = True


class Unpure(Invert):
    def corrupt(self, image: Tensor, key: Tensor) -> View:
        return View((image + 0.1 * torch.randn_like(image)).clamp(0, 1), image)


class LooksAtTheBatch(Invert):
    def corrupt(self, image: Tensor, key: Tensor) -> View:
        view = super().corrupt(image, key)
        return View(view.input * 0.5 + image.mean() * 0.5, image)


class LooksAtThePlace(Invert):
    def corrupt(self, image: Tensor, key: Tensor) -> View:
        return super().corrupt(image, key + torch.arange(len(key), device=key.device))


class ChangesItsArgument(Invert):
    def corrupt(self, image: Tensor, key: Tensor) -> View:
        return View(image.mul_(0.5), image)


class Detached(Invert):
    def loss(self, prediction: Tensor, view: View) -> Tensor:
        return super().loss(prediction.detach(), view)


def detached(features: Features) -> Features:
    return replace(features, maps=[level.detach() for level in features])


class IgnoresTheEncoder(Invert):
    def head(self, encoder: EncoderSpec) -> nn.Module:
        dense = encoder.dense(3)
        dense.register_forward_pre_hook(lambda _, given: (detached(given[0]), given[1]))
        return dense


class IdleWeight(Invert):
    def head(self, encoder: EncoderSpec) -> nn.Module:
        dense = encoder.dense(3)
        dense.idle = nn.Parameter(torch.ones(1))
        return dense


class WrongLossShape(Invert):
    def loss(self, prediction: Tensor, view: View) -> Tensor:
        return super().loss(prediction, view).mean()


class WrongInputShape(Invert):
    def corrupt(self, image: Tensor, key: Tensor) -> View:
        return View(image[:, :1], image)


class BrighterThanWhite(Invert):
    def corrupt(self, image: Tensor, key: Tensor) -> View:
        return View(2 * image, image)


class NotFiniteOnEmpty(Invert):
    def corrupt(self, image: Tensor, key: Tensor) -> View:
        view = super().corrupt(image, key)
        return View(view.input, view.target, torch.ones_like(image[:, :1]))

    def loss(self, prediction: Tensor, view: View) -> Tensor:
        error = (prediction - view.target) ** 2 * view.loss_mask
        return error.sum(dim=(1, 2, 3)) / view.loss_mask.sum(dim=(1, 2, 3))


class Waits(Invert):
    def corrupt(self, image: Tensor, key: Tensor) -> View:
        return super().corrupt(image, key) if image.sum().item() else View(image, image)


class CannotLearn(Invert):
    def loss(self, prediction: Tensor, view: View) -> Tensor:
        return super().loss(prediction, view) * 0.01 + 1.0


class PictureOutOfRange(Invert):
    def render(self, prediction: Tensor, view: View) -> Tensor:
        return prediction + 2


class ScalarMetric(Invert):
    def metrics(self, prediction: Tensor, view: View) -> dict[str, Tensor]:
        return {"error": (prediction - view.target).abs().mean()}


class Thawed(Invert):
    model_config = ConfigDict(frozen=False)


class LoadsAsAnother(Invert):
    def dump(self) -> dict:
        return {**super().dump(), "strength": 0.5}


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (Unpure, "corrupt is not pure"),
        (LooksAtTheBatch, "an image's view depends on the images or keys beside it"),
        (LooksAtThePlace, "corrupt is not per sample"),
        (MixedWithTheNext, "an image's view depends on other images or keys than its partner's"),
        (NotInPlace, "no mask fits; it is not in_place"),
        (ChangesItsArgument, "corrupt changes the images it is given"),
        (Detached, "the loss does not depend on the network"),
        (IgnoresTheEncoder, "no gradient reaches the encoder"),
        (IdleWeight, "head weights get no gradient: idle"),
        (WrongLossShape, r"the loss is \(\), not one number a sample, \(4,\)"),
        (WrongInputShape, r"input is \(4, 1, 64, 64\), not \(k\*B, 3, H, W\)"),
        (BrighterThanWhite, r"not in \[0, 1\]"),
        (NotFiniteOnEmpty, r"the loss where no pixel counts is \[nan"),
        (Waits, "corrupt waits for the device"),
        (CannotLearn, "the task does not learn"),
        (PictureOutOfRange, "render leaves"),
        (ScalarMetric, r"metric 'error' is \(\)"),
        (Thawed, "not frozen"),
        (LoadsAsAnother, "dump and load give another config"),
    ],
)
def test_the_check_says_what_is_wrong_with_a_broken_task(broken, sentence):
    with pytest.raises(AssertionError, match=sentence):
        check_pretext_task(broken())


def test_the_check_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    check_pretext_task(Invert())
    assert torch.equal(torch.get_rng_state(), before)


ELSEWHERE = """
from ssl_seg import losses
from ssl_seg.tasks import PretextTask, View
from ssl_seg import rng


class Darken(PretextTask):
    floor: float = 0.2

    def corrupt(self, image, key):
        return View(image * rng.uniform(key, (1, 1, 1), self.floor, 1.0), image)

    def head(self, encoder):
        return encoder.dense(3)

    def loss(self, prediction, view):
        return losses.regression("l1", prediction, view.target)
"""


def test_a_task_of_an_installed_package_is_found_by_its_entry_point(tmp_path: Path, monkeypatch):
    (tmp_path / "elsewhere_darken.py").write_text(ELSEWHERE)
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ssl_seg.pretext]\ngloom = elsewhere_darken:Darken\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "elsewhere_darken", raising=False)
    assert "gloom" in PretextTask.names()
    assert "elsewhere_darken" not in sys.modules  # listed without being imported
    task = PretextTask.model_validate({"type": "gloom", "floor": 0.3})
    assert task.type == "gloom"
    assert task.floor == 0.3
    check_pretext_task(task)


# Denoise


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.35])
def test_sigma_is_the_deviation_on_mid_grey(noise, sigma):
    grey = torch.full((8, 3, 64, 64), 0.5)
    added = add_noise(noise, grey, torch.full((8, 1, 1, 1), sigma), keys(8)) - grey
    # Salt and pepper hits a pixel's three channels together, and few pixels at that: it is measured less exactly.
    pixels, exact = (added.numel(), 0.02) if noise != "salt_and_pepper" else (added.numel() / 3, 0.06)
    assert added.std().item() == pytest.approx(sigma, rel=exact)
    assert added.mean().item() == pytest.approx(0.0, abs=4 * sigma / pixels**0.5)


def test_sigma_is_drawn_per_sample_over_its_range():
    view = Denoise(sigma=(0.05, 0.1), target="noise").corrupt(torch.full((200, 3, 24, 24), 0.5), keys(200))
    sigmas = (view.input - 0.5).flatten(1).std(dim=1).numpy()
    assert 0.045 < sigmas.min() < 0.053
    assert 0.097 < sigmas.max() < 0.106
    assert stats.kstest(sigmas, stats.uniform(0.05, 0.05).cdf).pvalue > RARE


def test_salt_and_pepper_turns_whole_pixels_black_or_white():
    sigma = torch.tensor([0.1, 0.3, 0.5]).view(3, 1, 1, 1)
    noisy = add_noise("salt_and_pepper", torch.full((3, 3, 100, 100), 0.5), sigma, keys(3))
    assert torch.equal(noisy[:, 0], noisy[:, 1])
    assert torch.equal(noisy[:, 0], noisy[:, 2])
    black, white = (noisy[:, 0] == 0).float().mean(dim=(1, 2)), (noisy[:, 0] == 1).float().mean(dim=(1, 2))
    assert black.numpy() == pytest.approx(2 * np.array([0.1, 0.3, 0.5]) ** 2, abs=0.02)
    assert white.numpy() == pytest.approx(2 * np.array([0.1, 0.3, 0.5]) ** 2, abs=0.02)
    assert noisy[2].unique().tolist() == [0.0, 1.0]


def test_noise_that_grows_with_brightness_leaves_black_alone():
    black = torch.zeros(2, 3, 8, 8)
    sigma = torch.full((2, 1, 1, 1), 0.2)
    for noise in ("poisson", "speckle"):
        assert torch.equal(add_noise(noise, black, sigma, keys(2)), black)


@pytest.mark.parametrize("rate", [0.0, 0.3, 2.0, 3.99, 4.0, 7.5, 20.0, 60.0, 200.0, 1250.0])
def test_poisson_counts_have_the_right_distribution(rate):
    counts = poisson(keys(20), torch.full((20, 20_000), rate)).flatten().double().numpy()
    assert (counts == np.round(counts)).all()
    assert counts.min() >= 0
    if rate == 0.0:
        assert not counts.any()
        return
    assert counts.mean() == pytest.approx(rate, abs=4 * (rate / len(counts)) ** 0.5 + 3e-4 * rate)
    # The variance of the sample variance of a Poisson is (2 rate^2 + rate) / n, about.
    assert counts.var() == pytest.approx(rate, abs=4 * ((2 * rate**2 + rate) / len(counts)) ** 0.5 + 3e-3 * rate)
    distance = stats.poisson(rate).cdf(np.arange(counts.max() + 1)) - np.cumsum(np.bincount(counts.astype(int))) / len(
        counts
    )
    assert np.abs(distance).max() < 2 / len(counts) ** 0.5 + 1e-3  # the bound of Kolmogorov at one in 3000


def test_poisson_counts_belong_to_their_key():
    rate = torch.full((3, 50), 3.0)
    counts = poisson(keys(3), rate)
    assert torch.equal(counts[1], poisson(keys(3)[1:2], rate[1:2])[0])
    assert not torch.equal(counts[0], counts[1])


@pytest.mark.parametrize("noise", [*NOISES, NOISES])
def test_both_targets_hold_the_same_picture_and_the_same_figures(noise):
    images = pictures()
    clean, residual = Denoise(noise=noise), Denoise(noise=noise, target="noise")
    view, other = clean.corrupt(images, keys(3)), residual.corrupt(images, keys(3))
    assert torch.equal(view.input, other.input)
    assert torch.equal(view.target, images)
    torch.testing.assert_close(other.input - residual.scale * other.target, images)
    guess = pictures(3).flip(0)
    same_guess = (other.input - guess) / residual.scale
    figures, same_figures = clean.metrics(guess, view), residual.metrics(same_guess, other)
    for name in ("psnr", "mae"):
        torch.testing.assert_close(figures[name], same_figures[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clean.loss(guess, view), residual.loss(same_guess, other), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clean.render(guess, view), residual.render(same_guess, other))
    torch.testing.assert_close(residual.render_target(other), images)


def test_handing_the_noisy_image_back_costs_one():
    grey = torch.full((300, 3, 12, 12), 0.5)
    task = Denoise(sigma=(0.05, 0.15))
    view = task.corrupt(grey, keys(300))
    assert task.loss(view.input, view).mean().item() == pytest.approx(1.0, abs=0.05)


def faint(*contrasts: float) -> Tensor:
    """One picture, at several contrasts about mid-grey."""
    return 0.5 + (pictures(1) - 0.5) * torch.tensor(contrasts).view(-1, 1, 1, 1)


@pytest.mark.parametrize("task", [Inpaint(), Inpaint(mask="grid"), Restore()], ids=repr)
def test_what_is_relative_costs_the_same_whatever_the_contrast(task):
    images, key = faint(1.0, 0.5, 0.2), keys(1).expand(3)
    for own, is_relative in ((task, False), (task.model_copy(update={"relative": True}), True)):
        view = own.corrupt(images, key)
        cost = own.loss(view.input, view)
        assert torch.allclose(cost, cost[:1].expand(3), rtol=0.01) == is_relative
    flat = own.corrupt(torch.full_like(images, 0.3), key)
    assert own.loss(flat.input + 0.1, flat).isfinite().all()


def test_relative_noise_is_as_faint_as_the_image_and_weighs_alike():
    images, key = faint(0.2, 0.1), keys(1).expand(2)
    task = Denoise(relative=True, sigma=(0.1, 0.1))
    view = task.corrupt(images, key)
    strong, weak = (view.input - images).flatten(1)
    torch.testing.assert_close(weak, strong / 2)
    assert strong.std().item() == pytest.approx(0.1 * task.contrast(images)[0].item(), rel=0.05)
    assert task.loss(view.input, view).tolist() == pytest.approx([1.0, 1.0], abs=0.1)


@pytest.mark.parametrize("target", ["clean", "noise"])
def test_the_guess_of_denoise_is_a_blur_and_beats_the_noisy_image(target):
    smooth = torch.linspace(0.3, 0.7, 40).expand(8, 3, 32, 40)
    task = Denoise(target=target)
    view = task.corrupt(smooth, keys(8))
    noisy = view.input if target == "clean" else torch.zeros_like(view.input)
    costs = [task.loss(said, view).mean().item() for said in (task.guess(view), noisy)]
    assert costs[0] < costs[1] / 5  # a mean of nine pixels
    assert torch.allclose(task.render(task.guess(view), view), task.guess(view).clamp(0, 1)) or target == "noise"


def test_the_guess_of_inpaint_is_the_mean_colour_whatever_fills_the_holes():
    images = pictures()
    means = [Inpaint(fill=fill, outside=0.0) for fill in ("mean", "zero", "noise")]
    guesses = []
    for task in means:
        view = task.corrupt(images, keys(3))
        guesses.append(torch.where(view.loss_mask == 1, task.guess(view), 0.0))
    assert torch.equal(guesses[0], torch.where(view.loss_mask == 1, means[0].corrupt(images, keys(3)).input, 0.0))
    assert torch.equal(guesses[0], guesses[1])
    assert torch.equal(guesses[0], guesses[2])


@pytest.mark.parametrize(
    "task",
    [Denoise(), Denoise(target="noise"), Denoise(relative=True), Inpaint(), Inpaint(fill="noise"), Restore()],
    ids=repr,
)
def test_what_is_residual_is_added_to_the_guess(task):
    own = task.model_copy(update={"residual": True})
    view = own.corrupt(pictures(), keys(3))
    whole = pictures(3).flip(0)  # an answer, in the units of the target
    missing = whole - task.guess(view)
    torch.testing.assert_close(own.loss(missing, view), task.loss(whole, view))
    torch.testing.assert_close(own.render(missing, view), task.render(whole, view))
    figures, same = own.metrics(missing, view), task.metrics(whole, view)
    assert figures.keys() == same.keys()
    for name, figure in figures.items():
        torch.testing.assert_close(figure, same[name])
    assert not own.guess(view).any(), "to say nothing is the guess"
    torch.testing.assert_close(own.loss(own.guess(view), view), task.loss(task.guess(view), view))


def test_several_noises_are_drawn_evenly_per_sample():
    grey = torch.full((300, 3, 8, 8), 0.5)
    view = Denoise(noise=("gaussian", "salt_and_pepper"), sigma=(0.2, 0.2)).corrupt(grey, keys(300))
    salted = ((view.input == 0) | (view.input == 1) | (view.input == 0.5)).flatten(1).all(dim=1)
    assert stats.binomtest(int(salted.sum()), 300).pvalue > RARE
    alone = Denoise(noise="salt_and_pepper", sigma=(0.2, 0.2)).corrupt(grey, keys(300))
    assert torch.equal(view.input[salted], alone.input[salted])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma": [0.3, 0.1]}, r"0 < low <= high <= 0.5, not \[0.3, 0.1\]"),
        ({"sigma": [0.1, 0.6]}, "high <= 0.5"),
        ({"sigma": [0.0, 0.1]}, "greater than 0"),
        ({"noise": []}, "at least 1"),
        ({"noise": "pepper"}, "salt_and_pepper"),
        ({"distance": "l2"}, "'charbonnier'"),
        ({"relative": True, "target": "noise"}, "relative: is for target: clean"),
        ({"residual": True, "decoder": "reconstruction"}, "residual: the encoder draws the whole picture"),
    ],
)
def test_denoise_refuses_options_without_meaning(options, words):
    with pytest.raises(ValidationError, match=words):
        Denoise.model_validate(options)


# Inpaint

MASKS = ("squares", "strokes", "grid")


@settings(max_examples=60, deadline=None)
@given(mask=st.sampled_from(MASKS), height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_every_sample_has_a_hole_at_every_size(mask, height, width, seed):
    task = Inpaint(mask=mask, number=1, size=(1e-3, 0.3), width=(1e-3, 0.1), grid=2)
    if mask == "grid" and min(height, width) < 2:
        return  # two cells need two pixels
    hole = task.hole(keys(4, seed), height, width)
    assert hole.shape == (4, 1, height, width)
    assert hole.dtype == torch.bool
    assert hole.flatten(1).any(dim=1).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("fill", ["mean", "zero", "noise"])
def test_only_the_hole_is_changed_and_it_weighs_most(mask, fill):
    images, task = pictures(), Inpaint(mask=mask, fill=fill, outside=0.25)
    view = task.corrupt(images, keys(3))
    hole = view.loss_mask == 1
    assert set(view.loss_mask.unique().tolist()) == {0.25, 1.0}
    kept = ~hole.expand_as(images)
    assert torch.equal(view.input[kept], images[kept])
    assert torch.equal(view.target, images)
    for i in range(3):
        inside = view.input[i][:, hole[i, 0]]
        if fill == "zero":
            assert not inside.any()
        elif fill == "mean":
            visible = images[i][:, ~hole[i, 0]].double().numpy().mean(axis=1)
            assert inside.numpy() == pytest.approx(np.tile(visible[:, None], inside.shape[1]), abs=1e-5)
        else:
            assert inside.std() > 0.2
            assert not torch.isin(inside, images[i]).all()


def test_squares_are_squares_of_the_sides_asked_for():
    sides = []
    for i in range(40):
        hole = Inpaint(number=1, size=(0.25, 0.5)).hole(keys(40)[i : i + 1], 40, 60)[0, 0].numpy()
        rows, columns = hole.any(axis=1), hole.any(axis=0)
        assert rows.sum() == columns.sum()
        assert hole.sum() == rows.sum() * columns.sum()
        sides.append(rows.sum())
    assert min(sides) >= 10
    assert max(sides) <= 20
    assert len(set(sides)) > 5


def test_squares_reach_every_pixel_alike_far_from_the_border():
    hits = Inpaint(number=1, size=(0.2, 0.2)).hole(keys(4000), 20, 20)[:, 0].sum(dim=0)
    inner = hits[4:-4, 4:-4].flatten().double()
    assert (inner - inner.mean()).abs().max() < 5 * inner.mean().sqrt()
    assert hits[0, 0] > 0
    assert hits[-1, -1] > 0


def test_the_grid_erases_the_same_number_of_whole_cells_everywhere():
    hole = Inpaint(mask="grid", grid=4, share=0.5).hole(keys(50), 32, 16)[:, 0]
    cells = hole.view(50, 4, 8, 4, 4).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(cells.all(dim=3), cells.any(dim=3))
    assert cells.any(dim=3).flatten(1).sum(dim=1).tolist() == [8] * 50
    assert len(hole.flatten(1).unique(dim=0)) == 50


def test_strokes_are_as_wide_as_asked_for():
    # 10 pixels wide: an opening with a disc much larger wipes them out, one with a smaller disc keeps them.
    hole = Inpaint(mask="strokes", number=2, width=(0.1, 0.1)).hole(keys(10), 100, 100)[:, 0].numpy().astype(np.uint8)
    thin, thick = (cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)) for side in (7, 31))
    padded = np.pad(hole, ((0, 0), (40, 40), (40, 40)))
    kept = [cv2.morphologyEx(picture, cv2.MORPH_OPEN, thin).sum() / picture.sum() for picture in padded]
    assert min(kept) > 0.7  # the border cuts some strokes lengthwise
    assert np.median(kept) > 0.9
    for picture in padded:
        assert cv2.morphologyEx(picture, cv2.MORPH_OPEN, thick).sum() == 0


def test_figures_look_inside_the_hole_only():
    images, task = pictures(), Inpaint()
    view = task.corrupt(images, keys(3))
    wrong_outside = torch.where(view.loss_mask == 1, images, 1 - images)
    assert torch.allclose(task.metrics(wrong_outside, view)["mae"], torch.zeros(3))
    off_inside = torch.where(view.loss_mask == 1, (images + 0.1).clamp(0, 1), images)
    assert (task.metrics(off_inside, view)["psnr"] > 19.9).all()
    assert (task.metrics(off_inside, view)["psnr"] < 30).all()


def test_the_hole_counts_more_than_what_is_around():
    images, task = pictures(), Inpaint(outside=0.1)
    view = task.corrupt(images, keys(3))
    hole = (view.loss_mask == 1).double()
    share = hole.mean(dim=(1, 2, 3))
    inside = task.loss((images + hole).float(), view)
    outside = task.loss((images + 1 - hole).float(), view)
    expected = share / (1 - share) / 0.1
    torch.testing.assert_close(inside / outside, expected.float(), rtol=1e-3, atol=0)
    alone = Inpaint(outside=0.0)
    assert torch.equal(alone.loss(images + (view.loss_mask != 1), alone.corrupt(images, keys(3))), torch.zeros(3))


def test_the_picture_is_the_image_with_its_holes_painted():
    images, task = pictures(), Inpaint()
    view = task.corrupt(images, keys(3))
    picture = task.render(torch.full_like(images, 7.0), view)
    hole = (view.loss_mask == 1).expand_as(images)
    assert (picture[hole] == 1).all()
    assert torch.equal(picture[~hole], images[~hole])


def test_an_image_that_is_all_hole_is_still_finite():
    task = Inpaint(size=(1.0, 1.0))
    view = task.corrupt(pictures(2, 8, 8), keys(2))
    assert (view.loss_mask == 1).all()
    assert not view.input.any()


@pytest.mark.parametrize("share", [0.6, 0.75])
def test_a_grid_erases_the_share_that_is_asked_for(share):
    images, task = pictures(8, 84, 105), Inpaint(mask="grid", share=share)
    view = task.corrupt(images, keys(8))
    hole = view.loss_mask == 1
    assert hole.float().mean(dim=(1, 2, 3)).numpy() == pytest.approx(np.full(8, round(share * 49) / 49), abs=1e-6)
    assert torch.equal(view.input[~hole.expand_as(images)], images[~hole.expand_as(images)])
    assert task.metrics(images, view)["mae"].max() < 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": [0.5, 0.2]}, "size is"),
        ({"width": [0.1, 1.5]}, "width is"),
        ({"outside": 1.0}, "less than or equal to 0.99"),
        ({"share": 1.0}, "less than 1"),
        ({"grid": 1}, "greater than or equal to 2"),
        ({"mask": "blob"}, "'strokes'"),
    ],
)
def test_inpaint_refuses_options_without_meaning(options, words):
    with pytest.raises(ValidationError, match=words):
        Inpaint.model_validate(options)


# Rotate


@pytest.mark.parametrize("size", [(12, 12), (12, 17), (18, 11)])
def test_rotate_turns_the_middle_square_as_numpy_does(size):
    images = pictures(16, *size)
    view = Rotate().corrupt(images, keys(16))
    side, (height, width) = min(size), size
    top, left = (height - side) // 2, (width - side) // 2
    assert set(view.target.tolist()) == {0, 1, 2, 3}
    for i in range(16):
        square = images[i, :, top : top + side, left : left + side].numpy()
        expected = np.full((3, height, width), 0.5, dtype=np.float32)
        expected[:, top : top + side, left : left + side] = np.rot90(square, view.target[i].item(), axes=(1, 2))
        assert (view.input[i].numpy() == expected).all()


def test_quarter_turns_are_even():
    view = Rotate().corrupt(torch.zeros(2000, 3, 2, 2), keys(2000))
    assert stats.chisquare(torch.bincount(view.target).numpy()).pvalue > RARE


def test_the_picture_is_upright_where_the_turn_was_found():
    images = pictures(6, 10, 10)
    view = Rotate().corrupt(images, keys(6))
    right = torch.eye(4)[view.target]
    wrong = torch.eye(4)[(view.target + 1) % 4]
    assert torch.equal(Rotate().render(right, view), images)
    assert torch.equal(Rotate().render_target(view), images)
    assert not torch.equal(Rotate().render(wrong, view), images)
    assert Rotate().metrics(right, view)["accuracy"].tolist() == [1.0] * 6
    assert Rotate().metrics(wrong, view)["accuracy"].tolist() == [0.0] * 6
